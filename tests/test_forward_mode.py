"""`ForwardMode()`: the numbers of `Unroll()` for a few numbers that need a gradient, in the memory of one step."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import LOOPS, of, quartic
from problems import assert_close
from torch import Tensor

from statelessify import ForwardMode, Unroll, adapt, adapt_tasks, optim, over_tasks
from statelessify.errors import CheckpointError, DerivativeError, DtypeError, HyperparameterError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
UNABLE = ["conv", "lstm", "attention", "tree"]  # kernels without a forward derivative; complex parameters


def grads(value: Tensor, leaves: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **options)


@pytest.mark.parametrize("loop", [name for name in LOOPS if name not in UNABLE])
def test_the_numbers_of_unroll(loop: str) -> None:
    run, inputs = LOOPS[loop]()
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = run(Unroll(), *leaves)
    expected, mode = grads(value, leaves), ForwardMode()
    found = run(mode, *leaves)
    assert_close(found, value)
    assert_close(grads(found, leaves), expected)
    some = [leaves[0].detach(), *leaves[1:]]
    assert_close(grads(run(mode, *some), leaves[1:]), expected[1:])
    numbers = tuple(range(len(inputs)))
    take = torch.func.grad(lambda *each: run(mode, *each), numbers)
    assert_close(take(*inputs), expected)
    if "noise" in loop or loop in ("adafactor", "tasks in a loop"):  # random numbers; too slow
        return
    two = [torch.stack([value, value * 0.9]) for value in inputs]
    mapped = torch.vmap(take)(*two)
    assert_close(tuple(g[0] for g in mapped), expected)
    summed = torch.func.grad(lambda *each: torch.vmap(lambda *one: run(mode, *one))(*each).sum(), numbers)(*two)
    assert_close(summed, mapped)


@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 4), steps=st.integers(0, 5))
def test_closed_form_of_a_quadratic(seed: int, size: int, steps: int) -> None:
    torch.manual_seed(seed)
    root, start, query = torch.randn(size, size), torch.randn(size), torch.randn(size)
    hessian, lr = root @ root.T / size, torch.tensor(0.1, requires_grad=True)
    options: Any = {"optimizer": optim.sgd(lr=lr), "steps": steps, "gradient": ForwardMode()}
    adapted = adapt(lambda w, h: 0.5 * w @ h @ w, start, hessian, **options)
    contraction = torch.eye(size) - 0.1 * hessian
    powers = [torch.linalg.matrix_power(contraction, k) for k in range(steps + 1)]
    assert_close(adapted.params.detach(), powers[-1] @ start)
    if steps:
        by_lr = -steps * query @ hessian @ powers[-2] @ start
        assert_close(torch.autograd.grad(adapted.params @ query, lr, retain_graph=True)[0], by_lr)
        slopes = [-k * (p @ start) @ hessian @ hessian @ (powers[k - 1] @ start) for k, p in enumerate(powers[:-1])]
        assert_close(torch.autograd.grad(adapted.losses.sum(), lr)[0], torch.stack(slopes).sum())


@settings(max_examples=25)  # a pass for each of ten numbers in each step
@given(seed=st.integers(0, 2**31 - 1), steps=st.integers(1, 3), tasks=st.booleans(), adam=st.booleans())
def test_hyperparameters_wherever_they_stand(seed: int, steps: int, tasks: bool, adam: bool) -> None:
    """In the state, closed over, in the batch, in the carry, and first read at a later step."""
    torch.manual_seed(seed)
    inputs = [torch.rand(()) * 0.1, torch.rand(3), torch.rand(2, 1), torch.rand(()), torch.rand(3)]
    lr, decay, target, scale, late = leaves = [t.requires_grad_() for t in inputs]
    start = torch.randn(3)

    def loss(p: Tensor, s: Tensor, b: Any) -> tuple[Tensor, Tensor]:
        value = quartic(p, b["target"]) + (decay * p**2).sum() * s
        return (value + (late * torch.sin(p)).sum() if b["step"] else value), torch.tanh(s + p.mean())

    def run(mode: Any) -> Tensor:
        optimizer = optim.adam(lr=lr, eps=0.1) if adam else optim.sgd(lr=lr, momentum=scale * 0.5)
        options: Any = {"optimizer": optimizer, "steps": steps, "gradient": mode, "carry": scale}
        if tasks:
            at = lambda step, params: {"target": target * (step + 1), "step": step}
            found = adapt_tasks(loss, start, at, in_dims=(None, {"target": 0, "step": None}), **options)
        else:
            at = lambda step, params: {"target": target[0] * (step + 1), "step": step}
            found = adapt(loss, start, at, **options)
        return (found.params**3).sum() + (found.losses * torch.arange(1.0, steps + 1)).sum() + found.carry.sum()

    value, exact = run(ForwardMode()), run(Unroll())
    assert_close(value, exact)
    assert_close(grads(value, leaves), grads(exact, leaves))


def test_finite_differences_and_over_tasks() -> None:
    w, xs = torch.rand(3), torch.rand(4, 3)

    def meta(mode: Any) -> Any:
        return lambda lr, x: of(
            lambda p, b: quartic(p * x, b), w, torch.ones(3), mode, optimizer=optim.adam(lr=lr, eps=0.1)
        )

    lr = torch.tensor(0.1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: meta(ForwardMode())(r, xs[0]), lr)
    expected = torch.func.jacrev(over_tasks(meta(Unroll())))(lr.detach(), xs)
    mapped = over_tasks(meta(ForwardMode()))
    assert_close(torch.func.jacrev(mapped)(lr.detach(), xs), expected)
    assert_close(torch.func.grad(lambda r: mapped(r, xs).sum())(lr.detach()), expected.sum())
    assert_close(torch.autograd.grad(mapped(lr, xs).sum(), lr)[0], expected.sum())


def test_too_many_directions_and_second_derivatives_are_errors() -> None:
    w, lr = torch.rand(65, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(HyperparameterError, match="66"):
        of(quartic, w, torch.ones(65), ForwardMode(), lr=lr)
    of(quartic, w, torch.ones(65), ForwardMode(max_directions=66), lr=lr, steps=1)
    with pytest.raises(DtypeError, match="real numbers"):
        of(lambda p, b: (p * b).abs().sum(), w[:2] * 1j, torch.ones(2), ForwardMode())
    for bad in (0, -1, True, 1.0):
        with pytest.raises(HyperparameterError, match="max_directions"):
            of(quartic, w, torch.ones(65), ForwardMode(max_directions=bad))
    run = lambda r: of(quartic, torch.rand(3), torch.ones(3), ForwardMode(), lr=r)
    (g,) = torch.autograd.grad(run(lr), lr, create_graph=True)
    assert_close(g.detach(), g.detach())
    with pytest.raises(DerivativeError, match="no derivative"):
        torch.autograd.grad(g, lr)
    with pytest.raises(DerivativeError, match="no derivative"):
        torch.func.grad(torch.func.grad(run))(lr.detach())


@pytest.mark.parametrize("where", ["loss", "update"])
def test_random_numbers_of_the_users_own_generator_are_an_error(where: str) -> None:
    own, lr = torch.Generator().manual_seed(0), torch.tensor(0.1, requires_grad=True)
    noise = lambda here: torch.rand(3, generator=own) if here == where else 1.0
    loss = lambda p, b: quartic(p * noise("loss"), b)
    with pytest.raises(CheckpointError, match="generator of its own"):
        of(loss, torch.rand(3), torch.ones(3), ForwardMode(), lr=lr, grad_transform=lambda g: g * noise("update"))


def test_a_closed_over_tensor_that_the_loss_maps_is_an_error() -> None:
    z = torch.rand(3, requires_grad=True)
    loss = lambda p, b: quartic(torch.vmap(lambda each: each * 2)(z) * p, b)
    with pytest.raises(DerivativeError, match="in `batch`"):
        of(loss, torch.rand(3), torch.ones(3), ForwardMode())


@pytest.mark.parametrize("steps", [4, 32])
def test_memory_does_not_grow_with_the_steps(steps: int) -> None:
    alive, most = list[Any](), 0
    lr = torch.tensor(0.1, requires_grad=True)

    def loss(p: Tensor, b: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(hidden := torch.tanh(p * b)))
        return (hidden**2).sum()

    gc.collect()
    gc.disable()
    try:
        options: Any = {"optimizer": optim.adam(lr=lr), "steps": steps, "gradient": ForwardMode()}
        adapted = adapt(loss, torch.ones(50), torch.ones(50), **options)
        assert most <= 3
        kept = weakref.ref(adapted.params)
        adapted.params.sum().backward()
        del adapted
        assert kept() is None
    finally:
        gc.enable()
