"""Adagrad."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._arithmetic import addcdiv, addcmul, is_zero, like, root, where, with_decay
from ._hyperparameters import refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["adagrad"]


def adagrad(
    lr: Any = 1e-2,
    lr_decay: Any = 0,
    weight_decay: Any = 0,
    initial_accumulator_value: Any = 0,
    eps: Any = 1e-10,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Adagrad, with the names, defaults and meanings of `torch.optim.Adagrad`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        s = s + g^2                                  # the first time from s = initial_accumulator_value
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Args:
        lr, lr_decay, weight_decay, initial_accumulator_value, eps: hyperparameters (`statelessify.optim` lists what
            each may be).
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Duchi et al., Adaptive subgradient methods for online learning and stochastic optimization (JMLR 2011).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adagrad(lr=0.1, initial_accumulator_value=torch.tensor(0.1, requires_grad=True))
    """
    numbers = {
        "lr": lr,
        "lr_decay": lr_decay,
        "weight_decay": weight_decay,
        "initial_accumulator_value": initial_accumulator_value,
        "eps": eps,
    }
    switches = {"maximize": maximize}
    refuse_unknown("adagrad", unknown, [*numbers, *switches])
    return Rule("adagrad", _prepare, _update, numbers, switches, slots=("sum",)).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    initial = where(t == 1, values["initial_accumulator_value"], 0)
    return Coefficients({**values, "initial": initial, "rate": -values["lr"] / (1 + (t - 1) * values["lr_decay"])})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    p, g = with_decay(p, g, c)
    total = slots["sum"] if is_zero(c["initial"]) else slots["sum"] + like(c["initial"], p)
    total = addcmul(total, g, g, 1)
    return addcdiv(p, g, root(total, c["eps"]) + like(c["eps"], p), c["rate"]), {"sum": total}
