"""`clip_by_global_norm`, `clip_by_value`, `normalize`: torch and closed forms, derivatives, extremes, many tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import IGNORE_SCRIPT, assert_close, fresh, gradients, mlp, one_by_one, regression, regression_batch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks, tree_unstack
from statelessify.errors import HyperparameterError

pytestmark = pytest.mark.usefixtures("float64")
MAKE: dict[str, Callable[[Any], Any]] = {
    "norm": optim.clip_by_global_norm,
    "value": optim.clip_by_value,
    "normalize": optim.normalize,
}
EACH = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
EPSILON = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def nested(dtype: torch.dtype = torch.float64, size: float = 1.0) -> Any:
    return {"b": [size * torch.randn(2, 3, dtype=dtype), (size * torch.randn((), dtype=dtype),)], "a": torch.zeros(0)}


def global_norm(tree: Any) -> float:
    return math.sqrt(math.fsum(abs(entry) ** 2 for leaf in tree_leaves(tree) for entry in leaf.reshape(-1).tolist()))


# Values ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0.0, 5.0), st.floats(1e-3, 1e3))
def test_the_norm_is_clipped_as_by_torch(seed: int, max_norm: float, size: float) -> None:
    torch.manual_seed(seed)
    grads = nested(size=size)
    norm = global_norm(grads)
    found = optim.clip_by_global_norm(max_norm)(grads)
    assert_close(found, tree_map(lambda g: g * min(1.0, max_norm / norm), grads), 1e-12)
    leaves = [torch.zeros_like(g).requires_grad_() for g in tree_leaves(grads)]
    for leaf, g in zip(leaves, tree_leaves(grads), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    for leaf, ours in zip(leaves, tree_leaves(found), strict=True):  # torch divides by the norm plus 1e-6
        assert_close(ours, leaf.grad, 2e-6 / norm)


@given(st.integers(0, 2**31), st.floats(0.0, 5.0))
def test_values_are_clipped_as_by_torch(seed: int, limit: float) -> None:
    torch.manual_seed(seed)
    grads = nested()
    leaves = [torch.zeros_like(g).requires_grad_() for g in tree_leaves(grads)]
    for leaf, g in zip(leaves, tree_leaves(grads), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_value_(leaves, limit)
    assert_close(tree_leaves(optim.clip_by_value(limit)(grads)), [leaf.grad for leaf in leaves], 0.0)


@given(st.integers(0, 2**31), st.floats(1e-12, 1e3))
def test_gradients_are_normalized(seed: int, eps: float) -> None:
    torch.manual_seed(seed)
    grads = nested()
    norm = global_norm(grads)
    assert_close(optim.normalize(eps)(grads), tree_map(lambda g: g / (norm + eps), grads), 1e-12)


@EACH
def test_nothing_given_is_changed_and_structure_and_dtypes_stay(make: Any) -> None:
    grads = [nested(torch.float32, 10.0), nested(torch.float64, 10.0), torch.randn(3, dtype=torch.complex64)]
    before = copy.deepcopy(grads)
    for number in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float32, requires_grad=True)):
        found = make(number)(grads)
        assert_close(grads, before, 0.0)
        assert_close(tree_map(torch.zeros_like, found), tree_map(torch.zeros_like, grads), 0.0)
        assert_close(tree_map(torch.Tensor.detach, found), make(0.5)(grads), 1e-6)


def test_gradients_below_the_norm_go_through_unchanged() -> None:
    grads = nested()
    for leaf, found in zip(tree_leaves(grads), tree_leaves(optim.clip_by_global_norm(100.0)(grads)), strict=True):
        assert torch.equal(leaf, found)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    assert_close(torch.autograd.functional.jacobian(optim.clip_by_global_norm(5.0), w), torch.eye(2), 0.0)


@EACH
def test_complex_gradients_are_pairs_of_reals(make: Any) -> None:
    g = torch.randn(4, dtype=torch.complex128)
    found = make(0.7)({"w": g, "v": torch.ones(2)})
    pairs = make(0.7)({"w": torch.view_as_real(g), "v": torch.ones(2)})
    assert_close({**found, "w": torch.view_as_real(found["w"])}, pairs, 1e-14)
    assert_close(make(0.7)(g.conj()), found_conj(make, g), 1e-14)


def found_conj(make: Any, g: Tensor) -> Tensor:
    return make(0.7)(g).conj().resolve_conj()


@EACH
@pytest.mark.parametrize("tree", [{}, [], {"w": torch.zeros(0)}, {"w": torch.zeros(0, 3), "v": []}], ids=str)
def test_no_entries(make: Any, tree: Any) -> None:
    assert_close(make(1.0)(tree), tree, 0.0)


def test_one_norm_for_leaves_of_several_dtypes() -> None:
    grads = {
        "a": torch.tensor([3.0], dtype=torch.float32),
        "b": torch.tensor([4.0]),
        "c": 12 * torch.ones(1, dtype=torch.bfloat16),
    }
    found = optim.clip_by_global_norm(1.0)(grads)
    for name, value in {"a": 3 / 13, "b": 4 / 13, "c": 12 / 13}.items():
        assert found[name].dtype == grads[name].dtype
        assert math.isclose(found[name].item(), value, rel_tol=EPSILON[found[name].dtype] if name != "b" else 1e-7)


# Extremes ----------------------------------------------------------------------------------------------------------

SIZES = [0.0, 1e-38, 1e-30, 1e-20, 1e-8, 1.0, 1e10, 1e20, 1e30, 1e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_exact_at_every_size(size: float, dtype: torch.dtype) -> None:
    """No square of a gradient overflows or vanishes: ``(3, 4) * size`` has norm ``5 * size``."""
    g = (torch.tensor([3.0, 4.0], dtype=torch.float64) * size / 8).to(dtype)
    parts = {"a": g[:1].clone().requires_grad_(), "b": g[1:].clone().requires_grad_()}
    exact, norm = g.double(), math.hypot(*g.double().tolist())
    expected = {
        "norm": exact * min(1.0, 0.5 / norm if norm else 1.0),
        "value": exact.clamp(-0.5, 0.5),
        "normalize": exact / (norm + 0.5),
    }
    for name, make in MAKE.items():
        found = make(0.5)(parts)
        both = torch.cat([found["a"], found["b"]])
        torch.testing.assert_close(both.detach().double(), expected[name], rtol=4 * EPSILON[dtype], atol=0.0)
        slopes = torch.autograd.grad(both.float().sum(), list(parts.values()), create_graph=True, allow_unused=True)
        assert all(slope.isfinite().all() for slope in slopes)
        if any(slope.requires_grad for slope in slopes) and (size == 0 or 1e-30 <= size <= 1e10):
            seconds = torch.autograd.grad(sum(s.float().sum() for s in slopes), list(parts.values()), allow_unused=True)
            assert all(second is None or second.isfinite().all() for second in seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-4, 1.0, 1e10, 1e30])
def test_the_derivative_is_exact_at_every_size(size: float, dtype: torch.dtype) -> None:
    """Of ``max_norm * n`` with ``n = g / |g|`` and ``g = size * x`` by `x`: ``max_norm * (I - n n^T) / |x|``."""
    x = torch.tensor([3.0, 4.0], dtype=dtype)
    n = x.double() / 5
    tangent = (torch.eye(2) - torch.outer(n, n)) / 5
    found = {"normalized": (optim.normalize(0.0), 1.0)}
    if size >= 1:
        found["clipped"] = optim.clip_by_global_norm(0.5), 0.5
    for function, max_norm in found.values():
        jacobian = torch.autograd.functional.jacobian(lambda x, function=function: function(size * x), x)
        torch.testing.assert_close(jacobian.double(), max_norm * tangent, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, dtype=dtype)
    for function, slope in (
        (optim.clip_by_global_norm(0.5), 1.0),
        (optim.clip_by_value(0.5), 1.0),
        (optim.normalize(0.25), 4.0),
        (optim.normalize(), 1e8),
    ):
        assert torch.equal(function(zero), zero)
        expected = slope * torch.eye(3, dtype=dtype)
        assert_close(torch.autograd.functional.jacobian(function, zero), expected, 1e-6)
        assert_close(torch.func.jacrev(function)(zero), expected, 1e-6)
        assert (
            torch.autograd.functional.hessian(lambda g, function=function: function(g).sin().sum(), zero)
            .isfinite()
            .all()
        )
    for function in (optim.clip_by_global_norm(0.0), optim.clip_by_value(0.0)):
        assert torch.equal(function(torch.ones(2, dtype=dtype)), torch.zeros(2, dtype=dtype))
        assert torch.equal(function(zero), zero)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    g = {"a": torch.tensor([bad, 1.0]), "b": torch.ones(2)}
    for make in (optim.clip_by_global_norm, optim.normalize):
        assert not make(1.0)(g)["a"].isfinite().all()


# Derivatives -------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_finite_differences_by_gradients_and_number(make: Any, size: float) -> None:
    def after(a: Tensor, b: Tensor, c: Tensor, number: Tensor) -> Any:
        found = make(number)({"b": [b], "a": a, "c": c})
        return found["a"], found["b"][0], torch.view_as_real(found["c"])

    inputs = [size * torch.randn(2, 2), size * torch.randn(()), size * torch.randn(2, dtype=torch.complex128)]
    inputs = [value.requires_grad_() for value in (*inputs, torch.tensor(1.3))]
    assert torch.autograd.gradcheck(after, inputs)
    assert torch.autograd.gradgradcheck(after, inputs)


@EACH
@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_transforms_agree_with_eager_code(make: Any) -> None:
    grads, number = {"a": torch.randn(4, 2, 3), "b": torch.randn(4)}, torch.tensor(0.8)
    expected = [make(number)(one) for one in tree_unstack(grads)]
    found = torch.vmap(lambda g, n: make(n)(g), (0, None))(grads, number)
    assert_close(tree_unstack(found), expected, 1e-14)
    numbers = torch.rand(4)
    each = [make(n)(one) for one, n in zip(tree_unstack(grads), numbers, strict=True)]
    assert_close(tree_unstack(torch.vmap(lambda g, n: make(n)(g))(grads, numbers)), each, 1e-14)

    def value(g: Any, n: Tensor) -> Tensor:
        out = make(n)(g)
        return (out["a"] ** 3).sum() + out["b"].sin().sum()

    leaves, learned = fresh(grads), number.clone().requires_grad_()
    slopes = gradients(value(leaves, learned), {**leaves, "number": learned})
    by_grad = torch.func.grad(value, (0, 1))(grads, number)
    assert_close({**by_grad[0], "number": by_grad[1]}, slopes, 1e-12)
    tangents = {"a": torch.randn(4, 2, 3), "b": torch.randn(4)}
    _, slope = torch.func.jvp(value, (grads, number), (tangents, torch.tensor(0.3)))
    wanted = sum((slopes[name] * tangents[name]).sum() for name in grads) + 0.3 * slopes["number"]
    assert_close(slope, wanted, 1e-12)
    summed = torch.func.grad(lambda n: torch.vmap(value, (0, None))({k: v[:, None] for k, v in grads.items()}, n).sum())
    assert summed(number).isfinite()


# In the inner loop -------------------------------------------------------------------------------------------------


def steep(params: Any, batch: Any) -> Tensor:
    return 20 * regression(params, batch)


@EACH
@pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
def test_each_task_is_clipped_by_itself(make: Any, gradient: Any) -> None:
    params, batches, number = fresh(mlp()), regression_batch(3), torch.tensor(0.7, requires_grad=True)
    batches = (batches[0], batches[1] * torch.tensor([0.0, 1.0, 50.0])[:, None, None])  # small and large gradients
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3, "gradient": gradient, "grad_transform": make(number)}
    expected = one_by_one(steep, params, batches, **options)
    wanted = {**params, "number": number}
    meta = gradients(expected.params["first.weight"].sin().sum(), wanted, retain_graph=True)
    for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}):
        found = adapt_tasks(steep, params, batches, **options, **choices)
        assert_close(found, expected)
        assert_close(gradients(found.params["first.weight"].sin().sum(), wanted), meta)
    mapped = over_tasks(lambda p, b: adapt(steep, p, b, **options).params)(params, batches)
    assert_close(gradients(mapped["first.weight"].sin().sum(), wanted), meta)
    if make is not optim.clip_by_value:
        together = adapt_together(params, batches, options)
        assert not torch.allclose(together["first.weight"], expected.params["first.weight"], rtol=1e-3)


def adapt_together(params: Any, batches: Any, options: Any) -> Any:
    """The mistake: one norm over the gradients of all tasks."""
    stacked = {name: torch.stack([p] * 3) for name, p in params.items()}
    return adapt(lambda p, b: over_tasks(steep, in_dims=0)(p, b).sum(), stacked, batches, **options).params


def test_the_learned_norm_by_finite_differences() -> None:
    params, batch = mlp(), regression_batch()

    def meta(number: Tensor, *leaves: Tensor) -> Tensor:
        inner: Any = {"optimizer": optim.adam(lr=0.1, eps=0.1), "grad_transform": optim.clip_by_global_norm(number)}
        return regression(adapt(steep, dict(zip(params, leaves, strict=True)), batch, steps=3, **inner).params, batch)

    inputs = [value.requires_grad_() for value in (torch.tensor(0.5), *params.values())]
    assert torch.autograd.gradcheck(meta, inputs)
    assert torch.autograd.grad(meta(*inputs), inputs[0])[0].abs() > 1e-4


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("norm", "max_norm"), ("value", "limit"), ("normalize", "eps")])
def test_what_is_no_number(kind: str, name: str) -> None:
    bad = [-1.0, -1e-9, math.nan, math.inf, "1", None, True, [1.0], (1.0,), {"*": 1.0}, 1j, lambda step: 1.0]
    for value in (*bad, torch.ones(2), torch.ones(1), optim.per_task(torch.ones(2))):
        with pytest.raises(HyperparameterError, match=f"`{name}"):
            MAKE[kind](value)
    for value in (0, 0.0, 1, 1e30, torch.tensor(1), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert MAKE[kind](value)({"w": torch.ones(2)})["w"].shape == (2,)
