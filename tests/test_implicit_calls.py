"""`Implicit` for many tasks, what it warns of, and what it refuses."""

from __future__ import annotations

import gc
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from problems import IGNORE_SCRIPT, assert_close, one_by_one
from torch import Tensor

from statelessify import Implicit, Unroll, _implicit, _lost, adapt, adapt_tasks, errors, implicit, optim, over_tasks

pytestmark = pytest.mark.usefixtures("float64")
NEAR = 1e-6
SGD = optim.sgd(lr=0.1)
OPTIONS: Any = {"optimizer": SGD, "steps": 250, "gradient": Implicit()}
UNROLLED: Any = {**OPTIONS, "gradient": Unroll()}


@pytest.fixture(autouse=True)
def _nothing_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each warning comes once in a process: which test sees it shall not depend on those before."""
    monkeypatch.setattr(_implicit, "_warned", set())
    monkeypatch.setattr(_lost, "_warned", set())


def problem(tasks: int = 4) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Initial parameters, data of each task, strengths that all tasks share."""
    start = {"w": torch.randn(3), "b": torch.randn(())}
    x = torch.linalg.qr(torch.randn(tasks, 6, 3))[0] * (1 + torch.rand(tasks, 1, 1))
    return start, (x, 3 * torch.randn(tasks, 6)), torch.rand(3)


def proximal(start: Any, strength: Tensor) -> Any:
    def loss(params: Any, batch: Any) -> Tensor:
        x, y = batch
        w, b = params["w"], params["b"]
        away = (strength.exp() * (w - start["w"]) ** 2).sum() + (b - start["b"]) ** 2
        return torch.nn.functional.softplus(x @ w + b - y).sum() + away / 2

    return loss


def weighted(params: Any, tasks: int) -> Tensor:
    """Each task counts in another way, and one not at all: no task may get the gradient of another."""
    weights = torch.arange(tasks, dtype=torch.float64) ** 2
    return (weights * (params["w"] ** 3).sum(1)).sum() + (weights * params["b"].sin()).sum()


def meta(way: Any, start: Any, strength: Tensor, batches: Any) -> tuple[Tensor, ...]:
    """The adapted parameters, and the meta-gradient by everything."""
    leaves = [t.clone().requires_grad_() for t in (*start.values(), strength, *batches)]
    start, strength, batches = dict(zip(start, leaves[:2], strict=True)), leaves[2], tuple(leaves[3:])
    params = way(proximal(start, strength), start, batches)
    return *params.values(), *torch.autograd.grad(weighted(params, len(params["w"])), leaves)


WAYS: dict[str, Any] = {
    "vmap": lambda loss, start, batches: adapt_tasks(loss, start, batches, backend="vmap", **OPTIONS).params,
    "loop": lambda loss, start, batches: adapt_tasks(loss, start, batches, backend="loop", **OPTIONS).params,
    "chunks": lambda loss, start, batches: adapt_tasks(loss, start, batches, chunk_size=3, **OPTIONS).params,
    "over_tasks": lambda loss, start, batches: over_tasks(
        lambda start, batch: adapt(loss, start, batch, **OPTIONS).params
    )(start, batches),
    "dense": lambda loss, start, batches: (
        adapt_tasks(loss, start, batches, **{**OPTIONS, "gradient": Implicit(implicit.dense)}).params
    ),
    "neumann": lambda loss, start, batches: (
        adapt_tasks(
            loss, start, batches, **{**OPTIONS, "gradient": Implicit(partial(implicit.neumann, step_size=0.1))}
        ).params
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("tasks", [1, 4])
def test_all_tasks_at_once_are_a_loop_of_adapt(way: Any, tasks: int) -> None:
    start, batches, strength = problem(tasks)
    alone = lambda loss, start, batches: one_by_one(loss, start, batches, **OPTIONS).params
    expected = meta(alone, start, strength, batches)
    assert_close(meta(way, start, strength, batches), expected, NEAR)
    unrolled = lambda loss, start, batches: one_by_one(loss, start, batches, **UNROLLED).params
    assert_close(expected, meta(unrolled, start, strength, batches), 1e-5)


def test_the_functional_style_and_second_derivatives() -> None:
    start, batches, strength = problem()

    def outer(start: Any, strength: Tensor, options: Any = OPTIONS) -> Tensor:
        return weighted(adapt_tasks(proximal(start, strength), start, batches, **options).params, 4)

    expected = torch.func.grad(partial(outer, options=UNROLLED), (0, 1))(start, strength)
    assert_close(torch.func.grad(outer, (0, 1))(start, strength), expected, 1e-5)
    curvature = torch.func.jacrev(torch.func.grad(partial(outer, start)))(strength)
    unrolled = torch.func.jacrev(torch.func.grad(partial(outer, start, options=UNROLLED)))(strength)
    assert_close(curvature, unrolled, 1e-4)
    assert_close(torch.autograd.functional.hessian(lambda s: outer(start, s), strength), curvature, NEAR)


def test_tasks_that_reach_the_minimum_at_other_times_and_one_with_no_cotangent() -> None:
    """The systems of the tasks need from one to many products, or none."""
    scales = torch.stack([torch.ones(3), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 3.0, 5.0])])
    targets = torch.randn(3, 3, requires_grad=True)
    loss = lambda w, batch: (batch[0] * (w - batch[1]) ** 2).sum() / 2
    w = adapt_tasks(loss, torch.zeros(3), (scales, targets), **OPTIONS).params
    cotangent = torch.tensor([[1.0, 2, 3], [1e-9, -3e-9, 2e-9], [0, 0, 0]])
    found = torch.autograd.grad((w * cotangent).sum(), targets)[0]
    torch.testing.assert_close(found, cotangent, rtol=NEAR, atol=0)


