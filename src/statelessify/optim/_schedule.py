"""Schedules of `torch.optim.lr_scheduler` as callables of the step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .._transforms import unwrapped
from ..errors import HyperparameterError
from ._hyperparameters import Range

__all__ = ["schedule"]

_PLATEAU = "`ReduceLROnPlateau` follows a metric, not the step; call `adapt` a few steps at a time, and choose `lr`"
_BASES = (1.0, 2.0, 3.0)  # learning rates at which a schedule is tried, to see that it is linear in them


def schedule(
    scheduler: Callable[..., Any] | LRScheduler, lr: Any = None, *, group: int = 0, **options: Any
) -> Callable[[Tensor], Any]:
    """A learning rate that follows a schedule of `torch.optim.lr_scheduler`.

    Args:
        scheduler: a class of `torch.optim.lr_scheduler`; or a function that makes a scheduler for an optimizer; or a
            live scheduler, which the result follows from where that stands now, and does not change.
        lr: the learning rate that the schedule starts from, for a class or a function: a number, or a tensor, which
            the gradient reaches if the schedule is linear in it (all of torch's are).
        group: the parameter group of a live scheduler.
        options: what the class takes beside the optimizer.

    Returns:
        A callable of the step, for `lr` or any other hyperparameter.

    Raises:
        HyperparameterError: a schedule that needs more than the step, or is not linear in a tensor `lr`.

    Example:
        >>> from statelessify import optim
        >>> rate = optim.schedule(torch.optim.lr_scheduler.StepLR, lr=0.1, step_size=2)
        >>> [round(rate(torch.tensor(step)), 4) for step in range(4)]
        [0.1, 0.1, 0.01, 0.01]
    """
    if isinstance(scheduler, ReduceLROnPlateau) or scheduler is ReduceLROnPlateau:
        raise HyperparameterError(_PLATEAU)
    if isinstance(scheduler, LRScheduler):
        if lr is not None or options:
            raise HyperparameterError("a live scheduler has its learning rate and options; pass the scheduler alone")
        groups = cast("Any", scheduler.optimizer).param_groups
        if not 0 <= group < len(groups):
            raise HyperparameterError(f"`group={group}`: the optimizer has {len(groups)} parameter groups, from 0")
        return _Live(_Run(_copied(scheduler), group))
    if not callable(scheduler):
        raise HyperparameterError(f"`{scheduler!r}` is not a scheduler; write a class of `torch.optim.lr_scheduler`")
    if isinstance(lr, bool) or not isinstance(lr, (int, float, Tensor)):
        raise HyperparameterError(f"`lr={lr!r}`: write the learning rate that the schedule starts from")
    if not isinstance(lr, Tensor):
        Range().check("lr", lr)
    return _Schedule(scheduler, lr, options)


class _Run:
    """The learning rates of one scheduler, asked for in any order."""

    def __init__(self, scheduler: Any, group: int) -> None:
        self._scheduler, self._group = scheduler, group
        scheduler.optimizer._opt_called = True  # or it warns that the optimizer has not stepped
        self._rates = [self._now()]

    def _now(self) -> float:
        return float(self._scheduler.optimizer.param_groups[self._group]["lr"])

    def __getitem__(self, step: int) -> float:
        while len(self._rates) <= step:
            self._scheduler.step()
            self._rates.append(self._now())
        return self._rates[step]


class _Live:
    """What a live scheduler would go on to."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def __call__(self, step: Tensor) -> float:
        return self._run[int(step)]


class _Schedule:
    """What a scheduler makes of a learning rate."""

    def __init__(self, make: Callable[..., Any], lr: float | Tensor, options: dict[str, Any]) -> None:
        self._make, self._lr, self._options = make, lr, options
        self._seen: dict[float, _Run] = {}  # what the scheduler makes of values that the tensor had
        if isinstance(lr, Tensor):
            self._runs = [self._run_from(base) for base in _BASES]
        else:
            self._runs = [self._run_from(lr)]

    def __repr__(self) -> str:
        return f"schedule({getattr(self._make, '__name__', self._make)}, lr={self._lr!r})"

    def _run_from(self, lr: float) -> _Run:
        optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0, momentum=0.9)
        optimizer.param_groups[0]["lr"] = lr  # which may have been learned below zero
        scheduler = self._make(optimizer, **self._options)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise HyperparameterError(_PLATEAU)
        if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
            raise HyperparameterError(
                f"`{getattr(self._make, '__name__', self._make)}` made {type(scheduler).__name__}, not a scheduler"
            )
        return _Run(scheduler, 0)

    def __call__(self, step: Tensor) -> Any:
        at = int(step)
        if not isinstance(self._lr, Tensor):
            return self._runs[0][at]
        first, second, third = (run[at] for run in self._runs)
        slope, offset = second - first, 2 * first - second
        linear = abs(offset + 3 * slope - third) <= 1e-9 * (1 + abs(third))
        values = cast("list[float]", unwrapped(self._lr).detach().flatten().tolist()) if linear else []
        for value in values:
            if value not in self._seen:
                self._seen[value] = self._run_from(value)
            true = self._seen[value][at]
            linear = linear and abs(offset + value * slope - true) <= 1e-9 * (1 + abs(true))
        if not linear:
            raise HyperparameterError(
                f"{self!r} is not linear in its learning rate, so that no gradient can reach it; pass a number, or "
                "write the schedule as a function of the step"
            )
        return offset + slope * self._lr


def _copied(scheduler: LRScheduler) -> Any:
    """A copy that goes on by itself, with its optimizer but without the parameters and their state."""
    optimizer = cast("Any", scheduler.optimizer)
    memo: dict[int, Any] = {id(optimizer.state): {}}
    for group in optimizer.param_groups:
        memo[id(group["params"])] = []
    copied = copy.deepcopy(scheduler, memo)
    cast("Any", copied.optimizer).step = _stepped
    return copied


def _stepped() -> None:
    """Stands for an optimizer's step, which schedulers look at to warn of a wrong order."""


_stepped._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess]
