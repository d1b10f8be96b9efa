"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arithmetic import addcdiv, addcmul, decayed, lerp, like, power, root, scaled, with_decay
from ._hyperparameters import BETAS, has, is_on, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["adam", "adamw"]


def adam(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    amsgrad: Any = False,
    *,
    maximize: Any = False,
    decoupled_weight_decay: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Adam, with the names, defaults and meanings of `torch.optim.Adam`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The derivative is finite and exact also where a gradient is zero.

    Args:
        lr, eps, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        betas: a pair of these.
        amsgrad: divide by the largest ``v`` so far.
        maximize: go up instead of down.
        decoupled_weight_decay: decay as in `adamw`.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Kingma and Ba, Adam: a method for stochastic optimization (ICLR 2015); Reddi et al., On the convergence of
    Adam and beyond (ICLR 2018) for `amsgrad`.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adam(lr=torch.tensor(0.1, requires_grad=True), betas=(0.9, lambda step: 0.99))
    """
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    switches = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay}
    return _adam("adam", numbers, switches, unknown)


def adamw(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 1e-2,
    amsgrad: Any = False,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """AdamW: `adam` in which the decay does not go through the moments, as `torch.optim.AdamW`.

    At step ``t = 1, 2, ...``, with ``g = grad`` (``-grad`` if `maximize`) and `adam`'s ``m`` and ``v``::

        p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        lr, eps, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        betas: a pair of these.
        amsgrad: divide by the largest ``v`` so far.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization (ICLR 2019).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adamw(weight_decay={"*.weight": 0.1, "*.bias": 0.0})
    """
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return _adam("adamw", numbers, {"amsgrad": amsgrad, "maximize": maximize}, unknown)


def _adam(name: str, numbers: dict[str, Any], switches: dict[str, Any], unknown: dict[str, Any]) -> Optimizer:
    refuse_unknown(name, unknown, [*numbers, *switches])
    slots = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if has(switches["amsgrad"], is_on) else ()))
    return Rule(name, _prepare, _update, numbers, switches, ranges={"betas": BETAS}, slots=slots).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    beta1, beta2 = values["betas"]
    decay = decayed(values) if values.get("decoupled_weight_decay", True) else None
    step_size, root2 = -values["lr"] / (1 - power(beta1, t)), (1 - power(beta2, t)) ** 0.5
    return Coefficients({**values, "step_size": step_size, "root2": root2, "decay": decay})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    beta1, beta2 = c["betas"]
    p, g = with_decay(p, g, c)
    m = lerp(slots["exp_avg"], g, 1 - beta1)
    v = addcmul(scaled(slots["exp_avg_sq"], beta2), g, g, 1 - beta2)
    slots = {**slots, "exp_avg": m, "exp_avg_sq": v}
    if c["amsgrad"]:
        slots["max_exp_avg_sq"] = v = torch.maximum(slots["max_exp_avg_sq"], v)
    return addcdiv(p, m, root(v, c["eps"]) / like(c["root2"], p) + like(c["eps"], p), c["step_size"]), slots
