"""Attention that can be differentiated twice, mapped over tasks, and does not depend on what requires a gradient."""

from __future__ import annotations

import types
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._transforms import transforming
from ._fused import twice_differentiable
from ._registry import Rules, occasion_of_call, rule, rules_of_call

__all__: list[str] = []

_PLAIN, _IS_NESTED = {Tensor, nn.Parameter}, attrgetter("is_nested")
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
    inputs = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    plain = torch.compiler.is_compiling() or (
        _PLAIN.issuperset(map(type, inputs)) and not any(map(_IS_NESTED, inputs))  # which dynamo cannot follow
    )
    if plain and (dropout_p > 0 or transforming()):  # a dropout mask could not be drawn again in backward
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


def _twin(function: Any, **names: Any) -> Any:
    """The same code, in which some global names mean something else."""
    return types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )


# It no longer asks whether a mode wants to be called instead: it is run inside one.
_multi_head = _twin(F.multi_head_attention_forward, has_torch_function=_never)

# It needs no mode, which would take longer than what it computes.
_multi_head_alone = _twin(
    F.multi_head_attention_forward, has_torch_function=_never, scaled_dot_product_attention=_attention
)
# What asks this `torch` is told that the fast paths are switched off.
_slow = types.SimpleNamespace(
    **{**vars(torch), "backends": types.SimpleNamespace(mha=types.SimpleNamespace(get_fastpath_enabled=bool))}
)
_forward_alone = _twin(
    nn.MultiheadAttention.forward,
    torch=_slow,
    F=types.SimpleNamespace(**{**vars(F), "multi_head_attention_forward": _multi_head_alone}),
)
_layer_alone = _twin(nn.TransformerEncoderLayer.forward, torch=_slow)
_encoder_alone = _twin(nn.TransformerEncoder.forward, torch=_slow)

_FAST_PATH = "in evaluation the result of its fast path depends on what requires a gradient"
_MHA = "https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/activation.py"
_TRANSFORMER = "https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/transformer.py"


@rule(
    F.multi_head_attention_forward,
    why=f"it calls the fused kernel, which has no second derivative; {_FAST_PATH}",
    upstream=_MHA,
    when="always",
)
def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():  # which leaves it as it is; `compiled` runs its graphs under the rules
        return F.multi_head_attention_forward(*args, **kwargs)
    with Rules(occasion_of_call()):
        return _multi_head(*args, **kwargs)


@rule(
    nn.MultiheadAttention,
    why=f"it calls the fused kernel, which has no second derivative; {_FAST_PATH}",
    upstream=_MHA,
    when="always",
)
def _attention_module(self: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
    if not transforming():
        return _forward_alone(self, *args, **kwargs)
    with rules_of_call():  # while a mode is active there is no fast path
        return nn.MultiheadAttention.forward(self, *args, **kwargs)


@rule(
    cast("Any", torch)._nested_tensor_from_mask_left_aligned,
    why="TransformerEncoder asks it, a branch on values, whether it may take its fast path",
    upstream=_TRANSFORMER,
    when="always",
)
def _left_aligned(src: Tensor, mask: Tensor) -> bool:
    return False


@rule(nn.TransformerEncoderLayer, why=_FAST_PATH, upstream=_TRANSFORMER, when="always")
def _encoder_layer(self: nn.TransformerEncoderLayer, *args: Any, **kwargs: Any) -> Tensor:
    if torch.compiler.is_compiling() or not transforming():
        return _layer_alone(self, *args, **kwargs)
    with nullcontext() if self.training else rules_of_call():
        return nn.TransformerEncoderLayer.forward(self, *args, **kwargs)


@rule(
    nn.TransformerEncoder,
    why=f"it compares a mask with the causal one, a branch on values that is only a hint to a kernel; {_FAST_PATH}",
    upstream=_TRANSFORMER,
    when="always",
)
def _encoder(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    if torch.compiler.is_compiling() or not transforming():
        return _encoder_alone(self, src, mask, src_key_padding_mask, is_causal)
    with nullcontext() if self.training else rules_of_call():
        return nn.TransformerEncoder.forward(self, src, mask, src_key_padding_mask, bool(is_causal))


@rule(
    nn.TransformerDecoder,
    why="it compares a mask with the causal one, a branch on values that is only a hint to a kernel",
    upstream=_TRANSFORMER,
)
def _decoder(
    self: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    return nn.TransformerDecoder.forward(
        self,
        tgt,
        memory,
        tgt_mask,
        memory_mask,
        tgt_key_padding_mask,
        memory_key_padding_mask,
        bool(tgt_is_causal),
        memory_is_causal,
    )
