"""Stochastic gradient descent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._transforms import unseen
from ..errors import HyperparameterError
from ._arithmetic import add, is_zero, scaled, where, with_decay
from ._hyperparameters import Range, has, is_nonzero, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, ListedSlots, Rule, Slots, Values

__all__ = ["sgd"]

_torch: Any = torch  # its stubs do not have the operations on lists
LISTED = 2**12  # entries in all that an operation on lists may keep alive at each step


def sgd(
    lr: Any = 1e-3,
    momentum: Any = 0,
    dampening: Any = 0,
    weight_decay: Any = 0,
    nesterov: Any = False,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Stochastic gradient descent, with the names, defaults and meanings of `torch.optim.SGD`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`)::

        buffer = momentum * buffer + (1 - dampening) * g      # the first time: buffer = g
        p      = p - lr * (g + momentum * buffer if nesterov else buffer)

    Args:
        lr, momentum, dampening, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
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
    numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    switches = {"nesterov": nesterov, "maximize": maximize}
    refuse_unknown("sgd", unknown, [*numbers, *switches])
    if nesterov is True and (is_zero(momentum) or not (is_zero(dampening) or isinstance(dampening, Tensor))):
        raise HyperparameterError(
            f"`nesterov=True` needs momentum and no dampening; given momentum={momentum!r}, dampening={dampening!r}"
        )
    slots = ("momentum_buffer",) if has(momentum, is_nonzero) else ()
    ranges = {"dampening": Range(low=-math.inf)}
    return Rule("sgd", _prepare, _update, numbers, switches, ranges, slots, lists=_update_lists).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    # The first buffer is the gradient itself, without dampening.
    dampening = values["dampening"]
    fresh = 1 if is_zero(dampening) else where(t == 1, 1.0, 1 - dampening)
    return Coefficients({**values, "fresh": fresh})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    p, g = with_decay(p, g, c)
    if not is_zero(c["momentum"]):
        buffer = add(scaled(slots["momentum_buffer"], c["momentum"]), g, c["fresh"])
        slots = {"momentum_buffer": buffer}
        g = add(g, buffer, c["momentum"]) if c["nesterov"] else buffer
    return add(p, g, -c["lr"]), slots


def _update_lists(
    ps: list[Tensor], gs: list[Tensor], slots: ListedSlots, c: Values
) -> tuple[list[Tensor], ListedSlots]:
    """`_update` for plain numbers: for small leaves one node of the graph, where each would have its own."""
    if c["maximize"]:
        gs = list(_torch._foreach_neg(gs))
    if c["weight_decay"]:
        gs = _added(gs, ps, c["weight_decay"])
    if c["momentum"]:
        kept = list(_torch._foreach_mul(slots["momentum_buffer"], c["momentum"]))
        buffers = _added(kept, gs, c["fresh"])
        slots = {"momentum_buffer": buffers}
        gs = _added(gs, buffers, c["momentum"]) if c["nesterov"] else buffers
    return _added(ps, gs, -c["lr"]), slots


def _added(xs: list[Tensor], ys: list[Tensor], scale: float) -> list[Tensor]:
    """``x + scale * y`` of each pair; as one operation where they are small, as its graph keeps all of them alive."""
    if torch.compiler.is_compiling():
        return [add(x, y, scale) for x, y in zip(xs, ys, strict=True)]
    with unseen():
        small = sum(map(Tensor.numel, xs)) <= LISTED
    if small:
        return list(_torch._foreach_add(xs, ys, alpha=scale))
    return [torch.add(x, y, alpha=scale) for x, y in zip(xs, ys, strict=True)]