# What is recorded --------------------------------------------------------------------------------------------------


def test_nothing_is_recorded_where_nothing_is_needed() -> None:
    start, batches, strength = problem()
    learned = strength.clone().requires_grad_()
    with torch.no_grad():
        silent = adapt_tasks(proximal(start, learned), start, batches, **OPTIONS)
        one = adapt(proximal(start, learned), start, (batches[0][0], batches[1][0]), **OPTIONS)
    assert not any(t.requires_grad for t in (*silent.params.values(), *one.params.values()))
    plain = adapt_tasks(proximal(start, strength), start, batches, **OPTIONS)
    assert not any(t.requires_grad for t in plain.params.values())
    assert_close(plain, silent)
    recorded = adapt_tasks(proximal(start, learned), start, batches, **{**OPTIONS, "optimizer": optim.adam(lr=0.1)})
    rest = torch.utils._pytree.tree_leaves((recorded.opt_state, recorded.losses))
    assert not any(t.requires_grad for t in rest)
    assert_close(recorded.losses[:, 0], silent.losses[:, 0])


def test_memory_does_not_grow_with_the_steps() -> None:
    alive: list[Any] = []

    def loss(w: Tensor, target: Tensor) -> Tensor:
        alive.append(weakref.ref((away := w - target).untyped_storage()))
        return (away**2).sum()

    target = torch.ones(3, requires_grad=True)
    w = adapt(loss, torch.zeros(3), target, **OPTIONS).params
    gc.collect()
    assert len(alive) >= 250
    assert sum(ref() is not None for ref in alive) == 0
    w.sum().backward()
    assert_close(target.grad, torch.ones(3))


def test_no_steps_hand_on_the_start() -> None:
    start = torch.randn(3, requires_grad=True)
    none = adapt(lambda w, b: (w**2).sum(), start, None, optimizer=SGD, steps=0, gradient=Implicit())
    assert_close(torch.autograd.grad(none.params.sum(), start)[0], torch.ones(3))


# Warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("kind", ["linear", "no minimum", "few steps", "divergence", "one of many"])
def test_a_point_that_is_not_stationary(kind: str, many: bool) -> None:
    target = torch.zeros(2, requires_grad=True)
    losses: Any = {
        "linear": lambda w, b: (w * (1 + b)).sum(),
        "no minimum": lambda w, b: (-w).exp().sum() + b.sum(),
        "few steps": lambda w, b: ((w - b) ** 2).sum() / 2,
        "divergence": lambda w, b: ((w - b) ** 4).sum(),
        "one of many": lambda w, b: (0.5 + b.sum()) * (w**2).sum() / 2,
    }
    steps = {"linear": 50, "no minimum": 10, "few steps": 5, "divergence": 60, "one of many": 50}[kind]
    loss, start = losses[kind], torch.full((2,), 5.0 if kind == "divergence" else 1.0)
    options: Any = {"optimizer": SGD, "steps": steps, "gradient": Implicit()}
    if kind == "one of many":
        targets = torch.tensor([[0.0, 0.0], [0.0, -0.49]], requires_grad=True)
        run = lambda: adapt_tasks(loss, start, targets, **options)
    elif many:
        run = lambda: adapt_tasks(loss, start, target.expand(3, 2), **options)
    else:
        run = lambda: adapt(loss, start, target, **options)
    ratio = "5.9e-01" if kind == "few steps" else ""  # 0.9 ** 5
    with pytest.warns(
        errors.StationaryPointWarning, match=f"stationary point of the loss.* {ratio}.* that at the start"
    ):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()  # once for each loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_warning_where_it_has_converged(dtype: torch.dtype, scale: float) -> None:
    """Nor where it has begun there, or where rounding is all that is left."""
    target = torch.randn(4, dtype=dtype, requires_grad=True)
    loss = lambda w, b: scale * ((w - b) ** 2).sum() / 2
    options: Any = {"optimizer": optim.sgd(lr=0.1 / scale), "steps": 200, "gradient": Implicit()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = adapt(loss, torch.zeros(4, dtype=dtype), target, **options).params
        again = adapt(loss, w.detach(), target, **options).params
        adapt_tasks(loss, w.detach(), target.expand(3, 4), **options)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), target)[0], torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_what_gets_no_gradient_is_named_once(many: bool) -> None:
    start, lr = torch.randn(3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    early, last = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    loss = lambda w, b: ((w - b) ** 2).sum() / 2
    run = partial(adapt_tasks if many else adapt, loss, start)
    batch = lambda step, params: (early, last)[step > 10] if many else (early, last)[step > 10][0]
    options: Any = {"optimizer": optim.sgd(lr=lr), "steps": 250, "gradient": Implicit()}
    with pytest.warns(UserWarning, match="passes no gradient") as said:
        w = run(batch, **options).params
    assert len(said) == 1
    text = str(said[0].message)
    for name in ("`params`", ".lr`", "of an earlier step`"):
        assert name in text
    assert "`batch`" not in text
    found = torch.autograd.grad(w.sum(), (start, lr, last), allow_unused=True)
    assert found[:2] == (None, None)
    assert found[2].sum() == w.numel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch, **options)


