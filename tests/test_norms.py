"""Norms by elementary operations: torch's own values and gradients, and right where torch's are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

from statelessify._transforms import per_task_one, transforming
from statelessify.rules._registry import Rules, rules, rules_here

pytestmark = pytest.mark.usefixtures("float64")

sizes = st.integers(2, 4)


@st.composite
def images(draw: st.DrawFn, spatial: int = 1) -> Tensor:
    """``(batch, channels, ...)`` with values of some spread and offset."""
    shape = (draw(sizes), draw(st.integers(1, 4)), *[draw(sizes) for _ in range(draw(st.integers(spatial, 3)))])
    return torch.randn(shape) * draw(st.sampled_from([1e-2, 1.0, 30.0])) + draw(st.sampled_from([0.0, -5.0]))


@st.composite
def affine(draw: st.DrawFn) -> tuple[bool, bool]:
    return draw(st.booleans()), draw(st.booleans())


def maybe(present: bool, *shape: int) -> Tensor | None:
    return torch.randn(shape).requires_grad_() if present else None


def agree(call: Callable[..., Tensor], inputs: list[Tensor | None], running: list[Tensor | None] | None = None) -> None:
    """Values, first gradients, and the running statistics afterwards."""
    given = [t for t in inputs if t is not None]
    given[0].requires_grad_()
    results = []
    for mode in (Rules("gradients"), contextlib.nullcontext()):
        stats = None if running is None else [None if t is None else t.clone() for t in running]
        arguments = inputs if stats is None else [*inputs, *stats]
        with mode:
            out = call(*arguments)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, torch.autograd.grad((out * weights).sum(), given), stats))
    ours, theirs = results
    assert_close(ours, theirs, rtol=1e-7, atol=1e-9, check_stride=False)


# ---------------------------------------------------------------- as torch


@given(images(), st.integers(1, 2), affine(), st.sampled_from([1e-5, 0.1]))
def test_layer_norm_is_torchs(x: Tensor, trailing: int, present: tuple[bool, bool], eps: float) -> None:
    shape = x.shape[-trailing:]
    weight, bias = maybe(present[0], *shape), maybe(present[1], *shape)
    agree(lambda x, w, b: F.layer_norm(x, shape, w, b, eps), [x, weight, bias])
    agree(lambda x, w, b: torch.layer_norm(x, shape, w, b, eps), [x, weight, bias])


@given(images(spatial=0), affine(), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_batch_norm_is_torchs(
    x: Tensor, present: tuple[bool, bool], training: bool, tracked: bool, momentum: float
) -> None:
    channels = x.shape[1]
    weight, bias = maybe(present[0], channels), maybe(present[1], channels)
    stats = [torch.randn(channels), torch.rand(channels) + 0.5] if tracked or not training else [None, None]
    agree(lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, training, momentum), [x, weight, bias], stats)
    agree(
        lambda x, w, b, m, v: torch.batch_norm(x, w, b, m, v, training, momentum, 1e-3, False), [x, weight, bias], stats
    )


@given(images(), affine(), st.booleans(), st.booleans())
def test_instance_norm_is_torchs(x: Tensor, present: tuple[bool, bool], own_statistics: bool, tracked: bool) -> None:
    channels = x.shape[1]
    weight, bias = maybe(present[0], channels), maybe(present[1], channels)
    stats = [torch.randn(channels), torch.rand(channels) + 0.5] if tracked or not own_statistics else [None, None]
    agree(lambda x, w, b, m, v: F.instance_norm(x, m, v, w, b, own_statistics, 0.3), [x, weight, bias], stats)
    agree(
        lambda x, w, b, m, v: torch.instance_norm(x, w, b, m, v, own_statistics, 0.3, 1e-3, False),
        [x, weight, bias],
        stats,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mixed", [False, True])
def test_low_precision_is_close_to_torchs(dtype: torch.dtype, mixed: bool) -> None:
    x = (torch.randn(8, 4, 6) * 3 + 20).to(dtype)  # an offset that half-precision statistics would lose
    other = torch.float32 if mixed else dtype
    weight, bias = torch.randn(4).to(other), torch.randn(4).to(other)
    mean, var = torch.zeros(4, dtype=other), torch.ones(4, dtype=other)
    calls: list[Callable[[], Tensor]] = [
        lambda: F.layer_norm(x.mT.contiguous(), (4,), weight, bias),
        lambda: F.batch_norm(x, mean.clone(), var.clone(), weight, bias, True),
        lambda: F.batch_norm(x, mean, var, weight, bias, False),
        lambda: F.instance_norm(x, mean.clone(), var.clone(), weight, bias),
    ]
    for call in calls:
        theirs = call()
        with Rules("gradients"):
            ours = call()
        assert ours.dtype == theirs.dtype
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-4}[dtype]
        assert_close(ours, theirs, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.layer_norm(torch.randn(3, 4), (5,)),
        lambda: F.batch_norm(torch.randn(1, 4), None, None, training=True),
        lambda: F.instance_norm(torch.randn(2, 4, 1)),
        lambda: F.batch_norm(torch.randn(3, 4), None, None, training=False),
    ],
)
def test_what_torch_refuses_is_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        call()
    with pytest.raises((RuntimeError, ValueError)), Rules("gradients"):
        call()


@pytest.mark.parametrize("call", [lambda x: F.layer_norm(x, (4,)), lambda x: F.instance_norm(x)])
def test_an_empty_batch_is_fine(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(0, 3, 4)
    with Rules("gradients"):
        assert call(x).shape == x.shape


# ---------------------------------------------------------------- where torch's own are wrong

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, w: F.layer_norm(x, (4,), w),
    "torch.layer_norm": lambda x, w: torch.layer_norm(x, (4,), w),
    "batch_norm": lambda x, w: F.batch_norm(x, None, None, w, training=True),
    "instance_norm": lambda x, w: F.instance_norm(x[None].mT, weight=w),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_higher_derivatives_agree_with_finite_differences(name: str) -> None:
    """Gradcheck of the second derivative checks the third, which is wrong in torch's own layer norm."""
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    mask = torch.randn(12)

    def value(x: Tensor, weight: Tensor) -> Tensor:
        with Rules("gradients"):
            return (FUNCTIONS[name](x, weight).flatten().sin() * mask).sum()

    def second(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(value(x, weight), (x, weight), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (x, weight), create_graph=True)

    assert torch.autograd.gradcheck(value, (x, weight))
    assert torch.autograd.gradgradcheck(value, (x, weight))
    assert torch.autograd.gradcheck(second, (x, weight))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad_of_vmap_of_grad_equals_a_loop(name: str) -> None:
    x, weights = torch.randn(3, 5, 4), torch.randn(4)

    def inner(w: Tensor, x: Tensor) -> Tensor:
        with rules_here():
            return (FUNCTIONS[name](x * w, w).sin() ** 2).sum()

    def step(w: Tensor, x: Tensor) -> Tensor:
        return inner(w - 0.1 * grad(inner)(w, x), x)

    found = grad(lambda w: vmap(step, in_dims=(None, 0))(w, x).sum())(weights)
    leaf, total = weights.clone().requires_grad_(), torch.zeros(())
    for each in x:
        with Rules("gradients"):
            (g,) = torch.autograd.grad(inner(leaf, each), leaf, create_graph=True)
            total = total + inner(leaf - 0.1 * g, each)
    assert_close(found, torch.autograd.grad(total, leaf)[0], rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- the mode itself


def test_the_mode_is_there_only_inside_transforms() -> None:
    seen: list[tuple[bool, int, int]] = []

    def look(x: Tensor) -> Tensor:
        before = torch._C._len_torch_function_stack()
        with rules_here():
            inside = torch._C._len_torch_function_stack()
            with rules("gradients"):  # never twice
                seen.append((transforming(), inside - before, torch._C._len_torch_function_stack() - before))
        return x.sum()

    look(torch.ones(3))
    vmap(look)(torch.ones(2, 3))
    grad(look)(torch.ones(3))
    assert seen == [(False, 0, 1), (True, 1, 1), (True, 1, 1)]
    assert torch._C._len_torch_function_stack() == 0


def test_the_mode_ends_where_forward_raises() -> None:
    def fails(x: Tensor) -> Tensor:
        with rules_here():
            raise KeyError

    with pytest.raises(KeyError):
        vmap(fails)(torch.ones(2))
    assert torch._C._len_torch_function_stack() == 0


def test_other_functions_pass_through() -> None:
    with Rules("gradients"):
        assert F.group_norm(torch.ones(1, 2, 2), 1).shape == (1, 2, 2)
        assert torch.ones(2).add_(1).tolist() == [2.0, 2.0]


def test_a_one_per_task_carries_every_level() -> None:
    def look(x: Tensor, y: Tensor) -> Tensor:
        one = per_task_one([x, y])
        assert one is not None
        return torch.ones(3) * one

    out = vmap(vmap(look, in_dims=(None, 0)), in_dims=(0, None))(torch.ones(2), torch.ones(4))
    assert torch.equal(out, torch.ones(2, 4, 3))
    assert per_task_one([torch.ones(2)]) is None
    assert vmap(grad(lambda x: (look(x, x) * x).sum()))(torch.ones(5)).tolist() == [3.0] * 5
