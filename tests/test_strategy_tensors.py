"""Drawn tensors and trees: within their options, everything legal, printed as code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from pasted import again, printed, smallest
from torch import Tensor

from statelessify.testing import assert_trees_close, param_trees, shapes, tensors
from statelessify.testing.strategies import Pair

FLOATING = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
DTYPES = [*FLOATING, torch.complex64, torch.complex128, torch.int8, torch.uint8, torch.int64, torch.bool]


def bits(tensor: Tensor) -> Any:
    """The tensor as numbers that are equal only if all bits are."""
    return (tensor.shape, tensor.dtype, tensor.requires_grad, repr(tensor.detach().tolist()))


@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_the_printed_code_makes_the_same_tensor(data: Any, dtype: torch.dtype, special: bool) -> None:
    floating = dtype.is_floating_point or dtype.is_complex
    x = data.draw(tensors(dtype=dtype, special=special, requires_grad=floating and data.draw(st.booleans())))
    assert bits(again(x)) == bits(x)
    assert x.dtype == dtype
    assert x.numel() > 0
    assert special or x.to(torch.complex128).abs().max() <= 10 * math.sqrt(2)


@given(st.data(), st.sampled_from(FLOATING), st.tuples(st.floats(-20, 20), st.floats(-20, 20)), st.booleans())
def test_bounds(data: Any, dtype: torch.dtype, ends: tuple[float, float], special: bool) -> None:
    low, high = min(ends), max(ends)
    if high - low < 4:
        high = low + 4
    x = data.draw(tensors((3,), dtype=dtype, min_value=low, max_value=high, special=special)).double()
    assert (low <= x).all()
    assert (x <= high).all()


@given(tensors((2, 3), away_from=(0.0, 1.0), min_value=-1, max_value=1.5))
def test_corners_are_kept_away_from(x: Tensor) -> None:
    assert ((x.abs() >= 0.125) & ((x - 1).abs() >= 0.125)).all()
    assert ((x >= -1) & (x <= 1.5)).all()


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.isnan().any(),
        lambda x: (x == math.inf).any(),
        lambda x: (x == -math.inf).any(),
        lambda x: ((x == 0) & x.signbit()).any(),
        lambda x: ((x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)).any(),
        lambda x: (x == torch.finfo(x.dtype).max).any(),
    ],
    ids=["nan", "inf", "-inf", "-0.0", "subnormal", "huge"],
)
def test_special_numbers(condition: Any) -> None:
    found = smallest(tensors((1,), special=True), condition)
    assert condition(found)


@given(tensors(special=False))
def test_ordinary_numbers(x: Tensor) -> None:
    assert x.isfinite().all()
    assert ((x == 0) | (x.abs() >= torch.finfo(x.dtype).smallest_normal)).all()


@given(tensors((10, 10), dtype=torch.float64, min_value=1, max_value=2))
@settings(max_examples=20)
def test_large_ones(x: Tensor) -> None:
    assert x.shape == (10, 10)
    assert ((x >= 1) & (x <= 2)).all()


def test_the_smallest_tensors() -> None:
    assert printed(smallest(tensors())) == "torch.tensor(0.0, dtype=torch.float32)"
    large = smallest(tensors(dtype=torch.float64), lambda x: x.ndim == 2 and x.max() > 3)
    assert printed(large) == "torch.tensor([[4.0]], dtype=torch.float64)"
    assert printed(smallest(tensors((2,), dtype=torch.float64, away_from=(0.0,), max_value=-0.5))) == (
        "torch.tensor([-1.0, -1.0], dtype=torch.float64)"
    )


@given(shapes(min_dims=1, max_dims=2, max_side=2))
def test_shapes(shape: tuple[int, ...]) -> None:
    assert 1 <= len(shape) <= 2
    assert set(shape) <= {1, 2}


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (tensors(3), r"`shape=3` is no shape; write a tuple"),
        (tensors((-1,)), r"`shape=\(-1,\)` is no shape"),
        (tensors(dtype="float32"), "`dtype='float32'` is none that tensors are made of"),
        (tensors(dtype=torch.quint8), "is none that tensors are made of"),
        (tensors(min_value=math.nan), "`min_value` is nan; write a finite number"),
        (tensors(min_value=2, max_value=1), "the first is above the second"),
        (tensors(min_value=-0.1, max_value=0.1, away_from=(0.0,)), r"leave no number .* entries keep 0.125 away"),
        (tensors(dtype=torch.int64, min_value=0.2, max_value=0.8), "leave no number of `dtype=torch.int64`"),
        (tensors(dtype=torch.int64, away_from=(0.0,)), "it is for floating-point numbers, leave it out"),
        (tensors(dtype=torch.bool, min_value=0), "truth values have no bounds"),
        (tensors(dtype=torch.int64, requires_grad=True), "only floating-point and complex tensors have gradients"),
        (shapes(min_dims=2, max_dims=1), "`min_dims=2, max_dims=1`; write two sizes"),
        (param_trees(dtype=torch.int64), "write a floating-point dtype"),
        (param_trees(max_leaves=0), "`max_leaves=0`; write a whole number from 1 on"),
    ],
)
def test_options_that_there_are_not(strategy: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        smallest(strategy)


# ---------------------------------------------------------------- trees


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for item in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(item)]


@given(param_trees(max_leaves=4))
def test_trees(tree: Any) -> None:
    assert 1 <= len(leaves(tree)) <= 4
    assert all(leaf.dtype in (torch.float32, torch.float64) for leaf in leaves(tree))
    copied = again(tree)
    assert_trees_close(copied, tree, rtol=0, atol=0)
    assert [leaf.requires_grad for leaf in leaves(copied)] == [leaf.requires_grad for leaf in leaves(tree)]


@given(param_trees(dtype=torch.float64, shape=(2,), requires_grad=True))
@settings(max_examples=30)
def test_trees_with_options(tree: Any) -> None:
    assert all(leaf.dtype == torch.float64 and leaf.shape == (2,) and leaf.requires_grad for leaf in leaves(tree))


@pytest.mark.parametrize("kind", [dict, list, tuple, Pair])
def test_the_smallest_trees(kind: type) -> None:
    found = smallest(param_trees(), lambda tree: type(tree) is kind)
    assert len(leaves(found)) == (2 if kind is Pair else 1)
    assert all(leaf.shape == () and leaf == 0 for leaf in leaves(found))


def test_leaves_of_one_shape() -> None:
    found = smallest(param_trees(), lambda tree: len([x for x in leaves(tree) if x.shape == (2,)]) > 1)
    assert len(leaves(found)) == 2
