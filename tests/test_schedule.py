"""`optim.schedule` against every scheduler of torch, stepped beside a real optimizer."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close, fresh, gradients, mlp, one_by_one, regression, regression_batch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from statelessify import adapt, adapt_tasks, optim, over_tasks
from statelessify.errors import HyperparameterError

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 23
KINDS: dict[str, list[dict[str, Any]]] = {
    "ConstantLR": [{}, {"factor": 0.5, "total_iters": 3}],
    "CosineAnnealingLR": [{"T_max": 7}, {"T_max": 5, "eta_min": 0.02}],
    "CosineAnnealingWarmRestarts": [{"T_0": 4}, {"T_0": 2, "T_mult": 3, "eta_min": 0.01}],
    "CyclicLR": [
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2, "step_size_down": 4, "mode": "exp_range", "gamma": 0.9},
    ],
    "ExponentialLR": [{"gamma": 0.9}],
    "LRScheduler": [],
    "LambdaLR": [{"lr_lambda": lambda step: 1 / (1 + step)}],
    "LinearLR": [{}, {"start_factor": 0.1, "end_factor": 0.7, "total_iters": 9}],
    "MultiStepLR": [{"milestones": [2, 3, 11], "gamma": 0.3}, {"milestones": [2, 2]}],
    "MultiplicativeLR": [{"lr_lambda": lambda step: 0.9 if step % 2 else 1.1}],
    "OneCycleLR": [
        {"max_lr": 0.4, "total_steps": 30},
        {"max_lr": 0.4, "epochs": 5, "steps_per_epoch": 6, "three_phase": True},
    ],
    "PolynomialLR": [{"total_iters": 8, "power": 2.0}, {"total_iters": 30}],
    "StepLR": [{"step_size": 1}, {"step_size": 5, "gamma": 0.2}],
}
COMPOSED: dict[str, Callable[[Any], Any]] = {
    "sequential": lambda o: schedulers.SequentialLR(
        o,
        [
            schedulers.LinearLR(o, 0.1, total_iters=4),
            schedulers.ExponentialLR(o, 0.8),
            schedulers.CosineAnnealingLR(o, 5),
        ],
        milestones=[4, 9],
    ),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 2, 0.5), schedulers.LinearLR(o, 0.3)]),
    "a lambda": lambda o: schedulers.LambdaLR(o, lambda step: math.cos(step) + 1.5),
    "averaging": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}
RESTS_ON_MAX = ("CyclicLR", "OneCycleLR")  # they overwrite the learning rate of the optimizer


def each() -> list[Any]:
    return [
        pytest.param(getattr(schedulers, name), options, id=f"{name}-{index}")
        for name, configs in KINDS.items()
        for index, options in enumerate(configs)
    ]


EACH = pytest.mark.parametrize(("cls", "options"), each())
EACH_COMPOSED = pytest.mark.parametrize("make", COMPOSED.values(), ids=COMPOSED)


def beside(make: Callable[[Any], Any], lr: float, steps: int = STEPS) -> list[float]:
    """The learning rates that a real optimizer has at its steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def at_all(rate: Any, steps: int = STEPS) -> list[Any]:
    return [rate(torch.tensor(step)) for step in range(steps)]


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    kinds = [kind for kind in vars(schedulers).values() if inspect.isclass(kind)]
    known = {kind.__name__ for kind in kinds if issubclass(kind, schedulers.LRScheduler)} - {"_LRScheduler"}
    assert known - {"ReduceLROnPlateau", "SequentialLR", "ChainedScheduler"} == set(KINDS)


@EACH
def test_a_class(cls: Any, options: Any) -> None:
    for lr in (0.3, 1, 1e-5):
        assert at_all(optim.schedule(cls, lr=lr, **options)) == beside(lambda o: cls(o, **options), lr)
        assert not any(isinstance(rate, Tensor) for rate in at_all(optim.schedule(cls, lr, **options)))


