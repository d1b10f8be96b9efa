"""The one contract of all optimizers: `Optimizer(init, step)`, and `OptState`, in which all that changes lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["OptState", "Optimizer"]


class OptState(NamedTuple):
    """The state of an optimizer, a tree.

    Attributes:
        step: updates so far, a 0-dim int64 tensor.
        hyperparameters: name -> number, tensor, dict, callable of the step, or `per_task`.
        slots: slot name -> a tree like the parameters (momentum buffers and such).
    """

    step: Tensor
    hyperparameters: dict[str, Any]
    slots: dict[str, Any]


class Optimizer(NamedTuple):
    """An optimizer as two pure functions, written for one task; build your own from any two.

    Attributes:
        init: ``init(params) -> state``; the state is any tree.
        step: ``step(params, grads, state) -> (params, state)``.
        elementwise: whether each entry of the result depends on that entry of the inputs only, so that `adapt_tasks`
            may give `step` all tasks at once. It does where the state is an `OptState` whose slots are like the
            parameters, and maps `step` over the tasks otherwise.

    Example:
        >>> from statelessify import optim
        >>> halve = optim.Optimizer(lambda p: (), lambda p, g, s: ({k: p[k] - 0.5 * g[k] for k in p}, s))
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    elementwise: bool = False
