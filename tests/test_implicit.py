"""`Implicit`: the meta-gradient at the minimum, against closed forms, against the unrolled loop, and its refusals."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import IGNORE_SCRIPT, assert_close
from torch import Tensor, nn

from statelessify import (
    ForwardMode,
    Implicit,
    Unroll,
    adapt,
    adapt_tasks,
    implicit,
    optim,
    stateless,
)

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = st.integers(0, 2**31 - 1)
NEAR = 1e-6  # what so many steps come to: the minimum, and the unrolled gradient there
STEPS = 400
SGD = optim.sgd(lr=0.1)


def own_solve(matvec: Any, b: Any) -> Any:
    """A user's own, on a dict of one leaf: fixed-point iteration."""
    x = b
    for _ in range(600):
        product = matvec(x)
        x = {name: x[name] - 0.1 * (product[name] - b[name]) for name in b}
    return x


SOLVES: dict[str, Any] = {
    "cg": implicit.cg,
    "neumann": partial(implicit.neumann, step_size=0.1),
    "dense": implicit.dense,
    "settings": partial(implicit.cg, maxiter=50, tol=1e-12),
    "own": own_solve,
}
ALL_SOLVES = pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)


def features() -> tuple[Tensor, Tensor]:
    """A well-conditioned regression problem ``(8, 3), (8,)``."""
    return torch.linalg.qr(torch.randn(8, 3))[0] * 1.5, torch.randn(8)


def ridge(params: Any, batch: Any) -> Tensor:
    x, y, strength = batch
    return ((x @ params["w"] - y) ** 2).sum() / 2 + (strength.exp() * params["w"] ** 2).sum() / 2