@EACH_COMPOSED
def test_a_factory(make: Any) -> None:
    assert at_all(optim.schedule(make, lr=0.3)) == beside(make, 0.3)


@EACH
def test_any_step_may_be_asked_for_and_again(cls: Any, options: Any) -> None:
    rate, expected = optim.schedule(cls, lr=0.3, **options), beside(lambda o: cls(o, **options), 0.3)
    for step in (9, 3, 3, 0, 20, 9, 1):
        assert rate(torch.tensor(step)) == expected[step]
    assert copy.deepcopy(rate)(torch.tensor(7)) == expected[7]


@EACH
@pytest.mark.parametrize("past", [0, 1, 6])
def test_a_live_scheduler_partway(cls: Any, options: Any, past: int) -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.3)], momentum=0.5
    )
    scheduler = cls(optimizer, **options)
    for _ in range(past):
        optimizer.step()
        scheduler.step()
    found = [at_all(optim.schedule(scheduler, group=group), 10) for group in (0, 1)]
    expected = []
    for _ in range(10):
        expected.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert list(map(list, zip(*found, strict=True))) == expected


@EACH
def test_a_live_scheduler_is_not_changed_nor_followed(cls: Any, options: Any) -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.3, momentum=0.5)
    scheduler = cls(optimizer, **options)
    rate = optim.schedule(scheduler)
    known = {**scheduler.state_dict()}, {**optimizer.param_groups[0]}, optimizer.step
    expected = at_all(rate, 5)
    assert ({**scheduler.state_dict()}, {**optimizer.param_groups[0]}, optimizer.step) == known
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler would warn of a wrong order, had it been stepped
        optimizer.step()
        scheduler.step()
    assert at_all(rate, 5) == expected


