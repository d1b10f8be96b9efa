"""RAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arithmetic import addcmul, decayed, lerp, like, power, root, scaled, where, with_decay
from ._hyperparameters import BETAS, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["radam"]


def radam(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    decoupled_weight_decay: Any = False,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Rectified Adam, with the names, defaults and meanings of `torch.optim.RAdam`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        R = 2 / (1 - beta2) - 1
        r = R - 2 * t * beta2^t / (1 - beta2^t)
        c = sqrt((r - 4) (r - 2) R / ((R - 4) (R - 2) r)) * sqrt(1 - beta2^t) / (sqrt(v) + eps)   # 1 unless r > 5
        p = p - lr * c * m / (1 - beta1^t)

    Args:
        lr, eps, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        betas: a pair of these.
        decoupled_weight_decay: decay as in `adamw`.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Liu et al., On the variance of the adaptive learning rate and beyond (ICLR 2020).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.radam(lr=0.01, weight_decay=1e-4, decoupled_weight_decay=True)
    """
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    switches = {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize}
    refuse_unknown("radam", unknown, [*numbers, *switches])
    return Rule("radam", _prepare, _update, numbers, switches, {"betas": BETAS}, ("exp_avg", "exp_avg_sq")).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    beta1, beta2 = values["betas"]
    correction2 = 1 - power(beta2, t)
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * power(beta2, t) / correction2
    active = length > 5.0
    inside = where(active, length, 6.0)  # where it is not active, any that has a root
    limit = where(active, most, 7.0)
    rectified = ((inside - 4) * (inside - 2) * limit / ((limit - 4) * (limit - 2) * inside)) ** 0.5
    known = {
        "correction1": 1 - power(beta1, t),
        "root2": correction2**0.5,
        "active": active,
        "rectified": rectified,
        "decay": decayed(values) if values["decoupled_weight_decay"] else None,
    }
    return Coefficients({**values, **known})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    beta1, beta2 = c["betas"]
    p, g = with_decay(p, g, c)
    m = lerp(slots["exp_avg"], g, 1 - beta1)
    v = addcmul(scaled(slots["exp_avg_sq"], beta2), g, g, 1 - beta2)
    move = m / like(c["correction1"], p) * like(c["lr"], p)
    if isinstance(c["active"], Tensor) or c["active"]:
        adaptive = like(c["root2"], p) / (root(v, c["eps"]) + like(c["eps"], p))
        move = where(c["active"], move * adaptive * like(c["rectified"], p), move)
    return torch.add(p, move, alpha=-1.0), {"exp_avg": m, "exp_avg_sq": v}