def closed_form(x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    return torch.linalg.solve(x.T @ x + torch.diag(strength.exp()), x.T @ y)


def outer(w: Tensor) -> Tensor:
    return (w * torch.tensor([1.0, -2.0, 0.5])).sum() ** 2 + (w**3).sum()


# Closed form -------------------------------------------------------------------------------------------------------


@ALL_SOLVES
@settings(max_examples=5)
@given(seed=SEEDS)
def test_ridge_regression_has_a_closed_form(solve: Any, seed: int) -> None:
    torch.manual_seed(seed)
    batch = [t.requires_grad_() for t in (*features(), torch.randn(3) / 2)]
    start = {"w": torch.zeros(3)}
    found = adapt(ridge, start, batch, optimizer=SGD, steps=STEPS, gradient=Implicit(solve=solve))
    expected = closed_form(*batch)
    assert_close(found.params["w"], expected, NEAR)
    grads = torch.autograd.grad(outer(found.params["w"]), batch, create_graph=True)
    by_hand = torch.autograd.grad(outer(expected), batch, create_graph=True)
    assert_close(grads, by_hand, NEAR)
    weight = torch.randn(3)
    second, exact = (torch.autograd.grad((g[2] * weight).sum() + (g[1] ** 2).sum(), batch) for g in (grads, by_hand))
    assert_close(second, exact, 10 * NEAR)
    assert not found.losses.requires_grad
    assert not any(t.requires_grad for t in torch.utils._pytree.tree_leaves(found.opt_state))


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_unroll_comes_to_the_same_numbers_as_steps_grow() -> None:
    x, y = features()
    strength = torch.randn(3, requires_grad=True)

    def run(gradient: Any, steps: int) -> Tensor:
        w = adapt(ridge, {"w": torch.zeros(3)}, (x, y, strength), optimizer=SGD, steps=steps, gradient=gradient).params
        return torch.autograd.grad(outer(w["w"]), strength)[0]

    distances = [(run(Implicit(), steps) - run(Unroll(), steps)).norm() for steps in (20, 40, 80)]
    assert distances[1] < distances[0] / 3
    assert distances[2] < distances[1] / 30
    assert_close(run(Implicit(), STEPS), run(ForwardMode(), STEPS), NEAR)


# What it reaches ---------------------------------------------------------------------------------------------------


class Reads:
    """A loss that reads its start, a frozen body and a learned scale: from the batch, or closed over."""

    def __init__(self, x: Tensor, y: Tensor, closed: bool) -> None:
        self.x, self.y, self.closed = x, y, closed

    def __call__(self, start: Tensor, body: Tensor, scale: Tensor, gradient: Any, steps: int = STEPS) -> Tensor:
        others = (start, body.tanh(), scale)  # one of them no leaf

        def loss(params: Any, batch: Any) -> Tensor:
            start, body, scale = others if self.closed else batch
            w = params["w"]
            proximal = 0.5 * ((w - start) ** 2).sum()
            return scale.exp() * F.softplus(self.x @ (body * w) - self.y).sum() + proximal

        batch = None if self.closed else others
        adapted = adapt(loss, {"w": start}, batch, optimizer=SGD, steps=steps, gradient=gradient)
        return outer(adapted.params["w"])


@pytest.mark.parametrize("closed", [True, False], ids=["closed over", "in the batch"])
@ALL_SOLVES
def test_what_the_loss_reads_gets_the_unrolled_gradient(solve: Any, closed: bool) -> None:
    run = Reads(*features(), closed)
    point = torch.randn(3), torch.randn(3), torch.tensor(-0.5)
    leaves = [t.clone().requires_grad_() for t in point]
    expected = torch.autograd.grad(run(*leaves, Unroll()), leaves)
    assert min(g.abs().max() for g in expected) > 1e-2
    mode = Implicit(solve=solve)
    assert_close(torch.autograd.grad(run(*leaves, mode), leaves), expected, NEAR)
    if solve is not own_solve and solve is not SOLVES["neumann"]:
        functional = torch.func.grad(lambda *t: run(*t, mode), (0, 1, 2))
        assert_close(functional(*point), expected, NEAR)


@pytest.mark.parametrize("closed", [True, False], ids=["closed over", "in the batch"])
def test_second_derivatives_and_a_vmap_of_the_users_own(closed: bool) -> None:
    run = Reads(*features(), closed)
    point = torch.randn(3), torch.randn(3), torch.tensor(-0.5)
    argnums = (0, 1, 2)
    expected = torch.autograd.functional.hessian(lambda *t: run(*t, Unroll(), 250), point)
    assert_close(torch.autograd.functional.hessian(lambda *t: run(*t, Implicit(), 250), point), expected, NEAR)
    found = torch.func.jacrev(torch.func.grad(lambda *t: run(*t, Implicit(), 250), argnums), argnums)(*point)
    assert_close(found, expected, NEAR)
    starts = torch.randn(3, 3)
    each = torch.func.grad(lambda *t: run(*t, Implicit(), 250), argnums)
    many = torch.vmap(each, (0, None, None))(starts, *point[1:])
    alone = [each(start, *point[1:]) for start in starts]
    assert_close(many, tuple(map(torch.stack, zip(*alone, strict=True))), NEAR)
    total = torch.func.grad(lambda s: torch.vmap(lambda s: run(s, *point[1:], Implicit(), 250))(s).sum())(starts)
    assert_close(total, many[0], NEAR)


def test_the_last_steps_batch_counts_and_no_other() -> None:
    x, y = features()
    strengths = [torch.randn(3, requires_grad=True) for _ in range(2)]

    def batch_at(step: int, params: Any) -> Any:
        assert not params["w"].requires_grad
        return x, y, strengths[step >= 2] * 1  # no leaf

    options: Any = {"optimizer": SGD, "steps": STEPS, "gradient": Implicit()}
    with pytest.warns(UserWarning, match=r"no gradient of the inner loop to `batch\.2 of an earlier step`"):
        w = adapt(lambda *args: ridge(*args), {"w": torch.zeros(3)}, batch_at, **options).params["w"]
    first, last = torch.autograd.grad(outer(w), strengths, materialize_grads=True, allow_unused=True)
    assert_close(first, torch.zeros(3))
    assert_close(last, torch.autograd.grad(outer(closed_form(x, y, strengths[1])), strengths[1])[0], NEAR)


def test_a_carry_that_the_loss_reads() -> None:
    x, y = features()
    strength = torch.randn(3, requires_grad=True)
    loss = lambda params, carry, batch: (ridge(params, (x, y, carry["strength"])), carry)
    options: Any = {"optimizer": SGD, "steps": STEPS, "gradient": Implicit(), "carry": {"strength": strength}}
    adapted = adapt(loss, {"w": torch.zeros(3)}, None, **options)
    assert adapted.carry["strength"] is strength
    expected = torch.autograd.grad(outer(closed_form(x, y, strength)), strength)[0]
    assert_close(torch.autograd.grad(outer(adapted.params["w"]), strength)[0], expected, NEAR)
    # What vmap hands on is per task, and no longer the same tensor: that is said, and passing it in the batch helps.
    with pytest.warns(UserWarning, match=r"`carry\.strength`"):
        adapt_tasks(lambda *args: loss(*args), {"w": torch.zeros(3)}, torch.zeros(2), **options)


def test_complex_parameters() -> None:
    target, weight = torch.randn(3, dtype=torch.complex128, requires_grad=True), torch.rand(3) + 0.5
    loss = lambda w, target: (weight * (w - target * target.abs()).abs() ** 2).sum() + w.abs().square().sum() / 2
    run = lambda gradient: (
        adapt(loss, torch.zeros_like(target), target, optimizer=SGD, steps=STEPS, gradient=gradient).params
    )
    found, expected = (
        torch.autograd.grad((run(g) * (1 + 2j)).real.pow(2).sum(), target)[0] for g in (Implicit(), Unroll())
    )
    assert_close(found, expected, NEAR)


# Modules -----------------------------------------------------------------------------------------------------------


def test_dropout_has_the_same_numbers_in_every_run_of_the_loss() -> None:
    """The gradient and all products of one backward pass are those of one mask: the system is a consistent one."""
    strength = torch.tensor(0.3, requires_grad=True)
    masks: list[Tensor] = []

    def loss(params: Any, batch: Any) -> Tensor:
        kept = F.dropout(torch.ones(20), 0.5)
        masks.append(kept.detach())
        return (kept * (params["w"] - batch) ** 2).sum() / 2 + strength * (params["w"] ** 2).sum() / 2

    target = torch.randn(20, requires_grad=True)
    options: Any = {"optimizer": optim.sgd(lr=0.3), "steps": 60, "gradient": Implicit()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a loss has no stationary point
        w = adapt(loss, {"w": torch.zeros(20)}, target, **options).params["w"]
    before, state = len(masks), torch.get_rng_state()
    by_target = torch.autograd.grad(w.sum(), target)[0]
    assert torch.equal(torch.get_rng_state(), state)
    used = masks[before:]
    assert all(torch.equal(mask, used[0]) for mask in used)
    assert_close(by_target, used[0] / (used[0] + strength.detach()), 1e-8)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4).eval()], ids=str)
def test_norms(norm: nn.Module) -> None:
    apply, params, buffers = stateless(
        nn.Sequential(nn.Linear(3, 4), norm.double(), nn.Tanh()).double(), params="detach"
    )
    x, target = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    strength = torch.tensor(2.0, requires_grad=True)

    def loss(params: Any, buffers: Any, batch: Any) -> Any:
        x, y = batch
        out, buffers = apply(params, buffers, x)
        return ((out - y) ** 2).mean() / 10 + strength * sum(
            ((p - constants[n]) ** 2).sum() for n, p in params.items()
        ), buffers

    options: Any = {"optimizer": SGD, "steps": 200, "carry": buffers}
    constants = {name: p.detach() for name, p in params.items()}

    def run(gradient: Any, many: bool) -> Tensor:
        if many:
            found = adapt_tasks(loss, constants, (x, target), gradient=gradient, **options).params
        else:
            found = adapt(loss, constants, (x[0], target[0]), gradient=gradient, **options).params
        return torch.autograd.grad(sum((p**2).sum() for p in found.values()), strength)[0]

    for many in (False, True):
        assert_close(run(Implicit(), many), run(Unroll(), many), NEAR)
