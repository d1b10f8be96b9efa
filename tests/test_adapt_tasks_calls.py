"""`adapt_tasks`: batches from a callable, closures, carries, random numbers, what torch cannot batch, bad input."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from problems import assert_close, fresh, gradients, mlp, pull, recurrent, regression, regression_batch
from torch import Tensor

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks, tree_stack, tree_unstack
from statelessify.errors import DtypeError, HyperparameterError, LossError, StatelessifyError, TaskError, VmapError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.FirstOrder:UserWarning"),  # tested in test_gradient.py
]
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
ROUTES: Any = pytest.mark.parametrize(
    "route", [{"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}, {}], ids=["vmap", "loop", "chunks", "auto"]
)


@MODES
@ROUTES
def test_callable_batches_are_called_once_a_step_in_order(route: Any, gradient: Any) -> None:
    params, data = fresh(mlp()), [regression_batch(3) for _ in range(3)]
    seen: list[int] = []

    def batches(step: int, current: Any) -> Any:
        seen.append(step)
        assert not any(value.requires_grad for value in current.values())
        shape = params["first.bias"].shape
        assert current["first.bias"].shape == (shape if step == 0 else (3, *shape))
        return data[step]

    options: Any = {"optimizer": optim.adam(lr=0.1), "gradient": gradient}
    adapted = adapt_tasks(regression, params, batches, steps=3, **options, **route)
    assert seen == [0, 1, 2]
    each = []
    for task in range(3):
        of_task = lambda step, _, task=task: tuple(value[task] for value in data[step])
        each.append(adapt(regression, params, of_task, steps=3, **options))
    assert_close(adapted, tree_stack(each))
    adapted.params["first.bias"].sum().backward()
    assert seen == [0, 1, 2]


def test_no_batch_is_asked_for_where_there_is_no_step() -> None:
    def never(step: int, current: Any) -> Any:
        pytest.fail("there is no step")

    with pytest.raises(TaskError, match="how many tasks"):
        adapt_tasks(pull, {"w": torch.ones(3)}, never, optimizer=optim.sgd(lr=0.1), steps=0)


def test_one_step_of_batches_from_a_callable_that_alone_say_how_many_tasks_there_are() -> None:
    params, targets = {"w": torch.randn(3)}, torch.randn(4, 3)
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 1}
    found = adapt_tasks(pull, params, lambda step, current: targets, **options)
    assert_close(found, adapt_tasks(pull, params, targets, **options))


@ROUTES
def test_what_all_tasks_share_in_a_carry_is_one_value_in_chunks_too(route: Any) -> None:
    """A counter of integers, which comes out once for all, and a mean that each task has of its own."""

    def loss(w: Tensor, carry: Any, batch: Tensor) -> Any:
        new = {"count": carry["count"] + torch.tensor([1, 2]), "mean": carry["mean"] * 0.9 + batch.mean()}
        return ((w - batch) ** 2).sum() * carry["count"].sum(), new

    w, batches = torch.randn(3), torch.randn(5, 3)
    carry = {"count": torch.tensor([1, 0]), "mean": torch.zeros(())}
    options: Any = {"optimizer": optim.sgd(lr=0.01), "steps": 3, "carry": carry}
    found = adapt_tasks(loss, w, batches, **options, **route)
    assert_close(found, tree_stack([adapt(loss, w, batch, **options) for batch in batches]))
    assert found.carry["count"].tolist() == [[4, 6]] * 5


def test_first_order_names_the_batches_that_it_does_not_reach() -> None:
    start, scale = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    losses = [lambda w, batch: ((w - batch["scale"]) ** 4).sum(), lambda w, batch: ((w - batch["scale"]) ** 2).sum()]
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 1, "gradient": FirstOrder()}
    for loss in losses:  # once for each
        with pytest.warns(UserWarning, match="passes no gradient to .*`batches.scale`"):
            adapt_tasks(loss, start, {"scale": scale}, **options)


@pytest.mark.parametrize("silent", [torch.no_grad, torch.inference_mode])
@ROUTES
def test_nothing_is_recorded(route: Any, silent: Any) -> None:
    params, batches = fresh({"w": torch.randn(3)}), torch.randn(3, 3)
    options: Any = {"optimizer": optim.adam(lr=0.1), "steps": 2, "carry": torch.zeros(3, requires_grad=True)}
    expected = adapt_tasks(recurrent, params, batches, **options)
    with silent():
        adapted = adapt_tasks(recurrent, params, batches * 1, **options, **route)
    for value in torch.utils._pytree.tree_leaves(adapted):
        assert not isinstance(value, Tensor) or not value.requires_grad
    assert_close(adapted, expected)


@MODES
@ROUTES
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "no leaf"])
def test_what_the_loss_closes_over_gets_its_gradient(leaf: bool, route: Any, gradient: Any) -> None:
    inputs = [torch.randn(3), torch.rand(3), torch.rand(()), torch.rand(())]
    targets, queries = torch.randn(2, 4, 3)

    def run(start: Tensor, body: Tensor, learned: Tensor, lr: Tensor, by_hand: bool = False) -> Tensor:
        start = start if leaf else start * 1.5
        feature = torch.tanh(body)

        def loss(params: Any, target: Tensor) -> Tensor:
            w = params["w"]
            return learned * pull({"w": w * feature}, target) + ((w - start) ** 2).sum() + w @ (start * body)

        options: Any = {"optimizer": optim.sgd(lr=0.01 * lr), "steps": 2, "gradient": gradient}
        if by_hand:
            each = [adapt(loss, {"w": start}, target, **options).params["w"] for target in targets]
            return torch.stack([pull({"w": w}, query) for w, query in zip(each, queries, strict=True)]).sum()
        adapted = adapt_tasks(loss, {"w": start}, targets, **options, **route)
        return over_tasks(pull, in_dims=0)(adapted.params, queries).sum()

    leaves = [value.clone().requires_grad_() for value in inputs]
    materialized: Any = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(run(*leaves, by_hand=True), leaves, **materialized)
    assert_close(torch.autograd.grad(run(*leaves), leaves, **materialized), expected)
    assert_close(torch.func.grad(run, argnums=(0, 1, 2, 3))(*inputs), expected)


@MODES
@ROUTES
def test_a_hidden_state_carries_its_gradient(route: Any, gradient: Any) -> None:
    batches, weights = torch.randn(4, 3), torch.randn(4, 3)

    def run(w: Tensor, hidden: Tensor, by_hand: bool = False) -> Tensor:
        options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3, "carry": hidden, "gradient": gradient}
        if by_hand:
            adapted = tree_stack([adapt(recurrent, {"w": w}, batch, **options) for batch in batches])
        else:
            adapted = adapt_tasks(recurrent, {"w": w}, batches, **options, **route)
        return (adapted.carry * weights + adapted.params["w"]).sum()

    point = torch.randn(3), torch.randn(3)
    leaves = [value.clone().requires_grad_() for value in point]
    expected = torch.autograd.grad(run(*leaves, by_hand=True), leaves)
    assert_close(torch.autograd.grad(run(*leaves), leaves), expected)
    assert_close(torch.func.grad(run, argnums=(0, 1))(*point), expected)


@ROUTES
def test_the_learning_rate_alone_of_parameters_that_need_no_gradient(route: Any) -> None:
    params, batches = mlp(), regression_batch(3)

    def run(lr: Tensor) -> Tensor:
        adapted = adapt_tasks(regression, params, batches, optimizer=optim.adam(lr=lr), steps=2, **route)
        return over_tasks(regression, in_dims=0)(adapted.params, batches).sum()

    lr = torch.tensor(0.1, requires_grad=True)
    each = [adapt(regression, params, b, optimizer=optim.adam(lr=lr), steps=2).params for b in tree_unstack(batches)]
    loop = torch.stack([regression(p, b) for p, b in zip(each, tree_unstack(batches), strict=True)]).sum()
    expected = torch.autograd.grad(loop, lr)[0]
    assert_close(torch.autograd.grad(run(lr), lr)[0], expected)
    assert_close(torch.func.grad(run)(lr.detach()), expected)


def test_many_tasks_inside_many_tasks() -> None:
    targets = torch.randn(2, 3, 2)
    rates = torch.tensor([0.1, 0.2, 0.3])

    def inner(targets: Tensor) -> Any:
        optimizer = optim.adam(lr=optim.per_task(rates))
        carry = {"count": torch.tensor(0), "h": torch.zeros(2)}
        loss = lambda p, c, b: (pull(p, b) + c["h"].sum(), {"count": c["count"] + 1, "h": c["h"] + b})
        return adapt_tasks(loss, {"w": torch.zeros(2)}, targets, optimizer=optimizer, steps=2, carry=carry)

    expected = tree_stack([inner(each) for each in targets])
    assert_close(over_tasks(inner, in_dims=0)(targets), expected)
    assert_close(over_tasks(inner, in_dims=0, chunk_size=1)(targets), expected)
    assert_close(over_tasks(inner, in_dims=0, backend="loop")(targets), expected)


# What torch cannot batch -------------------------------------------------------------------------------------------


class Branches(torch.nn.Module):
    calls = 0

    def forward(self, w: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        distance = ((w - target) ** 2).sum()
        return distance if distance > 1 else distance**2


def test_data_dependent_control_flow_falls_back_to_the_loop_with_one_warning() -> None:
    module = Branches()
    loss = lambda p, b: module(p["w"], b)
    params, batches = {"w": torch.zeros(2, requires_grad=True)}, torch.randn(5, 2)
    options: Any = {"optimizer": optim.adam(lr=0.1), "steps": 3}
    expected = tree_stack([adapt(loss, params, batch, **options) for batch in batches])
    module.calls = 0
    with pytest.warns(UserWarning, match="`Branches`.*loop") as caught:
        found = adapt_tasks(loss, params, batches, **options)
    assert len(caught) == 1
    assert module.calls == 1 + 3 * 5  # one attempt in the whole run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adapt_tasks(loss, params, batches, chunk_size=2, **options)
    for each in (found, again):
        assert_close(each, expected)
        assert_close(gradients(each.losses.sum(), params), gradients(expected.losses.sum(), params, retain_graph=True))
    with pytest.raises(VmapError, match="`Branches`"):
        adapt_tasks(loss, params, batches, backend="vmap", **options)


@ROUTES
def test_the_users_own_error_comes_through(route: Any) -> None:
    def loss(w: Tensor, b: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        adapt_tasks(loss, torch.ones(2), torch.ones(3, 2), optimizer=optim.sgd(), steps=1, **route)


# Random numbers ----------------------------------------------------------------------------------------------------


@ROUTES
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers_per_task(route: Any, randomness: Any) -> None:
    loss = lambda w, b: ((w - torch.nn.functional.dropout(b, 0.5)) ** 2).sum()
    options: Any = {"optimizer": optim.sgd(lr=0.5), "steps": 1, "randomness": randomness}
    adapted = adapt_tasks(loss, torch.zeros(20), torch.ones(5, 20), **options, **route)
    assert ((adapted.params == 0) | (adapted.params == 2)).all()
    distinct = len({tuple(row) for row in adapted.params.tolist()})
    assert distinct == (1 if randomness == "same" else 5)


@ROUTES
@pytest.mark.parametrize("tasks", [1, 3])
def test_random_numbers_may_be_forbidden(route: Any, tasks: int) -> None:
    loss = lambda w, b: ((w - torch.nn.functional.dropout(b, 0.5)) ** 2).sum()
    options: Any = {"optimizer": optim.sgd(lr=0.5), "steps": 1, "randomness": "error"}
    with pytest.raises(RuntimeError, match="random"):
        adapt_tasks(loss, torch.zeros(2), torch.ones(tasks, 2), **options, **route)


# Bad input ---------------------------------------------------------------------------------------------------------

W, B = {"w": torch.ones(3)}, torch.ones(4, 3)
BAD_INPUT: dict[str, tuple[Any, Any, str]] = {
    "differing tasks": (TaskError, {"batches": (torch.ones(3, 3), torch.ones(4, 3))}, "differ"),
    "params and batches": (TaskError, {"params": {"w": torch.ones(2, 3)}, "in_dims": 0}, "params.w"),
    "zero tasks": (TaskError, {"batches": torch.ones(0, 3)}, "zero tasks"),
    "no tasks": (TaskError, {"in_dims": (None, None)}, "how many"),
    "no task dimension": (TaskError, {"batches": torch.ones(())}, "dimension"),
    "in_dims of one": (TaskError, {"in_dims": (0,)}, "pair"),
    "in_dims of another tree": (StatelessifyError, {"in_dims": ({"x": 0}, 0)}, "in_dims"),
    "in_dims too large": (TaskError, {"in_dims": (None, 5)}, "dimension 5"),
    "chunks": (TaskError, {"chunk_size": 0}, "chunk_size=0"),
    "backend": (TaskError, {"backend": "vmpa"}, "did you mean `vmap`"),
    "randomness": (TaskError, {"randomness": "diferent"}, "did you mean `different`"),
    "per task": (TaskError, {"optimizer": optim.sgd(lr=optim.per_task(torch.ones(3)))}, "lr"),
    "schedule per task": (
        TaskError,
        {"optimizer": optim.sgd(lr=lambda step: optim.per_task(torch.ones(5)))},
        "5",
    ),
    "schedule of another shape": (
        HyperparameterError,
        {"optimizer": optim.sgd(lr=lambda step: torch.ones(3))},
        "shape \\(3,\\)",
    ),
    "schedule, not mapped, of another shape": (
        HyperparameterError,
        {"optimizer": optim.adam(lr=lambda step: {"w": torch.ones(4, 3)})},
        "shape \\(4, 3\\)",
    ),
    "integers": (DtypeError, {"params": {"w": torch.ones(3, dtype=torch.int64)}}, "integer"),
    "vector": (LossError, {"loss": lambda p, b: p["w"]}, "shape \\(3,\\)"),
    "tuple": (LossError, {"loss": lambda p, b: (p["w"].sum(), b)}, "carry"),
    "number": (LossError, {"loss": lambda p, b: 1.0}, "float"),
    "item": (LossError, {"loss": lambda p, b: p["w"].sum().item()}, "float"),
    "no pair": (LossError, {"loss": lambda p, c, b: p["w"].sum(), "carry": {}}, "pair"),
    "steps": (HyperparameterError, {"steps": -1}, "steps=-1"),
    "optimizer": (HyperparameterError, {"optimizer": torch.optim.SGD}, "Optimizer"),
    "state shared, parameters per task": (
        StatelessifyError,
        {"params": {"w": torch.ones(4, 3)}, "in_dims": 0, "opt_state": optim.sgd(momentum=0.9).init(W)},
        "opt_state",
    ),
    "carry shared, parameters per task": (
        StatelessifyError,
        {"params": {"w": torch.ones(4, 3)}, "in_dims": 0, "carry": {"n": torch.tensor(0)}},
        "carry",
    ),
    "state per task, parameters shared": (
        StatelessifyError,
        {"opt_state": optim.sgd(momentum=0.9).init({"w": torch.ones(4, 3)}), "optimizer": optim.sgd(momentum=0.9)},
        "w",
    ),
}


@ROUTES
@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_by_name(bad: Any, route: Any) -> None:
    error, change, words = bad
    good: Any = {"loss": pull, "params": W, "batches": B, "optimizer": optim.sgd(lr=0.1), "steps": 1, **route}
    with pytest.raises(error, match=words):
        adapt_tasks(**(good | change))
