"""Adadelta."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._arithmetic import add, addcmul, like, root, scaled, with_decay
from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["adadelta"]


def adadelta(
    lr: Any = 1.0,
    rho: Any = 0.9,
    eps: Any = 1e-6,
    weight_decay: Any = 0,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Adadelta, with the names, defaults and meanings of `torch.optim.Adadelta`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`)::

        v = rho * v + (1 - rho) * g^2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d^2
        p = p - lr * d

    Args:
        lr, eps, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        rho: the same, from 0 to 1.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Zeiler, ADADELTA: an adaptive learning rate method (2012, arXiv:1212.5701).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adadelta(rho=torch.tensor(0.9, requires_grad=True))
    """
    numbers = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    switches = {"maximize": maximize}
    refuse_unknown("adadelta", unknown, [*numbers, *switches])
    ranges = {"rho": Range(high=1.0, ends="[]")}
    return Rule("adadelta", _prepare, _update, numbers, switches, ranges, ("square_avg", "acc_delta")).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    return Coefficients(values)


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    p, g = with_decay(p, g, c)
    rho, eps = c["rho"], like(c["eps"], p)
    square = addcmul(scaled(slots["square_avg"], rho), g, g, 1 - rho)
    delta = root(slots["acc_delta"] + eps) / root(square + eps) * g
    moved = addcmul(scaled(slots["acc_delta"], rho), delta, delta, 1 - rho)
    return add(p, delta, -c["lr"]), {"square_avg": square, "acc_delta": moved}
