"""`Unroll(checkpoint_every=...)`: what the loss closes over is reached, and what has changed since is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import of, quartic
from problems import assert_close
from torch import Tensor, nn

from statelessify import Unroll, adapt, optim
from statelessify.errors import CheckpointError, DerivativeError, HyperparameterError

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 1e-12
EVERY = pytest.mark.parametrize("every", [1, 2, 5, "auto"])


def grads(value: Tensor, leaves: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **options)


# What the loss closes over -----------------------------------------------------------------------------------------


def test_a_plain_module_and_one_tensor_that_is_also_the_batch() -> None:
    judge = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).eval()
    target, w = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    leaves = [w, target, *judge.parameters()]
    loss = lambda p, b: (judge(p) - b * target).square().sum()
    expected = grads(of(loss, w, target, Unroll()), leaves)
    for every in (1, 2, 4):
        assert_close(grads(of(loss, w, target, Unroll(checkpoint_every=every)), leaves), expected, TOLERANCE)


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad * ctx.saved_tensors[0]


def test_an_autograd_function_is_right_or_an_error() -> None:
    w, z = torch.rand(2, 3).requires_grad_().unbind()
    mode = Unroll(checkpoint_every=2)
    inside = lambda p, b: quartic(p * Square.apply(b), torch.ones(3))
    assert_close(grads(of(inside, w, z, mode), [w, z]), grads(of(inside, w, z, Unroll()), [w, z]))
    for closed in (z, z * 2):
        outside = lambda p, b: quartic(p * Square.apply(closed), torch.ones(3))  # noqa: B023
        with pytest.raises(DerivativeError, match="pass the tensor in `batch`"):
            of(outside, w, None, mode).backward()


@pytest.mark.parametrize("kind", ["vmap", "grad"])
@pytest.mark.parametrize("read_before", [False, True])
def test_a_closed_over_tensor_that_the_loss_transforms_is_an_error(kind: str, read_before: bool) -> None:
    transforms: Any = {"vmap": torch.vmap(lambda z: z * 2), "grad": torch.func.grad(lambda z: (z**2).sum())}

    def run(w: Tensor, z: Tensor) -> Tensor:
        loss = lambda p, b: quartic(p * transforms[kind](z) + (z if read_before else 0), b)
        return of(loss, w, torch.ones(3), Unroll(checkpoint_every=2))

    inputs = torch.rand(2, 3).unbind()
    for take in (lambda: run(*(t.clone().requires_grad_() for t in inputs)), lambda: torch.func.grad(run, 1)(*inputs)):
        with pytest.raises(DerivativeError, match="in `batch`"):
            take()


# Errors, never another number --------------------------------------------------------------------------------------


CHANGES = [
    "loss",
    "small loss",
    "transform",
    "schedule",
    "batch",
    "module",
    "data",
    "leaf",
    "generator",
    "noisy update",
]


@EVERY
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_forward_and_backward_is_an_error(change: str, every: Any) -> None:
    scale, rate, batch = torch.rand(3), torch.tensor(0.05), torch.ones(3)
    judge, w = nn.Linear(3, 3), torch.rand(3, requires_grad=True)
    leaf, own = torch.rand(3, requires_grad=True), torch.Generator().manual_seed(0)
    factor = 1e-11 if change == "small loss" else 1.0

    def loss(p: Tensor, b: Tensor) -> Tensor:
        noise = torch.rand(3, generator=own) if change == "generator" else 1.0
        return factor * quartic(judge(p * leaf) * noise * (scale if "loss" in change else 1.0), b)

    def transform(g: Tensor) -> Tensor:
        noise = torch.rand(3, generator=own) if change == "noisy update" else 1.0
        return g * (scale if change == "transform" else 1.0) * noise

    value = of(loss, w, batch, Unroll(checkpoint_every=every), lr=lambda step: rate, grad_transform=transform)
    with torch.no_grad():
        rate.mul_(2 if change == "schedule" else 1)
        for changed in {"batch": [batch], "module": judge.parameters(), "leaf": [leaf]}.get(change, [scale]):
            changed.mul_(1.5)
        judge.weight.data *= 1.5 if change == "data" else 1.0
    with pytest.raises(RuntimeError) as error:
        value.backward()
    assert isinstance(error.value, CheckpointError) or "modified by an inplace operation" in str(error.value)


def test_one_buffer_that_each_batch_is_written_into_is_an_error() -> None:
    buffer, w = torch.zeros(3), torch.rand(3, requires_grad=True)
    for every in (1, 2, 4):
        value = of(quartic, w, lambda step, params: buffer.fill_(step + 1), Unroll(checkpoint_every=every))
        with pytest.raises(RuntimeError):
            value.backward()


def test_results_may_be_changed_in_place_and_backward_may_leave_autocast() -> None:
    w, x = torch.randn(3, 1, requires_grad=True), torch.randn(5, 3)
    found = []
    for mode in (Unroll(), Unroll(checkpoint_every=2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapted = adapt(
                lambda p, b: (b.float() @ p.float()).double().square().sum(),
                w,
                x,
                optimizer=optim.sgd(0.01),
                steps=3,
                gradient=mode,
            )
        value = (adapted.params * 1).sum()
        adapted.params.detach().zero_()
        found.append(grads(value, [w]))
    assert_close(found[1], found[0], TOLERANCE)


@pytest.mark.parametrize("bad", [0, -1, True, 1.0, "all"])
def test_bad_numbers(bad: Any) -> None:
    with pytest.raises(HyperparameterError, match="checkpoint_every"):
        Unroll(checkpoint_every=bad)
