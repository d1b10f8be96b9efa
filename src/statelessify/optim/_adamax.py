"""Adamax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arithmetic import addcdiv, lerp, like, power, scaled, with_decay
from ._hyperparameters import BETAS, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["adamax"]


def adamax(
    lr: Any = 2e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Adamax, Adam with the largest gradient for a scale, in the meaning of `torch.optim.Adamax`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        p = p - lr / (1 - beta1^t) * m / u

    Args:
        lr, eps, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        betas: a pair of these.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Kingma and Ba, Adam: a method for stochastic optimization (ICLR 2015), section 7.1.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adamax(lr={"body.*": 1e-3, "head.*": 1e-2})
    """
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    switches = {"maximize": maximize}
    refuse_unknown("adamax", unknown, [*numbers, *switches])
    return Rule("adamax", _prepare, _update, numbers, switches, {"betas": BETAS}, ("exp_avg", "exp_inf")).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    return Coefficients({**values, "step_size": -values["lr"] / (1 - power(values["betas"][0], t))})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    beta1, beta2 = c["betas"]
    p, g = with_decay(p, g, c)
    m = lerp(slots["exp_avg"], g, 1 - beta1)
    u = torch.maximum(scaled(slots["exp_inf"], beta2), g.abs() + like(c["eps"], p))
    return addcdiv(p, m, u, c["step_size"]), {"exp_avg": m, "exp_inf": u}
