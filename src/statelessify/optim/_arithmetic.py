"""Out-of-place arithmetic in which every number may also be a tensor, and roots are safe at zero.

The order of operations is torch.optim's, so that results are the same bit for bit where all numbers are plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._transforms import transforming

__all__: list[str] = []

Number = float | Tensor
"""A plain number, or a tensor that broadcasts to what it is combined with."""


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the number zero (a tensor that happens to be zero may still need a gradient)."""
    return isinstance(value, (int, float)) and value == 0


def wide(value: Any) -> Any:
    """A 0-dim tensor in float64, in which Python computes with plain numbers; anything else as it is."""
    return value.to(torch.float64) if isinstance(value, Tensor) and value.ndim == 0 else value


def number(x: Tensor) -> Any:
    """A 0-dim tensor as a plain number where it is one, else in float64."""
    if transforming() or x.requires_grad or x.ndim:
        return wide(x)
    return x.item()


def like(value: Any, x: Tensor) -> Any:
    """A number as it is, a tensor in the dtype and on the device of `x`: it never promotes it."""
    return value.to(x.device, x.dtype) if isinstance(value, Tensor) else value


def scaled(x: Tensor, scale: Number) -> Tensor:
    return x * like(scale, x)


def add(x: Tensor, y: Tensor, scale: Number) -> Tensor:
    """``x + scale * y``."""
    if isinstance(scale, Tensor):
        return torch.addcmul(x, y, like(scale, x))
    if torch.compiler.is_compiling():
        # Where y is a product of matrices, inductor of torch 2.13 makes addmm of this and drops `alpha`; so it did in
        # https://github.com/pytorch/pytorch/issues/195442.
        return x + y * scale
    return torch.add(x, y, alpha=scale)


def lerp(x: Tensor, y: Tensor, weight: Number) -> Tensor:
    """``x + weight * (y - x)``."""
    return torch.lerp(x, y, like(weight, x))


def addcmul(x: Tensor, a: Tensor, b: Tensor, scale: Number) -> Tensor:
    """``x + scale * a * b``."""
    if isinstance(scale, Tensor):
        return torch.addcmul(x, a * like(scale, x), b)
    return torch.addcmul(x, a, b, value=scale)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, scale: Number) -> Tensor:
    """``x + scale * a / b``."""
    if isinstance(scale, Tensor):
        return torch.addcdiv(x, a * like(scale, x), b)
    return torch.addcdiv(x, a, b, value=scale)


def power(base: Any, exponent: Any) -> Any:
    """``base ** exponent``; in float64 where one of them is a tensor."""
    if not isinstance(base, Tensor) and not isinstance(exponent, Tensor):
        return base**exponent
    if isinstance(base, Tensor):
        base = base.to(torch.float64)
    if isinstance(exponent, Tensor):
        exponent = exponent.to(torch.float64)
        if isinstance(base, Tensor):
            exponent = exponent.to(base.device)
    return base**exponent


def where(condition: Any, this: Any, other: Any) -> Any:
    """`this` if the condition, a truth value or a tensor of them, holds, else `other`."""
    if not isinstance(condition, Tensor):
        return this if condition else other
    if not isinstance(this, Tensor) and not isinstance(other, Tensor):  # torch would make them float32
        this = torch.full_like(condition, this, dtype=torch.float64)
    device = this.device if isinstance(this, Tensor) else other.device
    return torch.where(condition.to(device), this, other)


def at_least(x: Any, low: Any) -> Any:
    """The larger one, elementwise; the derivative goes to whichever it is."""
    if isinstance(x, Tensor):
        return torch.maximum(x, like(low, x)) if isinstance(low, Tensor) else x.clamp(min=low)
    return at_least(low, x) if isinstance(low, Tensor) else max(x, low)


def at_most(x: Any, high: Any) -> Any:
    """The smaller one, elementwise; the derivative goes to whichever it is."""
    if isinstance(x, Tensor):
        return torch.minimum(x, like(high, x)) if isinstance(high, Tensor) else x.clamp(max=high)
    return at_most(high, x) if isinstance(high, Tensor) else min(x, high)


def decayed(values: dict[str, Any]) -> Any:
    """``1 - lr * weight_decay``, the factor of a decoupled decay; None where there is no decay."""
    return None if is_zero(values["weight_decay"]) else 1 - values["lr"] * values["weight_decay"]


def with_decay(p: Tensor, g: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after `maximize` and weight decay, which is coupled unless there is a factor `decay`."""
    g = -g if c["maximize"] else g
    if is_zero(c["weight_decay"]):
        return p, g
    return (p, add(g, p, c["weight_decay"])) if c.get("decay") is None else (scaled(p, c["decay"]), g)


def norm(x: Tensor, **options: Any) -> Tensor:
    """The norm of a vector, or along `dim`, with derivatives of any order zero where it is zero."""
    plain = cast("Callable[..., Tensor]", torch.linalg.vector_norm)
    zero = plain(x.detach(), **options) == 0
    return torch.where(zero, 0.0, plain(torch.where(zero, 1.0, x), **options))


def root(x: Tensor, eps: Any = 0.0) -> Tensor:
    """``sqrt(x)`` with slope 0 at 0, so that no product with an infinite derivative becomes NaN.

    Exact for ``g / (sqrt(g * g) + eps)``, whose derivative at ``g = 0`` is ``1 / eps``.
    `eps` is what is added to it: where that swallows the root of the smallest normal number, fewer operations do.
    """
    info = torch.finfo(x.dtype)
    # Below it the second derivative overflows; in float16 the smallest normal number is too large to be dropped.
    floor = info.tiny if info.tiny < 1e-30 else info.smallest_normal * info.eps
    if isinstance(eps, (int, float)) and eps * info.eps > 4 * floor**0.5:
        return F.threshold(x.clamp(min=floor).sqrt(), floor**0.5, 0.0)
    return torch.where(x > floor, x.clamp(min=floor).sqrt(), x.detach().clamp(min=0.0).sqrt())
