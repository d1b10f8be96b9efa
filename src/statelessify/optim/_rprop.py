"""Rprop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._arithmetic import at_least, at_most, is_zero, like, where
from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["rprop"]


def rprop(
    lr: Any = 1e-2,
    etas: Any = (0.5, 1.2),
    step_sizes: Any = (1e-6, 50),
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Rprop, with the names, defaults and meanings of `torch.optim.Rprop`.

    Each entry has a step size `s`, at first `lr`. With ``g = grad`` (``-grad`` if `maximize`)::

        s = clamp(s * etas[1], step_sizes)           where g * g_before > 0
        s = clamp(s * etas[0], step_sizes); g = 0    where g * g_before < 0
        p = p - s * sign(g)

    Only signs of the gradient count, so that its derivative is zero almost everywhere: the meta-gradient reaches the
    initial parameters and the hyperparameters, not what shapes the gradient.

    Args:
        lr: a hyperparameter (`statelessify.optim` lists what it may be).
        etas: a pair of these, the first between 0 and 1, the second above 1.
        step_sizes: a pair of these, the least and the largest step.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Riedmiller and Braun, A direct adaptive method for faster backpropagation learning (ICNN 1993).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.rprop(lr=torch.tensor(0.01, requires_grad=True))
    """
    numbers = {"lr": lr, "etas": etas, "step_sizes": step_sizes}
    switches = {"maximize": maximize}
    refuse_unknown("rprop", unknown, [*numbers, *switches])
    anything = Range(low=-math.inf)
    ranges = {"etas": (Range(high=1.0, ends="()"), Range(low=1.0, ends="()")), "step_sizes": (anything, anything)}
    return Rule("rprop", _prepare, _update, numbers, switches, ranges, ("prev", "step_size")).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    return Coefficients({**values, "initial": where(t == 1, values["lr"], 0)})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    g = -g if c["maximize"] else g
    (smaller, larger), (least, most) = c["etas"], c["step_sizes"]
    sign = torch.sign(g) * torch.sign(slots["prev"])  # the product itself may vanish
    size = slots["step_size"] if is_zero(c["initial"]) else slots["step_size"] + like(c["initial"], p)
    factor = torch.ones_like(p)
    factor = torch.where(sign > 0, like(larger, p), torch.where(sign < 0, like(smaller, p), factor))
    size = at_most(at_least(size * factor, least), most)
    g = torch.where(sign < 0, 0.0, g)
    return torch.addcmul(p, torch.sign(g), size, value=-1), {"prev": g, "step_size": size}
