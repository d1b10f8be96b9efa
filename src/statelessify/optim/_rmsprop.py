"""RMSprop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._arithmetic import add, addcdiv, addcmul, is_zero, lerp, like, root, scaled, with_decay
from ._hyperparameters import has, is_nonzero, is_on, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["rmsprop"]


def rmsprop(
    lr: Any = 1e-2,
    alpha: Any = 0.99,
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    momentum: Any = 0,
    centered: Any = False,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """RMSprop, with the names, defaults and meanings of `torch.optim.RMSprop`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`)::

        v = alpha * v + (1 - alpha) * g^2
        a = alpha * a + (1 - alpha) * g              # if centered, else 0
        b = momentum * b + g / (sqrt(v - a^2) + eps)
        p = p - lr * b

    Args:
        lr, alpha, eps, weight_decay, momentum: hyperparameters (`statelessify.optim` lists what each may be).
        centered: divide by the standard deviation.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Tieleman and Hinton, Lecture 6.5 (Coursera 2012); Graves, Generating sequences with recurrent neural
    networks (2013, arXiv:1308.0850) for `centered`.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.rmsprop(lr=0.01, alpha=torch.tensor(0.9, requires_grad=True), momentum=0.5)
    """
    numbers = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
    switches = {"centered": centered, "maximize": maximize}
    refuse_unknown("rmsprop", unknown, [*numbers, *switches])
    slots = ["square_avg"]
    slots += ["grad_avg"] if has(centered, is_on) else []
    slots += ["momentum_buffer"] if has(momentum, is_nonzero) else []
    return Rule("rmsprop", _prepare, _update, numbers, switches, slots=tuple(slots)).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    return Coefficients(values)


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    p, g = with_decay(p, g, c)
    alpha = c["alpha"]
    new = {**slots, "square_avg": addcmul(scaled(slots["square_avg"], alpha), g, g, 1 - alpha)}
    spread = new["square_avg"]
    if c["centered"]:
        new["grad_avg"] = average = lerp(slots["grad_avg"], g, 1 - alpha)
        spread = addcmul(spread, average, average, -1)
    denominator = root(spread, c["eps"]) + like(c["eps"], p)
    if is_zero(c["momentum"]):
        return addcdiv(p, g, denominator, -c["lr"]), new
    new["momentum_buffer"] = addcdiv(scaled(slots["momentum_buffer"], c["momentum"]), g, denominator, 1)
    return add(p, new["momentum_buffer"], -c["lr"]), new
