"""Trees of tensors: copies under a policy, stacks and their inverse."""

from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from statelessify import errors, tree_copy, tree_stack, tree_unstack

pytestmark = pytest.mark.usefixtures("float64")

Pair = namedtuple("Pair", "left right")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.int64, torch.bool]
POLICIES = ["alias", "clone", "detach"]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    sizes = shape if shape is not None else tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    made = torch.randn(sizes).to(dtype) if dtype not in (torch.int64, torch.bool) else torch.ones(sizes).to(dtype)
    if (dtype.is_floating_point or dtype.is_complex) and draw(st.booleans()):
        made = nn.Parameter(made) if draw(st.booleans()) else made.requires_grad_()
    return made


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Dicts with unsorted keys, lists, tuples, named tuples, None and strings."""
    keys = st.sampled_from(["z", "a", "m", "b"])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=2),
            st.builds(Pair, inner, inner),
            st.tuples(inner, st.none()),
            st.builds(lambda items: OrderedDict(items), st.lists(st.tuples(keys, inner), min_size=1, max_size=2)),
        ),
        max_leaves=5,
    )


def flat(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Leaves by path, with the containers' types, in the containers' own order: no help from a tree library."""
    if isinstance(tree, dict):
        entries = tree.items()
    elif isinstance(tree, (list, tuple)):
        entries = enumerate(tree)
    else:
        return {path: tree}
    return {
        where: leaf for key, value in entries for where, leaf in flat(value, (*path, type(tree).__name__, key)).items()
    }


# ---------------------------------------------------------------- tree_copy


@given(trees(st.one_of(tensors(), st.just("text"))), st.sampled_from(POLICIES))
def test_copies_keep_structure_order_and_values(tree: Any, policy: Any) -> None:
    copied = tree_copy(tree, policy)
    before, after = flat(tree), flat(copied)
    assert list(before) == list(after)
    for old, new in zip(before.values(), after.values(), strict=True):
        if not isinstance(old, Tensor):
            assert new is old
            continue
        assert (new.dtype, new.device, new.requires_grad) == (old.dtype, old.device, old.requires_grad)
        assert_close(new, old, rtol=0, atol=0)
        if policy == "alias":
            assert new is old
            continue
        assert not isinstance(new, nn.Parameter)
        assert new.numel() == 0 or new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr()
        assert new.is_leaf is (policy == "detach" or not old.requires_grad)


