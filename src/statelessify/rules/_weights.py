"""Weights made of a direction and a length."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .._transforms import transforming
from ._fused import twice_differentiable
from ._registry import rule

__all__: list[str] = []

_fused: Any = cast("Any", torch)._weight_norm


@rule(
    _fused,
    why="its second derivative is wrong, no error",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/WeightNorm.cpp",
    when="always",
)
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, the norm over all dimensions but `dim`; over all of them if that is -1."""
    if transforming() or torch.compiler.is_compiling():
        return _composed(v, g, dim)

    def fused(v: Tensor, g: Tensor) -> Tensor:
        return _fused(v, g, dim)

    def composed(v: Tensor, g: Tensor) -> Tensor:
        return _composed(v, g, dim)

    return twice_differentiable(fused, composed, v, g)


def _composed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    others = [other for other in range(v.ndim) if dim == -1 or other != dim % v.ndim]
    square = (v * v).sum(others, keepdim=dim != -1) if others else v * v
    return v * (g / square.sqrt())