@EACH_COMPOSED
def test_a_live_composed_scheduler(make: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
    scheduler = make(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert at_all(optim.schedule(scheduler), 12) == beside(make, 0.3, 15)[3:]


# Gradients ---------------------------------------------------------------------------------------------------------


@EACH
def test_the_gradient_of_a_tensor_rate(cls: Any, options: Any) -> None:
    lr = torch.tensor(0.3, requires_grad=True)
    rates = at_all(optim.schedule(cls, lr=lr, **options))
    at = [beside(lambda o: cls(o, **options), base) for base in (0.3, 0.3 + 1e-5, 0.3 - 1e-5)]
    for rate, value, above, below in zip(rates, *at, strict=True):
        assert math.isclose(rate.item(), value, rel_tol=1e-9, abs_tol=1e-12)
        slope = torch.autograd.grad(rate, lr, retain_graph=True)[0] if rate.requires_grad else torch.tensor(0.0)
        assert math.isclose(slope.item(), (above - below) / 2e-5, rel_tol=1e-6, abs_tol=1e-8)
    assert (cls.__name__ in RESTS_ON_MAX) or rates[1].requires_grad


@EACH_COMPOSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_rate_through_a_factory(make: Any, dtype: torch.dtype) -> None:
    lr = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    rates = at_all(optim.schedule(make, lr=lr))
    assert_close(torch.stack(rates).detach().double(), torch.tensor(beside(make, lr.item())), 1e-6)


@EACH
def test_in_adapt_as_a_rate_for_each_step(cls: Any, options: Any) -> None:
    params, batch, lr = fresh(mlp()), regression_batch(), torch.tensor(0.3, requires_grad=True)
    slopes = at_all(optim.schedule(cls, lr=lr, **options), 4)
    by_hand = dict(params)
    for rate in slopes:
        grads = gradients(regression(by_hand, batch), by_hand, create_graph=True)
        by_hand = {name: by_hand[name] - rate * grads[name] for name in params}
    inner = optim.sgd(lr=optim.schedule(cls, lr=lr, **options))
    found = adapt(regression, params, batch, optimizer=inner, steps=4).params
    assert_close(found, by_hand, 1e-12)
    wanted = {**params, "lr": lr}
    assert_close(
        gradients(found["first.weight"].sum(), wanted, retain_graph=True),
        gradients(by_hand["first.weight"].sum(), wanted),
        1e-11,
    )


@pytest.mark.parametrize("rule", ["sgd", "adam", "rmsprop", "adafactor"])
def test_many_tasks_and_transforms(rule: str) -> None:
    params, batches, lr = fresh(mlp()), regression_batch(3), torch.tensor(0.1, requires_grad=True)
    make = getattr(optim, rule)
    decayed = lambda lr: optim.schedule(COMPOSED["sequential"], lr=lr)
    options: Any = {"optimizer": make(lr={"*.weight": decayed(lr), "*.bias": 0.1}), "steps": 5}
    expected = one_by_one(regression, params, batches, **options)
    wanted = {**params, "lr": lr}
    meta = gradients(expected.params["first.weight"].sin().sum(), wanted)
    for choices in ({"backend": "vmap"}, {"backend": "loop"}):
        found = adapt_tasks(regression, params, batches, **options, **choices)
        assert_close(found.params, expected.params)
        assert_close(gradients(found.params["first.weight"].sin().sum(), wanted), meta)

    def outer(params: Any, lr: Tensor) -> Tensor:
        inner = make(lr={"*.weight": decayed(lr), "*.bias": 0.1})
        run = lambda p, b: adapt(regression, p, b, optimizer=inner, steps=5).params
        return over_tasks(run)(params, batches)["first.weight"].sin().sum()

    plain = {name: p.detach() for name, p in params.items()}
    by_grad = torch.func.grad(outer, (0, 1))(plain, lr.detach())
    assert_close({**by_grad[0], "lr": by_grad[1]}, meta)


def test_going_on_follows_the_schedule() -> None:
    params, batch = mlp(), regression_batch()
    inner = optim.adam(lr=optim.schedule(schedulers.OneCycleLR, lr=0.1, max_lr=0.4, total_steps=10))
    once = adapt(regression, params, batch, optimizer=inner, steps=3)
    twice = adapt(regression, once.params, batch, optimizer=inner, steps=4, opt_state=once.opt_state)
    assert_close(twice.params, adapt(regression, params, batch, optimizer=inner, steps=7).params, 0.0)


def test_other_hyperparameters_may_follow_a_schedule() -> None:
    """Anything that a number can be: here the momentum and the decay."""
    params, batch = mlp(), regression_batch()
    falling = optim.schedule(schedulers.LinearLR, lr=0.8, start_factor=1.0, end_factor=0.1, total_iters=4)
    numbers = at_all(falling, 4)
    written = lambda step: numbers[int(step)]
    found, expected = (
        adapt(regression, params, batch, optimizer=optim.sgd(0.1, momentum=each, weight_decay=each), steps=4).params
        for each in (falling, written)
    )
    assert_close(found, expected, 0.0)


def test_a_rate_that_an_outer_optimizer_learns() -> None:
    """The tensor is changed in place between calls, and the schedule follows."""
    lr = torch.tensor(0.1, requires_grad=True)
    rate = optim.schedule(schedulers.StepLR, lr=lr, step_size=1, gamma=0.5)
    outer = torch.optim.SGD([lr], lr=0.2)
    for expected in (0.025, 0.0125, 0.0):
        value = rate(torch.tensor(2))
        assert math.isclose(value.item(), expected, abs_tol=1e-9)
        outer.zero_grad()
        value.backward()
        outer.step()


def test_a_learned_rate_may_fall_below_zero_as_any_other() -> None:
    lr = torch.tensor(-0.1, requires_grad=True)
    assert used(lr).params["first.bias"].requires_grad
    rate = optim.schedule(schedulers.StepLR, lr=lr, step_size=1, gamma=0.5)
    assert math.isclose(rate(torch.tensor(2)).item(), -0.025)


# Errors ------------------------------------------------------------------------------------------------------------


def plateau() -> Any:
    return schedulers.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.1))


