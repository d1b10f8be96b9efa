"""`Unroll(truncate=...)`: the last steps, with the identity before them; and what is warned of. `FirstOrder()` too."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import LOOPS, of, quartic
from problems import IGNORE_SCRIPT, assert_close, fresh, recurrent
from torch import Tensor

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks
from statelessify.errors import HyperparameterError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.(FirstOrder|Unroll.truncate=.*) (takes|passes):UserWarning"),  # tested below
]
RULES = {
    "sgd": lambda lr: optim.sgd(lr=lr, momentum=0.9),
    "adam": lambda lr: optim.adam(lr=lr, eps=0.1),
}


def grads(value: Tensor, leaves: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **options)


def summary(adapted: Any) -> Tensor:
    return (adapted.params["w"] ** 3).sum() + adapted.carry.sum() + adapted.losses[..., -1].sum()


def inner(closed: Tensor) -> Any:
    def loss(p: Any, h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        value, h = recurrent(p, h, b)
        return value + quartic(p["w"], closed), h

    return loss


MAPPED: dict[str, Any] = {
    "asgd": lambda lr: optim.asgd(lr=lr, lambd=0.1),
    "nadam": lambda lr: optim.nadam(lr=lr, eps=0.1),
    "adafactor": lambda lr: optim.adafactor(lr=lr),
    "dict": lambda lr: optim.nadam(lr={"w": lr}, eps=0.1),
    "own": lambda lr: optim.sgd(lr=lr, momentum=0.9)._replace(elementwise=False),
}


@pytest.mark.parametrize("backend", ["vmap", "loop"])
@pytest.mark.parametrize("rule", MAPPED)
def test_hyperparameters_of_steps_that_are_mapped_over_tasks(rule: str, backend: Any) -> None:
    w, batches = torch.rand(3), torch.rand(4, 3)
    found: list[Tensor] = []
    for tasks in (True, False):
        lr = torch.tensor(0.05, requires_grad=True)
        options: Any = {"optimizer": MAPPED[rule](lr), "steps": 3, "gradient": Unroll(truncate=2)}
        loss = lambda p, b: quartic(p["w"], b)
        if tasks:
            params = adapt_tasks(loss, {"w": w}, batches, backend=backend, **options).params["w"]
        else:
            params = torch.stack([adapt(loss, {"w": w}, batch, **options).params["w"] for batch in batches])
        found += grads((params**3).sum(), [lr])
    assert float(found[0]) != 0
    assert_close(*found)


@given(
    seed=st.integers(0, 2**31 - 1),
    steps=st.integers(1, 5),
    data=st.data(),
    rule=st.sampled_from(sorted(RULES)),
    every=st.none() | st.integers(1, 3) | st.just("auto"),
    tasks=st.booleans(),
)
def test_the_last_steps_with_the_identity_before_them(
    seed: int, steps: int, data: Any, rule: str, every: Any, tasks: bool
) -> None:
    torch.manual_seed(seed)
    k, seen = data.draw(st.integers(1, steps)), list[int]()
    w, hidden, batches, closed = torch.randn(4, 2, 3)[:, 0].requires_grad_().unbind()
    leaves = [t.detach().requires_grad_() for t in (w, hidden, batches, closed, torch.tensor(0.05))]
    w, hidden, batches, closed, lr = leaves
    optimizer = RULES[rule](lr)

    def batch_at(start: int) -> Any:
        def at(step: int, params: Any) -> Tensor:
            assert not params["w"].requires_grad
            seen.append(start + step)
            one = batches * (start + step + 1)
            return torch.stack([one, -one]) if tasks else one

        return at

    def run(params: Any, carry: Tensor, steps: int, start: int = 0, state: Any = None, mode: Any = None) -> Any:
        options: Any = {"optimizer": optimizer, "steps": steps, "carry": carry, "opt_state": state}
        options["gradient"] = Unroll() if mode is None else mode
        if tasks:
            dims: Any = (0, 0) if start else (None, 0)
            return adapt_tasks(inner(closed), params, batch_at(start), in_dims=dims, **options)
        return adapt(inner(closed), params, batch_at(start), **options)

    found = run({"w": w}, hidden, steps, mode=Unroll(truncate=k, checkpoint_every=every))
    assert seen == list(range(steps))
    first = steps - k
    if first:
        with torch.no_grad():
            begun = run({"w": w}, hidden, first)
        size = begun.params["w"].shape
        rejoined = {"w": begun.params["w"] + (w - w.detach()).expand(size)}
        state = begun.opt_state._replace(hyperparameters=optimizer.init({"w": w}).hyperparameters)
        if tasks:
            rates = {n: v.expand(2) if isinstance(v, Tensor) else v for n, v in state.hyperparameters.items()}
            state = state._replace(hyperparameters=rates)
        expected = run(rejoined, begun.carry, k, first, state)
        assert_close(found.losses[..., :first].detach(), begun.losses)
        assert_close(found.losses[..., first:].detach(), expected.losses.detach())
    else:
        expected = run({"w": w}, hidden, k)
    assert_close(found.params, expected.params)
    ours, theirs = grads(summary(found), leaves), grads(summary(expected), leaves)
    assert_close(ours, theirs, 1e-9)
    assert (
        torch.autograd.grad(run({"w": w}, hidden, steps, mode=Unroll(truncate=k)).params["w"].sum(), w)[0] is not None
    )


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("every", [None, 1, 2])
def test_all_steps_cut_nothing_and_transforms_agree(loop: str, every: Any) -> None:
    run, inputs = LOOPS[loop]()
    steps = 2 if loop in ("conv", "lstm", "attention", "warm") else 3
    leaves = [value.clone().requires_grad_() for value in inputs]
    whole = Unroll(truncate=steps, checkpoint_every=every)
    assert_close(grads(run(whole, *leaves), leaves), grads(run(Unroll(), *leaves), leaves), 1e-10)
    last = Unroll(truncate=1, checkpoint_every=every)
    expected = grads(run(Unroll(truncate=1), *leaves), leaves)
    assert_close(grads(run(last, *leaves), leaves), expected, 1e-10)
    found = torch.func.grad(lambda *each: run(last, *each), tuple(range(len(inputs))))(*inputs)
    assert_close(found, expected, 1e-10)


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_under_vmap_forward_mode_and_for_second_derivatives() -> None:
    mode = Unroll(truncate=2)
    fn = lambda w, z: of(lambda p, b: quartic(p * z, b), w, torch.ones(3), mode, steps=4)
    w, z, t = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True), torch.rand(3)
    by_w, by_z = grads(fn(w, z), [w, z], create_graph=True)
    plain = w.detach(), z.detach()
    assert_close(torch.func.jvp(fn, plain, (t, t))[1], (by_w @ t + by_z @ t).detach())
    second = torch.func.jacrev(torch.func.jacrev(fn))(*plain)
    assert_close(torch.stack([grads(g, w, retain_graph=True)[0] for g in by_w]), second)
    points = torch.stack([plain[0], plain[0] / 2])
    each = torch.stack([torch.func.grad(fn)(p, plain[1]) for p in points])
    assert_close(torch.vmap(torch.func.grad(fn), (0, None))(points, plain[1]), each)
    mapped = torch.func.grad(lambda p: over_tasks(fn, in_dims=(0, None))(p, plain[1]).sum())(points)
    assert_close(mapped, each)
    # The derivative of the truncated loop is that of its last steps, as a function of where these begin.
    checked = lambda p: of(lambda q, b: quartic(q * plain[1], b), p, torch.ones(3), Unroll(truncate=3))
    assert torch.autograd.gradcheck(checked, w)


@pytest.mark.parametrize("bad", [0, -1, True, 1.0, "auto"])
def test_bad_numbers(bad: Any) -> None:
    with pytest.raises(HyperparameterError, match="truncate"):
        Unroll(truncate=bad)


def test_more_than_the_steps_is_an_error() -> None:
    with pytest.raises(HyperparameterError, match="2 steps"):
        of(quartic, torch.ones(3), torch.ones(3), Unroll(truncate=3), steps=2)
    with pytest.raises(HyperparameterError, match="2 steps"):
        adapt_tasks(
            quartic, torch.ones(3), torch.ones(2, 3), optimizer=optim.sgd(0.1), steps=2, gradient=Unroll(None, 3)
        )


# What is lost is named ---------------------------------------------------------------------------------------------


def test_what_early_steps_alone_read_is_named_once() -> None:
    w, early = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    momentum, closed = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    optimizer = optim.sgd(lr=0.1, momentum=0.9)
    state = optimizer.init(w)
    state = adapt(quartic, w, torch.ones(3), optimizer=optimizer, steps=1).opt_state
    warm = torch.utils._pytree.tree_map(lambda t: momentum if t.shape == (3,) else t, state.slots)
    calls: list[int] = []

    def loss(p: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return quartic(p, b * (closed if len(calls) == 1 else 1.0))

    options: Any = {"optimizer": optimizer, "steps": 3, "gradient": Unroll(truncate=1)}
    options["opt_state"] = state._replace(slots=warm)
    batch_at = lambda step, params: early if step == 0 else torch.ones(3)
    with pytest.warns(UserWarning, match=r"truncate=1.*passes no gradient") as caught:
        adapt(loss, w, batch_at, **options)
    text = str(caught[0].message)
    assert "`opt_state." in text
    assert "`batch of an earlier step`" in text
    assert "closed-over" in text
    assert "`params" not in text
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(loss, w, batch_at, **options)


READS = ["z", "z.detach()", "z.data", "torch.ones(z.shape)", "z.size(0)", "torch.ones_like(z)", "len(z)", "z.ndim"]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("every", [None, 1])
def test_nothing_is_named_that_is_reached_or_needs_no_gradient(read: str, every: Any) -> None:
    z, w, lr = (
        torch.rand(3, requires_grad=True),
        torch.rand(3, requires_grad=True),
        torch.tensor(0.1, requires_grad=True),
    )
    value = eval(f"lambda z: {read}", {"torch": torch})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(lambda p, b: quartic(p * value(z), b * z.detach()), w, w, Unroll(every, truncate=1), lr=lr)


def test_nothing_is_recorded_without_gradients() -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        w = torch.rand(3, requires_grad=True)
        options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3}
        for mode in (Unroll(truncate=1), Unroll(checkpoint_every=2), Unroll("auto", 2)):
            found = adapt(quartic, w, torch.ones(3), gradient=mode, **options)
            assert found.params.grad_fn is None
            assert_close(found.params, adapt(quartic, w, torch.ones(3), **options).params)


# First order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tasks", [False, True])
def test_first_order_is_the_loop_with_inner_gradients_detached(rule: str, tasks: bool) -> None:
    w, lr = torch.rand(3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    batches, optimizer = torch.rand(2, 3), RULES[rule](lr)

    def by_hand(batch: Tensor) -> Tensor:
        params, state = w * 1, optimizer.init(w * 1)
        for _ in range(3):
            g = torch.autograd.grad(quartic(here := params.detach().requires_grad_(), batch), here)[0]
            params, state = optimizer.step(params, g, state)
        return (params**3).sum()

    options: Any = {"optimizer": optimizer, "steps": 3, "gradient": FirstOrder()}
    if tasks:
        found = (adapt_tasks(quartic, w, batches, **options).params ** 3).sum()
        expected = by_hand(batches[0]) + by_hand(batches[1])
    else:
        found, expected = (adapt(quartic, w, batches[0], **options).params ** 3).sum(), by_hand(batches[0])
    assert_close(grads(found, [w, lr]), grads(expected, [w, lr]))
    assert fresh({"w": w})["w"].is_leaf
