"""Arithmetic out of place, which authors of differentiable optimizers import from higher under private names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def add(tensor: Tensor, a1: Any, a2: Any = None) -> Tensor:
    """``tensor + a1``, or ``tensor + a1 * a2``."""
    return tensor + (a1 if a2 is None else a1 * a2)


def addcdiv(tensor: Tensor, a1: Any, a2: Any, a3: Any = None) -> Tensor:
    """``tensor + a1 / a2``, or ``tensor + a1 * a2 / a3``."""
    return tensor + (a1 / a2 if a3 is None else a1 * (a2 / a3))


def addcmul(tensor: Tensor, a1: Any, a2: Any, a3: Any = None) -> Tensor:
    """``tensor + a1 * a2``, or ``tensor + a1 * a2 * a3``."""
    return tensor + (a1 * a2 if a3 is None else a1 * a2 * a3)


def mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that makes a gradient zero where `mask` is True, and the gradients of that gradient too."""
    return partial(_masked, mask)


def maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    """Let no gradient through a tensor where `mask` is True; torch.func does not run such hooks."""
    if tensor.requires_grad:
        tensor.register_hook(mask_closure(mask))


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    kept = torch.where(mask, 0.0, gradient)
    maybe_mask(kept, mask)
    return kept