class Nonlinear(schedulers.LRScheduler):
    """With `floor`, linear at the rates 1, 2 and 3, at which it may be tried."""

    def __init__(self, optimizer: Any, floor: float = 0.0) -> None:
        self.floor = floor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [max(lr / 2**self.last_epoch, self.floor) if self.floor else lr**2 for lr in self.base_lrs]


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a metric": (lambda: optim.schedule(schedulers.ReduceLROnPlateau, lr=0.1), "`ReduceLROnPlateau` follows a metric"),
    "a live metric": (lambda: optim.schedule(plateau()), "`ReduceLROnPlateau` follows a metric"),
    "a factory of a metric": (
        lambda: optim.schedule(lambda o: schedulers.ReduceLROnPlateau(o), lr=0.1)(torch.tensor(1)),
        "ReduceLROnPlateau",
    ),
    "no lr": (lambda: optim.schedule(schedulers.StepLR, step_size=1), "`lr=None`: write the learning rate"),
    "words for lr": (lambda: optim.schedule(schedulers.StepLR, lr="0.1", step_size=1), "`lr='0.1'`"),
    "a truth value for lr": (lambda: optim.schedule(schedulers.StepLR, lr=True, step_size=1), "`lr=True`"),
    "a dict for lr": (lambda: optim.schedule(schedulers.StepLR, lr={"*": 0.1}, step_size=1), "`lr="),
    "negative": (lambda: optim.schedule(schedulers.StepLR, lr=-0.1, step_size=1), "lr=-0.1"),
    "not finite": (lambda: used(optim.schedule(schedulers.StepLR, lr=math.nan, step_size=1)), "lr=nan"),
    "live and lr": (lambda: optim.schedule(live(), lr=0.1), "a live scheduler has its learning rate"),
    "live and options": (lambda: optim.schedule(live(), gamma=0.1), "a live scheduler has its learning rate"),
    "no such group": (lambda: optim.schedule(live(), group=1), "group"),
    "no scheduler": (lambda: optim.schedule(lambda o: o, lr=0.1), "not a scheduler"),
    "no callable": (lambda: optim.schedule(3, lr=0.1), "3"),
}


def live() -> Any:
    return schedulers.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1)


def used(rate: Any) -> Any:
    return adapt(regression, mlp(), regression_batch(), optimizer=optim.sgd(lr=rate), steps=2)


@pytest.mark.parametrize("bad", BAD)
def test_what_is_refused(bad: str) -> None:
    call, words = BAD[bad]
    with pytest.raises(HyperparameterError, match=words):
        call()


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_schedule_that_is_not_linear_in_a_tensor(floor: float) -> None:
    lr = torch.tensor(0.3, requires_grad=True)
    rate = optim.schedule(Nonlinear, lr=lr, floor=floor)
    with pytest.raises(HyperparameterError, match="is not linear in its learning rate"):
        rate(torch.tensor(2))
    assert at_all(optim.schedule(Nonlinear, lr=0.3, floor=floor)) == beside(lambda o: Nonlinear(o, floor), 0.3)

    def value(lr: Tensor) -> Tensor:
        return optim.schedule(Nonlinear, lr=lr, floor=floor)(torch.tensor(2))

    for transform in (torch.func.grad_and_value, lambda f: lambda lr: (None, torch.vmap(f)(lr.expand(2))[0])):
        try:
            _, found = transform(value)(lr.detach())
        except HyperparameterError:
            continue
        assert math.isclose(found.item(), floor)  # if it is not refused


def test_a_tensor_that_is_no_single_rate() -> None:
    for lr in (torch.rand(3), torch.rand(1)):
        rate = optim.schedule(schedulers.StepLR, lr=lr.requires_grad_(), step_size=1)
        with pytest.raises(HyperparameterError):
            used(rate)


def test_a_schedule_that_has_ended_says_so() -> None:
    rate = optim.schedule(schedulers.OneCycleLR, lr=0.1, max_lr=0.4, total_steps=3)
    at_all(rate, 3)
    with pytest.raises(ValueError, match="total steps"):
        rate(torch.tensor(5))
