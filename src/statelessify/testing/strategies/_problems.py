"""Whole problems of meta-learning: a loss of one task, parameters, and tasks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..._stateless import stateless
from . import _options
from ._layers import Wanted
from ._losses import losses
from ._modules import NAMES, Finish, Plan, finished, needs_several, plans
from ._printing import print_call
from ._recipe import Call, call
from ._tasks import KINDS, Batch, tasks

__all__ = ["Problem", "TaskLoss", "problem", "problems"]


@dataclass(frozen=True, eq=False)
class TaskLoss:
    """``criterion(apply(params, buffers, x), y)``: a loss of one task.

    Attributes:
        apply, buffers: of a module.
        criterion: of its output and a target.
    """

    apply: Callable[..., Any]
    buffers: dict[str, Tensor]
    criterion: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, params: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss of a batch ``(x, y)`` of one task."""
        x, y = batch
        return self.criterion(self.apply(params, self.buffers, x)[0], y)


class Problem(NamedTuple):
    """Everything that `adapt_tasks` is called with, save the optimizer.

    Attributes:
        loss: ``loss(params, batch)`` of one task.
        params: the module's trainable parameters, detached copies.
        supports, queries: batches ``(x, y)`` with leading dimensions ``(tasks, shots, ...)``.
        module: what the parameters come from.
    """

    loss: TaskLoss
    params: dict[str, Tensor]
    supports: Batch
    queries: Batch
    module: nn.Module

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        parts = {"*0": self.module, "*1": self.loss.criterion, "*2": self.supports, "*3": self.queries}
        print_call(printer, "problem", parts)


def problem(
    module: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], supports: Batch, queries: Batch
) -> Problem:
    """The problem of a module and a criterion: what `problems` prints.

    Args:
        module: one tensor in, one tensor out.
        criterion: of its output and a target.
        supports, queries: batches ``(x, y)`` with leading dimensions ``(tasks, shots, ...)``.

    Returns:
        A `Problem` whose parameters and buffers are detached copies of the module's.

    Example:
        >>> tasks = torch.zeros(4, 3, 1), torch.ones(4, 3, 1)
        >>> loss, params, *_ = problem(nn.Linear(1, 1), nn.MSELoss(), tasks, tasks)
        >>> loss(params, (torch.zeros(3, 1), torch.ones(3, 1))).shape
        torch.Size([])
    """
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    return Problem(TaskLoss(apply, buffers, criterion), params, supports, queries, module)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    kind: str | None = None,
    layers: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    smooth: bool = False,
    training: bool | None = None,
    max_depth: int = 2,
    max_tasks: int = 2,
) -> Problem:
    """Problems of meta-learning, small: a deterministic module, a criterion and a few tasks.

    Args:
        kind: ``"regression"`` or ``"classification"``. None: either.
        layers: families of layers, as `modules` has them, for floating-point inputs; a last linear layer may come on
            top. None: all but ``"bilinear"``, which torch cannot map over tasks.
        dtype: of everything. None: float32 or float64.
        smooth: only layers and criteria with derivatives of every order that finite differences can follow.
        training: the mode of the module, as `modules` has it.
        max_depth: the most layers before the last linear one.
        max_tasks: the most tasks.

    Returns:
        A strategy of `Problem`; hypothesis prints them as calls of `problem`.

    Raises:
        InvalidArgument: at draw time, if the options leave no problem.

    Example:
        >>> from hypothesis import find
        >>> loss, params, supports, queries, module = find(problems(dtype=torch.float64), lambda problem: True)
        >>> module
        Linear(in_features=1, out_features=1, bias=True)
    """
    _options.one_of("kind", kind, KINDS)
    _options.floating("dtype", dtype)
    _options.count("max_depth", max_depth)
    _options.count("max_tasks", max_tasks)
    names = _options.chosen("layers", layers, NAMES)
    kind = kind or draw(st.sampled_from(KINDS))
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    left_out = ("embedding",) if layers is not None else ("embedding", "bilinear")
    names = tuple(name for name in names if name not in left_out)
    plan = draw(plans(names, Wanted(smooth, False), max_depth, None))
    classes = None
    if kind == "classification":
        classes = draw(st.integers(1, 3))
        plan = _headed(plan, classes)
    module = finished(draw, plan, Finish(dtype, training, True))
    if not any(parameter.requires_grad for parameter in module.parameters()):
        plan = _headed(plan, plan.out[-1])
        module = finished(draw, plan, Finish(dtype, training, False))
    criterion = draw(losses(kind=kind, classes=classes, dtype=dtype, smooth=smooth))
    features = cast("tuple[int, ...]", plan.takes[0])
    least = 2 if any(map(needs_several, module.modules())) else 1
    shots = draw(st.integers(least, 2))
    supports, queries = draw(
        tasks(
            kind=kind,
            tasks=draw(st.integers(1, max_tasks)),
            shots=shots,
            features=features,
            outputs=None if kind == "classification" else plan.out,
            classes=classes,
            dtype=dtype,
        )
    )
    return problem(module, criterion, supports, queries)


def _headed(plan: Plan, outputs: int) -> Plan:
    """A plan with a linear layer on top, that all has a vector as its output."""
    flat = (call(nn.Flatten),) if len(plan.out) > 1 else ()
    layers: tuple[Call, ...] = (*plan.layers, *flat, call(nn.Linear, math.prod(plan.out), outputs))
    return Plan(layers, plan.takes, (outputs,))
