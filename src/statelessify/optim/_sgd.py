"""Stochastic gradient descent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import HyperparameterError
from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer, elementwise, is_zero

__all__ = ["sgd"]


def sgd(
    lr: Any = 1e-3,
    momentum: Any = 0,
    dampening: Any = 0,
    weight_decay: Any = 0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    **unknown: Any,
) -> Optimizer:
    """Stochastic gradient descent, with the names, defaults and meanings of `torch.optim.SGD`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`)::

        buffer = momentum * buffer + (1 - dampening) * g      # the first time: buffer = g
        p      = p - lr * (g + momentum * buffer if nesterov else buffer)

    Args:
        lr, momentum, dampening, weight_decay: each a number, a 0-dim tensor, a dict from names or globs to these or to
            tensors that broadcast to the parameter, a callable of the step, or `per_task`.
        nesterov: look ahead; needs momentum and no dampening.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning (ICML 2013).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.sgd(lr={"body.*": 0.01, "head.*": torch.tensor(0.1, requires_grad=True)})
    """
    refuse_unknown("sgd", unknown, ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"))
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise HyperparameterError(
            f"`nesterov=True` needs momentum and no dampening; given momentum={momentum!r}, dampening={dampening!r}"
        )
    with_momentum, with_decay, dampened = not is_zero(momentum), not is_zero(weight_decay), not is_zero(dampening)

    def prepare(values: dict[str, Any], step: Tensor) -> Any:
        # The first buffer is the gradient itself, without dampening.
        return (step != 0).to(torch.float64) if dampened and with_momentum else None

    def update(
        p: Tensor, g: Tensor, slots: dict[str, Tensor], values: dict[str, Any], warm: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        g = -g if maximize else g
        g = g + values["weight_decay"] * p if with_decay else g
        if with_momentum:
            fresh = g if warm is None else g - (warm * values["dampening"]).to(g.device, g.dtype) * g
            buffer = values["momentum"] * slots["momentum_buffer"] + fresh
            slots = {"momentum_buffer": buffer}
            g = g + values["momentum"] * buffer if nesterov else buffer
        lr = values["lr"]
        return p - lr * g if isinstance(lr, Tensor) else torch.sub(p, g, alpha=lr), slots

    return elementwise(
        {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay},
        {"dampening": Range(low=-math.inf)},
        ("momentum_buffer",) if with_momentum else (),
        update,
        prepare,
    )
