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
from torch import Tensor

from statelessify import Unroll, adapt, adapt_tasks, optim, over_tasks, stateless
from statelessify._attach import vjp

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


def test_results_are_let_go_before_their_gradient_is_taken() -> None:
    results = list[weakref.ref[Tensor]]()

    def double(tensors: list[Tensor]) -> list[Tensor]:
        out = tensors[0] * 2
        results.append(weakref.ref(out))
        return [out, tensors[0]]

    pull = vjp(double, [torch.ones(3)], [True], once=True)[1]
    assert results[0]() is None
    assert pull([torch.ones(3), torch.ones(3)])[0].tolist() == [3.0, 3.0, 3.0]


# What a carry requires ---------------------------------------------------------------------------------------------


def norm_carry() -> tuple[Any, Any, Any]:
    """Running statistics: new at every step, and never in need of a gradient."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    apply, params, buffers = stateless(module)

    def loss(params: Any, carry: Any, batch: Any) -> tuple[Tensor, Any]:
        out, carry = apply(params, carry, batch)
        return out.sin().mean(), carry

    return loss, fresh(params), buffers


def chained_carry() -> tuple[Any, Any, Any]:
    """A value that reaches the parameters' graph one link later at each step: only the third step's loss sees it."""

    def loss(params: Any, carry: Any, batch: Any) -> tuple[Tensor, Any]:
        value = ((params["w"] @ batch.mT).sin() * carry["last"]).mean()
        new = {"first": params["w"].sum(), "middle": carry["first"] * 2, "last": carry["middle"].cos(), "seen": batch}
        return value, new

    zero = torch.zeros(())
    return loss, {"w": torch.randn(2).requires_grad_()}, {"first": zero, "middle": zero, "last": zero, "seen": None}


def needing_carry() -> tuple[Any, Any, Any]:
    """A start that needs a gradient, beside one that does not."""

    def loss(params: Any, carry: Any, batch: Any) -> tuple[Tensor, Any]:
        value = ((params["w"] * carry["scale"]) @ batch.mT + carry["shift"]).sin().mean()
        return value, {"scale": carry["scale"] * 0.9, "shift": carry["shift"] + 1, "count": carry["count"] + 1}

    carry = {"scale": torch.rand(2).requires_grad_(), "shift": torch.zeros(()), "count": torch.tensor(0)}
    return loss, {"w": torch.randn(2).requires_grad_()}, carry


@EVERY
@pytest.mark.parametrize("problem", [norm_carry, chained_carry, needing_carry])
@pytest.mark.parametrize("constant", [False, True])
def test_a_carry_requires_what_it_would_without_checkpoints(problem: Any, every: Any, constant: bool) -> None:
    loss, params, carry = problem()
    if problem is chained_carry:
        carry["seen"] = torch.randn(4, 2)
    if constant:  # only the rate needs a gradient
        params = {name: value.detach() for name, value in params.items()}
    rate, batch = torch.tensor(0.1, requires_grad=True), torch.randn(4, 2)
    leaves = [t for t in [rate, *params.values(), *carry.values()] if t.requires_grad]
    options: Any = {"optimizer": optim.sgd(lr=rate, momentum=0.9), "carry": carry}

    def run(mode: Unroll, steps: int) -> tuple[dict[str, bool], Tensor]:
        found = adapt(loss, params, batch, steps=steps, gradient=mode, **options)
        value = loss(found.params, found.carry, batch)[0]  # in plain eager code, by the caller
        return {name: value.requires_grad for name, value in found.carry.items()}, value

    for steps in (1, 2, 3, 5):
        (expected, value), (flags, again) = run(Unroll(), steps), run(Unroll(checkpoint_every=every), steps)
        assert flags == expected
        assert_close(again, value, TOLERANCE)
        assert_close(grads(again, leaves), grads(value, leaves), TOLERANCE)


def test_gradients_that_are_rounding_alone_need_not_repeat() -> None:
    """With a graph weight norm rounds otherwise, and where a gradient is zero, Adam's averages are nothing else."""
    torch.manual_seed(0)
    net = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 1), dim=1)
    apply, params, buffers = stateless(net)
    x, y = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(2, 1)

    def value(mode: Any) -> Tensor:
        loss = lambda p, x: F.mse_loss(apply(p, buffers, x)[0], y)
        adapted = adapt(loss, params, x, optimizer=optim.adam(lr=0.5, eps=0.25), steps=2, gradient=mode)
        return loss(adapted.params, x)

    found, expected = (grads(value(mode), list(params.values())) for mode in (Unroll(checkpoint_every=1), Unroll()))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
