"""Averaged stochastic gradient descent."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._arithmetic import add, at_least, like, number, power, scaled, where, with_decay
from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["asgd"]


def asgd(
    lr: Any = 1e-2,
    lambd: Any = 1e-4,
    alpha: Any = 0.75,
    t0: Any = 1e6,
    weight_decay: Any = 0,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Averaged stochastic gradient descent, with the names, defaults and meanings of `torch.optim.ASGD`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        p   = p * (1 - lambd * eta) - eta * g                 # the first time eta = lr
        ax  = ax + (p - ax) / max(1, t - 1 - t0)
        eta = lr / (1 + lambd * lr * t)^alpha                 # for the next step

    The average of the parameters is the slot `ax` of the state.

    Args:
        lr, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        lambd, alpha, t0: the same, of any sign.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging (SIAM J. Control Optim. 1992).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.asgd(lr=torch.tensor(0.1, requires_grad=True), t0=10)
    """
    numbers = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
    switches = {"maximize": maximize}
    refuse_unknown("asgd", unknown, [*numbers, *switches])
    anything = Range(low=-math.inf)
    ranges = {"lambd": anything, "alpha": anything, "t0": anything}
    return Rule("asgd", _prepare, _update, numbers, switches, ranges, ("ax",), ("eta",)).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    lr, lambd = values["lr"], values["lambd"]
    eta = where(t == 1, lr, number(scalars["eta"]))
    following = lr / power(1 + lambd * lr * t, values["alpha"])
    known = {"eta": -eta, "shrunk": 1 - lambd * eta, "mu": where(t == 1, 1, 1 / at_least(t - 1 - values["t0"], 1))}
    stored = scalars["eta"]
    stored = like(following, stored) if isinstance(following, Tensor) else stored.new_tensor(following)
    return Coefficients({**values, **known}, {"eta": stored})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    _, g = with_decay(p, g, c)
    p = add(scaled(p, c["shrunk"]), g, c["eta"])
    if not isinstance(c["mu"], Tensor) and c["mu"] == 1:
        return p, {"ax": p.clone()}
    return p, {"ax": slots["ax"] + scaled(p - slots["ax"], c["mu"])}
