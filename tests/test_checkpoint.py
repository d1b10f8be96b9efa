"""`Unroll(checkpoint_every=...)`: the numbers of `Unroll()` in less memory, or an error."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loops import LOOPS, Run, of, quartic
from problems import assert_close, fresh
from torch import Tensor, nn

from statelessify import Unroll, adapt, adapt_tasks, optim, over_tasks
from statelessify.errors import CheckpointError, DerivativeError, HyperparameterError

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 1e-12
ALL = pytest.mark.parametrize("loop", LOOPS)
SMOOTH = [name for name in LOOPS if name not in ("adafactor", "conv", "lstm", "attention")]
EVERY = pytest.mark.parametrize("every", [1, 2, 5, "auto"])


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in inputs]


def grads(value: Tensor, leaves: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **options)


def curvature(run: Run, mode: Any, leaves: list[Tensor]) -> Tensor:
    found = grads(run(mode, *leaves), leaves, create_graph=True)
    return torch.stack([torch.sin(g).sum() for g in found]).sum()


# The numbers of `Unroll()` -----------------------------------------------------------------------------------------


@ALL
def test_backward(loop: str) -> None:
    run, inputs = LOOPS[loop]()
    leaves = leaves_of(inputs)
    value = run(Unroll(), *leaves)
    expected = grads(value, leaves)
    for every in (1, 2, 3, 5, "auto"):
        again = run(Unroll(checkpoint_every=every), *leaves)
        assert_close(again, value, TOLERANCE)
        again.backward(retain_graph=True)
        found = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        assert_close(tuple(found), expected, TOLERANCE)
        some = leaves[1:]  # no gradient to the start
        assert_close(grads(again, some), expected[1:], TOLERANCE)
        constant = [leaves[0].detach(), *some]
        assert_close(grads(run(Unroll(checkpoint_every=every), *constant), some), expected[1:], TOLERANCE)
        for leaf in leaves:
            leaf.grad = None


@ALL
def test_functional_gradients(loop: str) -> None:
    run, inputs = LOOPS[loop]()
    numbers = tuple(range(len(inputs)))
    leaves = leaves_of(inputs)
    expected = grads(run(Unroll(), *leaves), leaves)
    mode = Unroll(checkpoint_every=2)
    take = torch.func.grad(lambda *each: run(mode, *each), numbers)
    assert_close(take(*inputs), expected, 1e-10)
    with_outer = torch.func.grad(lambda first: run(mode, first, *leaves[1:]))(inputs[0])
    assert_close(with_outer.detach(), expected[0], 1e-10)
    back = torch.func.vjp(lambda *each: run(mode, *each), *inputs)[1]
    assert_close(back(torch.ones(())), expected, 1e-10)
    if "noise" in loop or loop in ("conv", "attention"):  # vmap wants to know whether masks differ
        return
    assert_close(torch.func.jacrev(lambda *each: run(mode, *each), numbers)(*inputs), expected, 1e-10)
    two = [torch.stack([value, value * 0.9]) for value in inputs]
    mapped = torch.vmap(take, randomness="same")(*two)
    assert_close(tuple(g[0] for g in mapped), expected, 1e-10)
    summed = torch.func.grad(lambda *each: torch.vmap(lambda *one: run(mode, *one))(*each).sum(), numbers)(*two)
    assert_close(summed, mapped, 1e-10)


@pytest.mark.parametrize("loop", SMOOTH)
def test_second_derivatives(loop: str) -> None:
    run, inputs = LOOPS[loop]()
    leaves, mode = leaves_of(inputs), Unroll(checkpoint_every=2)
    expected = grads(curvature(run, Unroll(), leaves), leaves)
    assert_close(grads(curvature(run, mode, leaves), leaves), expected, 1e-10)
    numbers = tuple(range(len(inputs)))

    def functional(*each: Tensor) -> Tensor:
        found = torch.func.grad(lambda *inner: run(mode, *inner), numbers)(*each)
        return torch.stack([torch.sin(g).sum() for g in found]).sum()

    assert_close(torch.func.grad(functional, numbers)(*inputs), expected, 1e-10)


@EVERY
def test_third_derivatives_and_finite_differences(every: Any) -> None:
    run, inputs = LOOPS["carried"]()
    leaves, mode = leaves_of(inputs), Unroll(checkpoint_every=every)
    third = [curvature(lambda _, *each: curvature(run, m, list(each)), m, leaves) for m in (Unroll(), mode)]  # noqa: B023
    assert_close(grads(third[1], leaves), grads(third[0], leaves), 1e-10)
    assert torch.autograd.gradcheck(lambda *each: run(mode, *each), leaves)
    assert torch.autograd.gradgradcheck(lambda *each: run(mode, *each), leaves)


@given(
    seed=st.integers(0, 2**31 - 1),
    steps=st.integers(0, 6),
    every=st.integers(1, 7) | st.just("auto"),
    rule=st.sampled_from([optim.sgd, optim.adam, optim.rmsprop, optim.adamax, optim.nadam]),
    count=st.integers(1, 3),
)
def test_any_steps_blocks_and_rules(seed: int, steps: int, every: Any, rule: Any, count: int) -> None:
    torch.manual_seed(seed)
    params, batches = fresh({"w": torch.randn(2)}), torch.randn(count, 2, requires_grad=True)
    lr, seen = torch.tensor(0.05, requires_grad=True), []

    def batch_at(step: int, current: Any) -> Tensor:
        assert not current["w"].requires_grad
        seen.append(step)
        return batches * (step + torch.rand(()))

    def run(mode: Any) -> tuple[Tensor, Any]:
        torch.manual_seed(seed)
        options: Any = {"optimizer": rule(lr=lr), "steps": steps, "gradient": mode}
        many = (
            adapt_tasks(lambda p, b: F.dropout((p["w"] - b) ** 2).sum(), params, batch_at, **options) if steps else None
        )
        one = adapt(lambda p, b: F.dropout((p["w"] - b[0]) ** 2).sum(), params, batch_at, **options)
        value = one.params["w"].sum() + (0 if many is None else (many.params["w"] ** 2).sum() + many.losses.sum())
        return value, (one, many, torch.rand(()))

    inputs = [params["w"], batches, lr]
    value, expected = run(Unroll())
    again, found = run(Unroll(checkpoint_every=every))
    assert_close(found, expected, TOLERANCE)
    assert_close(grads(again, inputs), grads(value, inputs), 1e-10)
    assert seen == list(range(steps)) * 4


@pytest.mark.parametrize("outer", ["over_tasks", "vmap"])
def test_a_meta_loss_over_tasks_that_closes_over_each_tasks_data(outer: str) -> None:
    """The pullback runs when that vmap is over, and below other transforms than it was made in."""
    w, xs = torch.rand(3), torch.rand(4, 3)
    by: Any = over_tasks if outer == "over_tasks" else lambda fn: torch.vmap(fn, (None, 0))

    def losses(mode: Any) -> Any:
        return by(lambda w, x: of(lambda p, b: quartic(p * x, b), w, torch.ones(3), mode))

    exact, mode = losses(Unroll()), losses(Unroll(checkpoint_every=2))
    jacobian = torch.func.jacrev(exact)(w, xs)
    assert_close(torch.func.jacrev(mode)(w, xs), jacobian)
    pullback = torch.func.vjp(lambda w: mode(w, xs), w)[1]
    assert_close(pullback(torch.ones(4))[0], jacobian.sum(0))
    assert_close(torch.vmap(torch.vmap(pullback))(torch.ones(4, 4, 4))[0], jacobian.sum(0).expand(4, 4, 3))
    hessian = torch.func.jacrev(torch.func.jacrev(lambda w: exact(w, xs).sum()))(w)
    assert_close(torch.func.jacrev(torch.func.grad(lambda w: mode(w, xs).sum()))(w), hessian)
    leaf = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(mode(leaf, xs).sum(), leaf, create_graph=True)
    assert_close(torch.autograd.grad(g.sum(), leaf)[0], hessian.sum(0))


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
    for take in (lambda: run(*leaves_of(list(inputs))), lambda: torch.func.grad(run, 1)(*inputs)):
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
        return g * (scale if change == "transform" else 1.0) * noise / factor

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


# Memory ------------------------------------------------------------------------------------------------------------


def run_of_tanh(steps: int, mode: Any, alive: list[Any], most: list[int]) -> Tensor:
    def loss(p: Tensor, b: Tensor) -> Tensor:
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        alive.append(weakref.ref((hidden := torch.tanh(p * b)).untyped_storage()))
        return (hidden**2).sum()

    options: Any = {"optimizer": optim.adam(lr=0.1), "steps": steps, "gradient": mode}
    return adapt(loss, torch.ones(50, requires_grad=True), torch.ones(50), **options).params.sum()


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(("every", "blocks", "bound"), [(1, 16, 2), (3, 6, 4), ("auto", 4, 5), (None, 0, None)])
def test_a_graph_holds_one_block_at_a_time_and_is_freed(every: Any, blocks: int, bound: int | None) -> None:
    gc.collect()
    gc.disable()
    try:
        saved, alive, most = list[Any](), list[Any](), [0]

        def pack(t: Tensor) -> Held:
            saved.append(weakref.ref(held := Held(t)))
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            value = run_of_tanh(16, Unroll(checkpoint_every=every), alive, most)
        held = [each.tensor for ref in saved if (each := ref()) is not None]
        big = {t.untyped_storage().data_ptr() for t in held if t.numel() >= 50}
        assert len(big) > 30 if every is None else len(big) <= 3 * blocks + 2  # states, and the batch
        del held
        value.backward()
        if bound is not None:
            assert most[0] <= bound
            assert len(alive) == 32
        del value
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()
