"""Weight normalization by elementary operations."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ._registry import rule

__all__: list[str] = []


@rule(
    cast("Any", torch)._weight_norm,
    why="its second derivative is wrong in torch 2.13, without an error",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/WeightNorm.cpp",
    when="always",
)
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g * v / |v|``, the norm taken over all dimensions but `dim`; over all of them for -1."""
    dims = None if dim == -1 else [each for each in range(v.ndim) if each != dim % v.ndim]
    norm = cast("Any", torch.linalg).vector_norm(v, dim=dims, keepdim=dim != -1)
    return v * (g / norm)
