"""`adapt_tasks`: one call for all tasks gives the numbers of a plain loop, whatever the route."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    NORMS,
    Problem,
    assert_close,
    fresh,
    gradients,
    mlp,
    norm_problem,
    one_by_one,
    regression,
    regression_batch,
)
from torch import Tensor, nn

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks, stateless, tree_stack, tree_unstack

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.FirstOrder:UserWarning"),  # tested in test_gradient.py
]
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "vmap", "loop"])
OPTIMIZERS = {
    "sgd": lambda lr: optim.sgd(lr=lr),
    "momentum": lambda lr: optim.sgd(lr=lr, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "adam": lambda lr: optim.adam(lr=lr, eps=0.1),
}
RULES = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# Loop, vmap and chunks ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    problem: Problem
    optimizer: optim.Optimizer
    steps: int
    gradient: Any
    tasks: int

    def options(self) -> Any:
        return {"optimizer": self.optimizer, "steps": self.steps, "gradient": self.gradient}

    def adapted(self, params: Any, **choices: Any) -> Any:
        problem = self.problem
        return adapt_tasks(problem.loss, params, problem.batches, carry=problem.buffers, **self.options(), **choices)

    def meta_loss(self, params: Any, **choices: Any) -> Tensor:
        adapted = self.adapted(params, **choices)
        choices.pop("chunk_size", None)
        queries = tuple(value.flip(1) for value in self.problem.batches)
        over = over_tasks(self.problem.loss, in_dims=(0, None, 0), **choices)
        return over(adapted.params, self.problem.buffers, queries)[0].sum() + adapted.losses.sum()

    def one(self, params: Any, buffers: Any, batch: Any) -> Tensor:
        """The same for one task, in terms of `adapt`."""
        loss = self.problem.loss
        adapted = adapt(loss, params, batch, carry=buffers, **self.options())
        query = tuple(value.flip(0) for value in batch)
        return loss(adapted.params, buffers, query)[0] + adapted.losses.sum()


@st.composite
def cases(draw: Any, norms: Any = tuple(NORMS)) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    tasks = draw(st.integers(1, 4))
    activation = draw(st.sampled_from([torch.tanh, F.silu, F.relu]))
    problem = norm_problem(draw(st.sampled_from(norms)), tasks, activation)
    make = OPTIMIZERS[draw(st.sampled_from(sorted(OPTIMIZERS)))]
    gradient = draw(st.sampled_from([Unroll(), FirstOrder()]))
    return Case(problem, make(0.05), draw(st.integers(1, 3)), gradient, tasks)


@given(case=cases(), chunk=st.integers(1, 4))
def test_every_route_has_the_numbers_of_the_loop(case: Case, chunk: int) -> None:
    problem = case.problem
    params = fresh(problem.params)
    expected = one_by_one(problem.loss, params, problem.batches, carry=problem.buffers, **case.options())
    buffers = problem.buffers
    by_hand = torch.stack([case.one(params, buffers, batch) for batch in tree_unstack(problem.batches)]).sum()
    meta = gradients(by_hand, params)
    for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": chunk}):
        assert_close(case.adapted(params, **choices), expected)
        assert_close(gradients(case.meta_loss(params, **choices), params), meta)
        assert_close(torch.func.grad(lambda p: case.meta_loss(p, **choices))(problem.params), meta)  # noqa: B023
        over = over_tasks(case.one, in_dims=(None, None, 0), **choices)  # pyright: ignore[reportArgumentType]
        assert_close(gradients(over(params, buffers, problem.batches).sum(), params), meta)
        functional = torch.func.grad(lambda p: over(p, buffers, problem.batches).sum())  # noqa: B023
        assert_close(functional(problem.params), meta)
    with torch.no_grad():
        assert_close(case.adapted(params), expected)


def test_one_compiled_meta_step() -> None:
    problem = norm_problem("batch, running", 3)
    case = Case(problem, optim.sgd(lr=0.05, momentum=0.9), 2, Unroll(), 3)

    def meta_loss(params: Any) -> tuple[Tensor, Any]:
        adapted = case.adapted(params)
        value = over_tasks(problem.loss, in_dims=0)(adapted.params, adapted.carry, problem.batches)[0].sum()
        return value, (adapted.params, adapted.losses, adapted.carry, adapted.opt_state.slots, adapted.opt_state.step)

    meta_step = torch.func.grad(meta_loss, has_aux=True)
    found = torch.compile(meta_step, fullgraph=True, backend="aot_eager")(problem.params)
    assert_close(found, meta_step(problem.params))


@pytest.mark.parametrize(
    "rate",
    [
        lambda lr: {"first.*": lr, "last.weight": 0.1},
        lambda lr: lambda step: lr * 0.5**step,
        lambda lr: optim.per_task(lr * torch.arange(1.0, 4.0)),
    ],
    ids=["globs", "schedule", "per task"],
)
def test_one_compiled_meta_step_with_a_learned_rate(rate: Any) -> None:
    batches = regression_batch(3)

    def meta_loss(params: Any, lr: Tensor) -> Tensor:
        adapted = adapt_tasks(regression, params, batches, optimizer=optim.sgd(lr=rate(lr)), steps=2)
        return over_tasks(regression, in_dims=0)(adapted.params, batches).sum()

    meta_step = torch.func.grad(meta_loss, argnums=(0, 1))
    point = mlp(), torch.tensor(0.1)
    found = torch.compile(meta_step, fullgraph=True, backend="aot_eager")(*point)
    assert_close(found, meta_step(*point))


# Task dimensions ---------------------------------------------------------------------------------------------------


@MODES
@RULES
@BACKENDS
def test_twice_k_steps_are_two_k_steps(backend: Any, make: Any, gradient: Any) -> None:
    params, batches = fresh(mlp()), regression_batch(3)
    lr = torch.tensor(0.1, requires_grad=True)
    leaves = {**params, "lr": lr}
    options: Any = {"optimizer": make(lr), "gradient": gradient, "backend": backend}
    once = adapt_tasks(regression, params, batches, steps=4, **options)
    half = adapt_tasks(regression, params, batches, steps=2, **options)
    again = adapt_tasks(regression, half.params, batches, steps=2, opt_state=half.opt_state, in_dims=0, **options)
    assert_close(again._replace(losses=torch.cat([half.losses, again.losses], 1)), once)
    outer = [over_tasks(regression, in_dims=0)(each.params, batches).sum() for each in (again, once)]
    assert_close(gradients(outer[0], leaves), gradients(outer[1], leaves))


@pytest.mark.parametrize("momentum", [0.1, None])
@BACKENDS
def test_carried_statistics_go_on_where_they_stopped(backend: Any, momentum: float | None) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 1))
    apply, params, buffers = stateless(module)

    def loss(params: Any, buffers: Any, batch: Any) -> Any:
        out, buffers = apply(params, buffers, batch[0])
        return F.mse_loss(out, batch[1]), buffers

    options: Any = {"optimizer": optim.adam(lr=0.1), "backend": backend}
    batches = regression_batch(3)
    once = adapt_tasks(loss, params, batches, steps=4, carry=buffers, **options)
    half = adapt_tasks(loss, params, batches, steps=2, carry=buffers, **options)
    again = adapt_tasks(
        loss, half.params, batches, steps=2, carry=half.carry, opt_state=half.opt_state, in_dims=0, **options
    )
    assert_close(again.carry, once.carry)
    assert_close(again.params, once.params)
    queried = over_tasks(loss, in_dims=0, backend=backend)(once.params, once.carry, batches)
    each = zip(*map(tree_unstack, (once.params, once.carry, batches)), strict=True)
    assert_close(queried, tree_stack([loss(*task) for task in each]))


def schedules() -> dict[str, Any]:
    rates = torch.tensor([[0.1, 0.2, 0.3], [0.01, 0.02, 0.03], [0.1, 0.05, 0.0], [0.2, 0.1, 0.1]])
    return {
        "number": lambda step: [0.1, 0.2, 0.05, 0.3][int(step)],
        "branch": lambda step: 0.1 if step < 3 else 0.01,
        "tensor": lambda step: rates[step, 0],
        "dict": lambda step: {"first.*": rates[step, 0], "last.*": 0.1},
        "per task": lambda step: optim.per_task(rates[int(step)]),
        "dict per task": lambda step: {"first.*": optim.per_task(rates[int(step)]), "last.*": 0.1},
    }


@BACKENDS
@pytest.mark.parametrize("rate", schedules().values(), ids=schedules())
def test_a_schedule_of_the_step(rate: Any, backend: Any) -> None:
    params, batches = mlp(), regression_batch(3)

    def of_task(task: int) -> Any:
        def value(step: Tensor) -> Any:
            spec = rate(step)
            pick = lambda v: v.tree[task] if isinstance(v, type(optim.per_task(torch.ones(1)))) else v
            return {name: pick(v) for name, v in spec.items()} if isinstance(spec, dict) else pick(spec)

        return value

    expected = [
        adapt(regression, params, batch, optimizer=optim.sgd(lr=of_task(task), momentum=0.5), steps=4).params
        for task, batch in enumerate(tree_unstack(batches))
    ]
    options: Any = {"optimizer": optim.sgd(lr=rate, momentum=0.5), "backend": backend}
    once = adapt_tasks(regression, params, batches, steps=4, **options)
    assert_close(once.params, tree_stack(expected))
    assert once.opt_state.hyperparameters["lr"] is rate
    half = adapt_tasks(regression, params, batches, steps=2, **options)
    again = adapt_tasks(regression, half.params, batches, steps=2, opt_state=half.opt_state, in_dims=0, **options)
    assert_close(again.params, once.params)


@BACKENDS
@RULES
def test_in_dims_of_every_form(make: Any, backend: Any) -> None:
    tasks = 3
    stacked = tree_stack([mlp() for _ in range(tasks)])
    x, y = regression_batch(tasks)
    options: Any = {"optimizer": make(0.1), "steps": 2}
    expected = tree_stack(
        [adapt(regression, p, (a, b), **options) for p, a, b in zip(tree_unstack(stacked), x, y, strict=True)]
    )
    moved = {name: value.movedim(0, -1) for name, value in stacked.items()}
    forms: list[Any] = [
        (stacked, (x, y), 0),
        (stacked, (x, y), (0, 0)),
        (stacked, (x, y), [0, (0, 0)]),
        (moved, (x.movedim(0, 1), y), (-1, (1, 0))),
        (moved, (x, y), (dict.fromkeys(moved, -1), 0)),
    ]
    for params, batches, in_dims in forms:
        found = adapt_tasks(regression, params, batches, in_dims=in_dims, backend=backend, **options)
        assert_close(found, expected)
    ensemble = adapt_tasks(regression, stacked, (x[0], y[0]), in_dims=(0, None), backend=backend, **options)
    each = [adapt(regression, p, (x[0], y[0]), **options) for p in tree_unstack(stacked)]
    assert_close(ensemble, tree_stack(each))
    mixed = {**stacked, "first.bias": stacked["first.bias"][0]}
    dims = {**dict.fromkeys(mixed, 0), "first.bias": None}
    part = adapt_tasks(regression, mixed, (x, y), in_dims=(dims, 0), backend=backend, **options)
    mixed["first.bias"] = mixed["first.bias"].expand(tasks, -1)
    each = [
        adapt(regression, p, b, **options) for p, b in zip(tree_unstack(mixed), zip(x, y, strict=True), strict=True)
    ]
    assert_close(part, tree_stack(each))


@MODES
@BACKENDS
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("tasks", [1, 3])
def test_each_tensor_of_the_result_has_a_leading_task_dimension(
    backend: Any, tasks: int, steps: int, gradient: Any
) -> None:
    lr = {"w": torch.rand(2), "b": torch.rand(())}
    params = {"w": torch.randn(2), "b": torch.randn(())}
    carry = {"h": torch.randn(2), "count": torch.tensor(0), "flag": "kept", "part": torch.ones((), dtype=torch.bool)}

    def loss(params: Any, carry: Any, batch: Tensor) -> Any:
        value = ((params["w"] * batch + carry["h"] + params["b"]) ** 2).sum()
        return value, {**carry, "h": carry["h"] * batch, "count": carry["count"] + 1}

    options: Any = {"optimizer": optim.adam(lr=lr), "steps": steps, "gradient": gradient, "carry": carry}
    batches = torch.randn(tasks, 2)
    adapted = adapt_tasks(loss, params, batches, backend=backend, **options)
    for leaf in torch.utils._pytree.tree_leaves(adapted):
        assert not isinstance(leaf, Tensor) or leaf.shape[0] == tasks
    assert adapted.losses.shape == (tasks, steps)
    assert_close(adapted, one_by_one(loss, params, batches, **options))


def test_counters_that_differ_between_tasks() -> None:
    def loss(w: Tensor, count: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return ((w - batch) ** 2).sum() * count, count + (batch > 0).sum()

    batches = torch.randn(4, 3)
    options: Any = {"optimizer": optim.sgd(lr=0.01), "steps": 3, "carry": torch.tensor(1)}
    expected = one_by_one(loss, torch.zeros(3), batches, **options)
    for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 3}):
        assert_close(adapt_tasks(loss, torch.zeros(3), batches, **options, **choices), expected)