@given(tensors(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from(["clone", "detach"]))
def test_a_cast_moves_floating_and_complex_leaves_only(leaf: Tensor, dtype: torch.dtype, policy: Any) -> None:
    moved = tree_copy({"x": leaf}, policy, dtype=dtype)["x"]
    if leaf.is_complex():
        expected = {torch.float32: torch.complex64, torch.float64: torch.complex128}.get(dtype)
        assert moved.dtype == (expected or moved.dtype)
        assert moved.is_complex()
    else:
        assert moved.dtype == (dtype if leaf.is_floating_point() else leaf.dtype)
    assert moved.requires_grad == leaf.requires_grad
    assert not isinstance(moved, nn.Parameter)


def test_complex_leaves_get_the_partner_of_a_real_dtype() -> None:
    tree = {"c": torch.ones(2, dtype=torch.complex128), "i": torch.ones(2, dtype=torch.int32)}
    moved = tree_copy(tree, "clone", dtype=torch.float32)
    assert (moved["c"].dtype, moved["i"].dtype) == (torch.complex64, torch.int32)
    assert tree_copy(tree, "clone", dtype=torch.complex64)["c"].dtype == torch.complex64
    assert tree_copy(tree, "alias", dtype=torch.float64)["c"] is tree["c"]


def test_a_device_move_is_part_of_the_copy() -> None:
    leaf = torch.ones(3, requires_grad=True)
    moved = tree_copy({"w": leaf, "n": torch.tensor(1)}, "detach", device="meta", dtype=torch.float32)
    assert {k: (v.device.type, v.dtype) for k, v in moved.items()} == {
        "w": ("meta", torch.float32),
        "n": ("meta", torch.int64),
    }
    assert moved["w"].is_leaf
    assert moved["w"].requires_grad


@pytest.mark.parametrize(
    ("policy", "move", "words"),
    [
        ("alias", {"dtype": torch.float32}, ['"clone"', '"detach"', "torch.float64", "torch.float32"]),
        ("alias", {"device": "meta"}, ['"clone"', "meta", "cpu"]),
        ("alais", {}, ["`alias`", "alais"]),
        ("deep", {}, ['"alias"', '"clone"', '"detach"']),
        (None, {}, ['"alias"', "None"]),
    ],
)
def test_policies_that_cannot_be(policy: Any, move: Any, words: list[str]) -> None:
    with pytest.raises(errors.PolicyError) as caught:
        tree_copy({"w": torch.ones(2)}, policy, **move)
    assert isinstance(caught.value, ValueError)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float32", 3])
def test_dtypes_that_cannot_be(dtype: Any) -> None:
    with pytest.raises(errors.DtypeError, match=re.escape(f"`dtype={dtype!r}`")):
        tree_copy({"w": torch.ones(2)}, "detach", dtype=dtype)


def test_alias_with_a_move_that_needs_no_copy_is_fine() -> None:
    leaf = nn.Parameter(torch.ones(2))
    assert tree_copy([leaf], "alias", device="cpu", dtype=torch.float64)[0] is leaf


@pytest.mark.parametrize("policy", POLICIES)
def test_tied_tensors_stay_tied(policy: Any) -> None:
    leaf = nn.Parameter(torch.ones(2))
    copied = tree_copy({"a": leaf, "b": [leaf], "c": nn.Parameter(torch.ones(2))}, policy)
    assert copied["a"] is copied["b"][0]
    assert copied["a"] is not copied["c"]


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_clone_stays_in_the_graph_and_detach_leaves_it(dtype: Any) -> None:
    leaf = torch.tensor([2.0, 3.0], requires_grad=True)
    hidden = leaf * 2
    cloned = tree_copy({"h": hidden}, "clone", dtype=dtype)["h"]
    assert torch.autograd.grad((cloned**2).sum(), leaf)[0].tolist() == [16.0, 24.0]
    detached = tree_copy({"h": hidden}, "detach", dtype=dtype)["h"]
    (detached**2).sum().backward()
    assert detached.grad is not None
    assert leaf.grad is None


def test_expanded_tensors_get_storage_of_their_own() -> None:
    copied = tree_copy([torch.zeros(1).expand(3)], "detach")[0]
    copied[0] = 1.0
    assert copied.tolist() == [1.0, 0.0, 0.0]


# ---------------------------------------------------------------- stacks


@given(trees(tensors(shape=(2, 3))), st.integers(1, 4))
def test_unstack_undoes_stack(tree: Any, count: int) -> None:
    rows = [tree_copy(tree, "clone") for _ in range(count)]
    stacked = tree_stack(rows)
    assert [leaf.shape for leaf in flat(stacked).values() if leaf is not None] == [
        (count, *leaf.shape) for leaf in flat(tree).values() if leaf is not None
    ]
    found = tree_unstack(stacked)
    assert len(found) == count
    for row, back in zip(rows, found, strict=True):
        assert list(flat(row)) == list(flat(back))
        for path, leaf in flat(row).items():
            assert leaf is None or torch.equal(flat(back)[path], leaf)


def test_stacks_match_dicts_by_name() -> None:
    stacked = tree_stack([{"a": torch.zeros(1), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.zeros(1)}])
    assert (stacked["a"].tolist(), stacked["b"].tolist()) == ([[0.0], [0.0]], [[1.0], [1.0]])
    assert list(stacked) == ["a", "b"]


def test_what_is_no_tensor_is_shared_and_must_agree() -> None:
    stacked = tree_stack([{"w": torch.ones(1), "name": "x", "n": 2}] * 3)
    assert (stacked["name"], stacked["n"]) == ("x", 2)
    assert tree_unstack(stacked)[2]["name"] == "x"
    with pytest.raises(errors.TreeError, match="`name`"):
        tree_stack([{"name": "x"}, {"name": "y"}])


def made(value: Any) -> Any:
    """A function that each task makes anew."""
    return lambda: value


class Odd:
    """Is equal to nothing, without an answer."""

    def __eq__(self, other: object) -> Any:
        raise TypeError

    __hash__ = None


SHARED = torch.ones(1)
ODD = Odd()
PAIRS: dict[str, tuple[Any, Any, bool]] = {
    "the same object": (ODD, ODD, True),
    "no answer": (Odd(), Odd(), False),
    "no truth value": (np.ones(2), np.ones(2), False),
    "one value, two types": (1, 1.0, False),
    "nan": (float("nan"), float("nan"), True),
    "nan and a number": (float("nan"), 1.0, False),
    "functions that close over one value": (made(3), made(3), True),
    "functions that close over two": (made(3), made(4), False),
    "functions that close over one tensor": (made(SHARED), made(SHARED), True),
    "functions that close over equal tensors": (made(SHARED), made(SHARED.clone()), False),
    "two functions": (made, tensors, False),
    "a function and none": (made, 3, False),
}


@pytest.mark.parametrize(("one", "other", "same"), PAIRS.values(), ids=PAIRS)
def test_what_counts_as_the_same_value(one: Any, other: Any, same: bool) -> None:
    """Leaves that are no tensors, and that tasks make each on their own."""
    if same:
        assert tree_stack([[one], [other]])[0] is one
    else:
        with pytest.raises(errors.TreeError, match="`0` is not a tensor and differs"):
            tree_stack([[one], [other]])


def test_gradients_pass_through_stacks() -> None:
    leaves = [torch.tensor(float(i), requires_grad=True) for i in range(3)]
    back = tree_unstack(tree_stack([{"w": leaf} for leaf in leaves]))
    assert torch.autograd.grad((back[1]["w"] * 5).sum(), leaves[1])[0].item() == 5.0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tree_stack([]), errors.TaskError, ["no trees"]),
        (lambda: tree_stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}]), errors.TreeError, ["`a`", "`b`"]),
        (lambda: tree_stack([{"a": torch.ones(1)}, [torch.ones(1)]]), errors.TreeError, ["structures"]),
        (lambda: tree_stack([[torch.ones(1)], (torch.ones(1),)]), errors.TreeError, ["tree 1", "containers differ"]),
        (lambda: tree_stack([{"a": torch.ones(1)}, {"a": torch.ones(2)}]), errors.ShapeError, ["`a`", "(1,)", "(2,)"]),
        (lambda: tree_stack([{"a": torch.ones(1)}, {"a": 1.0}]), errors.StatelessifyError, ["`a`"]),
        (lambda: tree_stack([{"a": 1.0}, {"a": torch.ones(1)}]), errors.StatelessifyError, ["`a`"]),
        (lambda: tree_unstack({"a": torch.ones(2), "b": torch.ones(3)}), errors.TaskError, ["a", "2", "b", "3"]),
        (lambda: tree_unstack({"a": torch.ones(2), "b": torch.tensor(1.0)}), errors.TaskError, ["tree_stack"]),
        (lambda: tree_unstack({"a": 1}), errors.TaskError, ["without tensors"]),
    ],
)
def test_stacks_that_cannot_be(call: Any, error: Any, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert [word for word in words if word not in str(caught.value)] == []
