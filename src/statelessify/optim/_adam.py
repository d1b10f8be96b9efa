"""Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer, elementwise, is_zero, safe_sqrt

__all__ = ["adam"]


class _Corrections(NamedTuple):
    """What the step count adds to the rule: ``lr / (1 - beta1^t)`` and ``sqrt(1 - beta2^t)``, in float64."""

    step_size: Tensor
    root2: Tensor


def _power(beta: Any, exponent: Tensor) -> Tensor:
    return (beta.to(exponent.device, torch.float64) if isinstance(beta, Tensor) else beta) ** exponent


def adam(
    lr: Any = 1e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    **unknown: Any,
) -> Optimizer:
    """Adam, with the names, defaults and meanings of `torch.optim.Adam`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    The derivative is finite and exact also where a gradient is zero.

    Args:
        lr, eps, weight_decay: each a number, a 0-dim tensor, a dict from names or globs to these or to tensors that
            broadcast to the parameter, a callable of the step, or `per_task`.
        betas: a pair of these.
        amsgrad: divide by the largest ``v`` so far.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Kingma and Ba, Adam: a method for stochastic optimization (ICLR 2015); Reddi et al., On the convergence of
    Adam and beyond (ICLR 2018) for `amsgrad`.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adam(lr=torch.tensor(0.1, requires_grad=True), betas=(0.9, lambda step: 0.99))
    """
    refuse_unknown("adam", unknown, ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"))
    if isinstance(betas, list):
        betas = tuple(betas)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    with_decay = not is_zero(weight_decay)

    def prepare(values: dict[str, Any], step: Tensor) -> _Corrections:
        t = (step + 1).to(torch.float64)
        beta1, beta2 = values["betas"]
        rate = values["lr"].to(t.device) if isinstance(values["lr"], Tensor) else values["lr"]
        return _Corrections(rate / (1 - _power(beta1, t)), torch.sqrt(1 - _power(beta2, t)))

    def update(
        p: Tensor, g: Tensor, slots: dict[str, Tensor], values: dict[str, Any], at: _Corrections
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g = -g if maximize else g
        g = g + values["weight_decay"] * p if with_decay else g
        beta1, beta2 = values["betas"]
        m = beta1 * slots["exp_avg"] + (1 - beta1) * g
        v = beta2 * slots["exp_avg_sq"] + (1 - beta2) * (g * g)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if amsgrad:
            new["max_exp_avg_sq"] = v = torch.maximum(slots["max_exp_avg_sq"], v)
        denominator = safe_sqrt(v) / at.root2.to(p.device, p.dtype) + values["eps"]
        return p - at.step_size.to(p.device, p.dtype) * (m / denominator), new

    return elementwise(
        {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        {"betas": Range(high=1.0)},
        ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())),
        update,
        prepare,
        pairs=("betas",),
    )