# Refusals ----------------------------------------------------------------------------------------------------------

LOSS = lambda w, b: ((w - b) ** 2).sum() / 2
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weight decay": ({"optimizer": optim.sgd(lr=0.1, weight_decay=0.1)}, "`weight_decay` rests elsewhere"),
    "learned decay": ({"optimizer": optim.adamw(weight_decay=torch.tensor(0.1))}, "`weight_decay` rests elsewhere"),
    "asgd": ({"optimizer": optim.asgd(lr=0.1)}, "`lambd` rests elsewhere"),
    "transform": ({"grad_transform": lambda grads: grads}, "`grad_transform`"),
    "solve": ({"gradient": Implicit("cg")}, "`solve='cg'`"),
    "solve None": ({"gradient": Implicit(None)}, "`solve=None`"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(given: dict[str, Any], message: str) -> None:
    target = torch.ones(2, 3, requires_grad=True)
    for run in (
        lambda: adapt(LOSS, torch.zeros(3), target[0], **{**OPTIONS, **given}),
        lambda: adapt_tasks(LOSS, torch.zeros(3), target, **{**OPTIONS, **given}),
    ):
        with pytest.raises(errors.DerivativeError, match=message):
            run()


def test_a_decay_of_zero_is_none() -> None:
    target = torch.ones(3, requires_grad=True)
    for optimizer in (optim.sgd(lr=0.1, weight_decay=0), optim.asgd(lr=0.1, lambd=0)):
        w = adapt(LOSS, torch.zeros(3), target, **{**OPTIONS, "optimizer": optimizer}).params
        assert_close(torch.autograd.grad(w.sum(), target)[0], torch.ones(3), NEAR)


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_an_optimizer_of_ones_own_without_hyperparameters(many: bool) -> None:
    own = optim.Optimizer(lambda params: (), lambda params, grads, state: (params - 0.1 * grads, state))
    target = torch.randn(2, 3, requires_grad=True)
    run: Any = adapt_tasks if many else adapt
    w = run(LOSS, torch.zeros(3), target if many else target[0], **{**OPTIONS, "optimizer": own}).params
    wanted = torch.ones(2, 3) if many else torch.tensor([[1.0] * 3, [0.0] * 3])
    assert_close(torch.autograd.grad(w.sum(), target)[0], wanted, NEAR)


def test_a_system_that_cannot_be_solved() -> None:
    """A saddle that the loop rests at, and a solve that is cut off: errors in the backward pass."""
    target = torch.ones(3, requires_grad=True)
    saddle = lambda w, b: (b * w[:3] ** 2).sum() / 2 - (b * w[3:] ** 2).sum() / 2
    w = adapt(saddle, torch.zeros(6), target, **OPTIONS).params
    with pytest.raises(errors.ConvergenceError, match="curvature -1"):
        w[3:].sum().backward()
    weights = torch.arange(1.0, 4)
    cut = {**OPTIONS, "gradient": Implicit(partial(implicit.cg, maxiter=1))}
    for run in (
        lambda: adapt(lambda w, b: (weights * (w - b) ** 2).sum() / 2, torch.zeros(3), target, **cut),
        lambda: adapt_tasks(
            lambda w, b: (weights * (w - b) ** 2).sum() / 2, torch.zeros(3), target.expand(2, 3), **cut
        ),
    ):
        found = run().params
        with pytest.raises(errors.ConvergenceError, match=r"relative residual is \d\.\d\de-01 after 1 products"):
            found.sum().backward()


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_contexts_that_it_refuses() -> None:
    run = lambda target: adapt(LOSS, torch.zeros(3), target, **OPTIONS).params.sum()
    with pytest.raises(errors.DerivativeError, match="forward derivative"):
        torch.func.jvp(run, (torch.ones(3),), (torch.ones(3),))
    with pytest.raises(errors.DerivativeError, match="forward derivative"):
        torch.func.hessian(run)(torch.ones(3))
    with pytest.raises(Exception, match=r"does not run while torch\.compile traces"):
        torch.compile(run, backend="eager", fullgraph=True)(torch.ones(3, requires_grad=True))
