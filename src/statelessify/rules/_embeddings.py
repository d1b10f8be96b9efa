"""Embeddings: torch's batching rules mix up the tasks' rows, and sparse gradients cannot be batched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._transforms import unwrapped
from ._registry import rule

__all__: list[str] = []


@rule(
    F.embedding,
    why="under vmap `padding_idx` holds for the first task only, `scale_grad_by_freq` counts over all tasks together, "
    "and a sparse gradient cannot be batched",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/functorch/BatchRulesModules.cpp",
)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:  # it changes the weight in place, which is an error of its own
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    out = F.embedding(input, weight)
    if padding_idx is not None:
        out = torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), out.detach(), out)
    if scale_grad_by_freq:
        counts = (input.reshape(-1, 1) == torch.arange(weight.shape[0], device=weight.device)).sum(0)
        fixed = out.detach()
        out = fixed + (out - fixed) / counts[input].unsqueeze(-1)
    return out


@rule(
    torch.embedding,
    why="under vmap `padding_idx` holds for the first task only",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/functorch/BatchRulesModules.cpp",
)
def _torch_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    padding = None if padding_idx < 0 else padding_idx
    return _embedding(indices, weight, padding, None, 2.0, scale_grad_by_freq, sparse)


@rule(
    F.embedding_bag,
    why="it has no forward-mode and no second derivative",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/tools/autograd/derivatives.yaml",
    when="gradients",
)
def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if max_norm is not None or (input.ndim == 1 and offsets is None) or (input.ndim == 2 and offsets is not None):
        return F.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    entries = _embedding(input, weight, padding_idx, None, 2.0, scale_grad_by_freq).reshape(-1, weight.shape[1])
    flat = input.reshape(-1)
    if per_sample_weights is not None:
        entries = entries * per_sample_weights.reshape(-1, 1)
    bag = _bag_of_each(input, offsets)
    bags = input.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
    member = bag == torch.arange(bags, device=input.device)[:, None]  # (bags, entries)
    if padding_idx is not None:
        member = member & (flat != padding_idx % weight.shape[0])
    if mode == "max":
        spread = torch.where(member[..., None], entries, float("-inf"))
        best = spread.max(1).values if flat.shape[0] else spread.sum(1)
        return torch.where(member.any(1)[:, None], best, 0.0)
    total = torch.where(member[..., None], entries, 0.0).sum(1)
    return total if mode == "sum" else total / member.sum(1).clamp(min=1)[:, None]


def _bag_of_each(input: Tensor, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        return torch.arange(input.shape[0], device=input.device).repeat_interleave(input.shape[1])
    position = torch.arange(input.shape[0], device=input.device)
    return (position[:, None] >= offsets).sum(1) - 1


@rule(
    F.one_hot,
    why="it checks its input's values, which grad inside of vmap refuses",
    upstream="https://docs.pytorch.org/docs/stable/func.ux_limitations.html",
)
def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:  # the number is to be found in the values
        return F.one_hot(tensor, num_classes)
    if not torch.compiler.is_compiling():
        F.one_hot(unwrapped(tensor), num_classes)  # raises where a class is out of range
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()
