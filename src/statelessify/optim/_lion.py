"""Lion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arithmetic import add, decayed, lerp, with_decay
from ._hyperparameters import BETAS, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["lion"]


def lion(
    lr: Any = 1e-4,
    betas: Any = (0.9, 0.99),
    weight_decay: Any = 0,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Lion, evolved sign momentum.

    With ``g = grad`` (``-grad`` if `maximize`)::

        p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    Only a sign of the gradient counts, so that its derivative is zero almost everywhere: the meta-gradient reaches the
    initial parameters, `lr` and `weight_decay`, not the betas nor what shapes the gradient.

    Args:
        lr, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        betas: a pair of these.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Chen et al., Symbolic discovery of optimization algorithms (NeurIPS 2023), algorithm 2; defaults are those
    of its section 3.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.lion(lr=1e-4, weight_decay=0.1)
    """
    numbers = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    switches = {"maximize": maximize}
    refuse_unknown("lion", unknown, [*numbers, *switches])
    return Rule("lion", _prepare, _update, numbers, switches, {"betas": BETAS}, ("exp_avg",)).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    return Coefficients({**values, "decay": decayed(values)})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    beta1, beta2 = c["betas"]
    p, g = with_decay(p, g, c)
    p = add(p, torch.sign(lerp(slots["exp_avg"], g, 1 - beta1)), -c["lr"])
    return p, {"exp_avg": lerp(slots["exp_avg"], g, 1 - beta2)}
