"""Adafactor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError
from ._arithmetic import add, at_least, at_most, decayed, is_zero, lerp, like, norm, power, scaled
from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["adafactor"]


def adafactor(
    lr: Any = 1e-2,
    beta2_decay: Any = -0.8,
    eps: Any = (None, 1e-3),
    d: Any = 1.0,
    weight_decay: Any = 0.0,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Adafactor, which keeps row and column sums of squares, in the meaning of `torch.optim.Adafactor`.

    With ``g = grad`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...`` and ``b = t^beta2_decay``::

        R = R + b * (mean(g^2, -1) - R)              # of a matrix, or of a batch of them
        C = C + b * (mean(g^2, -2) - C)
        V = R C / max(mean(R, -2), eps1)             # of a vector: V = V + b * (g^2 - V)
        u = g / sqrt(max(V, eps1^2))
        a = max(eps2, rms(p)) * min(lr, 1 / sqrt(t))
        p = p * (1 - lr * weight_decay) - a * u / max(1, rms(u) / d)

    It is not elementwise. The derivative of `min` and `max` is that of the larger or smaller one.

    Args:
        lr, weight_decay: hyperparameters (`statelessify.optim` lists what each may be).
        beta2_decay: the same, 0 or below.
        eps: a pair ``(eps1, eps2)`` of the same; None is the parameter's machine epsilon.
        d: the same, 1 or above.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.
        DtypeError: a complex parameter.

    Source: Shazeer and Stern, Adafactor: adaptive learning rates with sublinear memory cost (ICML 2018).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.adafactor(lr=torch.tensor(0.01, requires_grad=True))
    """
    numbers = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
    switches = {"maximize": maximize}
    refuse_unknown("adafactor", unknown, [*numbers, *switches])
    ranges = {
        "beta2_decay": Range(low=-float("inf"), high=0.0, ends="[]"),
        "eps": (Range(optional=True), Range()),
        "d": Range(low=1.0),
    }
    rule = Rule(
        "adafactor",
        _prepare,
        _update,
        numbers,
        switches,
        ranges,
        ("row_var", "col_var", "variance"),
        elementwise=False,
        whole=frozenset({"beta2_decay"}),
        slot_shape=_slot_shape,
        check=_check,
    )
    return rule.optimizer()


def _check(name: str, leaf: Tensor) -> None:
    if leaf.is_complex():
        raise DtypeError(f"parameter `{name}` is complex, for which `adafactor` has no meaning; use `optim.adam`")


def _slot_shape(slot: str, shape: torch.Size) -> Sequence[int]:
    """Rows and columns of a matrix; a vector has no such, and a matrix no full variance."""
    if len(shape) < 2:
        return shape if slot == "variance" else (0,)
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1]), "variance": (0,)}[slot]


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    rate = at_most(values["lr"], 1 / power(t, 0.5))
    known = {"rate": rate, "weight": power(t, values["beta2_decay"]), "decay": decayed(values)}
    return Coefficients({**values, **known})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    eps1, eps2 = c["eps"]
    eps1 = torch.finfo(p.dtype).eps if eps1 is None else like(eps1, p)
    g = -g if c["maximize"] else g
    size = at_least(_rms(p), eps2) * c["rate"]
    p = p if is_zero(c["weight_decay"]) else scaled(p, c["decay"])
    slots = dict(slots)
    if g.ndim > 1:
        rows = norm(g, dim=-1, keepdim=True).square() / g.shape[-1]
        columns = norm(g, dim=-2, keepdim=True).square() / g.shape[-2]
        slots["row_var"] = rows = lerp(slots["row_var"], rows, c["weight"])
        slots["col_var"] = columns = lerp(slots["col_var"], columns, c["weight"])
        mean = rows.mean(dim=-2, keepdim=True)
        # A product of squares overflows early. To scale by a power of two changes no other bit.
        scale = torch.where(mean.detach().amax() > 2.0**60, 2.0**-64, 1.0).to(g.dtype)
        variance = (rows * scale) @ (columns * scale) / at_least(mean * scale, eps1 * scale) / scale
    else:
        slots["variance"] = variance = lerp(slots["variance"], g * g, c["weight"])
    move = at_least(variance, eps1 * eps1).rsqrt() * g
    clip = at_least(_rms(move) / c["d"], 1.0)
    return add(p, move, -size / clip), slots


def _rms(x: Tensor) -> Tensor:
    """The root of the mean square, in float64 as if it were a plain number."""
    return norm(x).to(torch.float64) / x.numel() ** 0.5
