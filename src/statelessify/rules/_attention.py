"""Attention that can be differentiated twice, mapped over tasks, and does not depend on what requires a gradient."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._transforms import transforming
from ._fused import twice_differentiable
from ._registry import Rules, rule

__all__: list[str] = []

_fused: Any = F.scaled_dot_product_attention


def _composed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, options: dict[str, Any]
) -> Tensor:
    """``softmax(query key^T scale + mask) value`` as operations that have every derivative.

    The operator wants additive masks: a boolean one it would take for zeros and ones.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, dropout_p, **options)[0]


@rule(
    F.scaled_dot_product_attention,
    why="the fused kernels have no second derivative and no forward-mode derivative",
    upstream="https://github.com/pytorch/pytorch/issues/116350",
    when="always",
)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    inputs = [t for t in (query, key, value, attn_mask) if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_nested for t in inputs)
    if plain and (transforming() or dropout_p > 0):  # a dropout mask could not be drawn again in backward
        return _composed(query, key, value, attn_mask, dropout_p, options)
    if not plain:
        return _fused(query, key, value, attn_mask, dropout_p, **options)

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _fused(query, key, value, mask, **options)

    def composed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _composed(query, key, value, mask, 0.0, options)

    return twice_differentiable(fused, composed, query, key, value, attn_mask)


def _never(tensors: Any) -> bool:
    return False


# The same code, that no longer asks whether a mode wants to be called instead: it is run inside one.
_multi_head = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": _never},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


@rule(
    F.multi_head_attention_forward,
    why="it calls the fused kernel; and in evaluation its fast path's result depends on what requires a gradient",
    upstream="https://github.com/pytorch/pytorch/issues/97166",
    when="always",
)
def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return F.multi_head_attention_forward(*args, **kwargs)
    with Rules("transforms" if transforming() else "always"):
        return _multi_head(*args, **kwargs)
