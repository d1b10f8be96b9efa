"""One task of `adapt_tasks` runs without a task dimension: the same as along every other route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_close, fresh, gradients, mlp, recurrent, regression, regression_batch
from torch import Tensor

from statelessify import FirstOrder, Unroll, adapt_tasks, optim
from statelessify.errors import RandomnessError, TaskError

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.FirstOrder:UserWarning"),  # tested in test_gradient.py
]
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])

halving = optim.Optimizer(lambda p: (), lambda p, g, s: ({k: p[k] - 0.5 * g[k] for k in p}, s))
SCHEDULED = optim.sgd(lr=lambda step: optim.per_task(torch.tensor([0.1]) / (step + 1)))
OPTIMIZERS: Any = {
    "sgd": optim.sgd(lr=0.1, momentum=0.9),
    "adam": optim.adam(lr=0.1),
    "adafactor": optim.adafactor(lr=0.1),
    "per task": optim.sgd(lr=optim.per_task(torch.tensor([0.1]))),
    "schedule per task": SCHEDULED,
    "own": halving,
}


def both(loss: Any, params: Any, batches: Any, **options: Any) -> tuple[Any, Any]:
    """Alone, and under vmap: the results with the gradients of everything in them."""
    results = []
    for backend in ("auto", "vmap"):
        own = fresh(params)
        adapted = adapt_tasks(loss, own, batches, backend=backend, **options)
        total = adapted.losses.sum() + sum(leaf.square().sum() for leaf in adapted.params.values())
        results.append((adapted, gradients(total, own)))
    return results[0], results[1]


@MODES
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_under_vmap(name: str, gradient: Any) -> None:
    options: Any = {"optimizer": OPTIMIZERS[name], "steps": 3, "gradient": gradient}
    assert_close(*both(regression, mlp(), regression_batch(1), **options))


@MODES
@pytest.mark.parametrize("steps", [0, 2])
def test_a_carry_and_a_transform_of_gradients(steps: int, gradient: Any) -> None:
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": steps, "gradient": gradient, "carry": torch.ones(3)}
    halved = lambda grads: {name: value / 2 for name, value in grads.items()}
    found, expected = both(recurrent, {"w": torch.randn(3)}, torch.randn(1, 3), grad_transform=halved, **options)
    assert found[0].carry.shape == (1, 3)
    assert_close(found, expected)


@pytest.mark.parametrize("steps", [0, 2])
def test_going_on_where_it_stopped(steps: int) -> None:
    params, batches = mlp(), regression_batch(1)
    options: Any = {"optimizer": optim.adam(lr=0.1), "in_dims": 0}
    results = []
    for backend in ("auto", "vmap"):
        one = adapt_tasks(regression, fresh(params), batches, **{**options, "in_dims": (None, 0)}, steps=2)
        more: Any = {**options, "steps": steps, "opt_state": one.opt_state, "backend": backend}
        results.append(adapt_tasks(regression, one.params, batches, **more))
    assert_close(*[(r.params, r.opt_state.slots, r.opt_state.step, r.losses) for r in results])


def test_batches_are_asked_for_once_a_step_with_a_task_dimension() -> None:
    data, seen = [regression_batch(1) for _ in range(3)], []

    def batches(step: int, current: Any) -> Any:
        seen.append((step, current["first.bias"].ndim, current["first.bias"].requires_grad))
        return data[step]

    params = fresh(mlp())
    found = adapt_tasks(regression, params, batches, optimizer=optim.sgd(lr=0.1), steps=3)
    assert seen == [(0, 1, False), (1, 2, False), (2, 2, False)]
    more: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3, "backend": "vmap"}
    assert_close(found, adapt_tasks(regression, params, lambda step, _: data[step], **more))


def test_another_number_of_tasks_at_a_later_step() -> None:
    data = [regression_batch(1), regression_batch(2)]
    with pytest.raises(TaskError, match="leading dimensions differ"):
        adapt_tasks(regression, fresh(mlp()), lambda step, _: data[step], optimizer=optim.sgd(lr=0.1), steps=2)


def test_random_numbers_can_be_forbidden() -> None:
    def noisy(params: Any, target: Tensor) -> Tensor:
        return ((params["w"] - target) ** 2).sum() + torch.rand(())

    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 1}
    with pytest.raises(RandomnessError):
        adapt_tasks(noisy, {"w": torch.zeros(2)}, torch.ones(1, 2), randomness="error", **options)
    adapt_tasks(noisy, {"w": torch.zeros(2)}, torch.ones(1, 2), **options)
