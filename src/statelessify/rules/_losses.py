"""Losses and layers whose kernels branch on values, write into `out=`, or lack a derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._transforms import mapping, transforming, unwrapped
from ._fused import twice_differentiable
from ._registry import rule

__all__: list[str] = []

_FORMULAS = "https://github.com/pytorch/pytorch/blob/v2.13.0/tools/autograd/derivatives.yaml"


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"`reduction={reduction!r}` is not one of 'none', 'mean', 'sum'")
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that the two old flags, where given, stand for."""
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


# Margin losses -----------------------------------------------------------------------------------------------------


@rule(
    F.multi_margin_loss,
    why="it has no forward-mode and no second derivative",
    upstream=_FORMULAS,
    when="gradients",
)
def _multi_margin(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``sum_{j != y} weight_y max(0, margin - x_y + x_j)^p / classes``."""
    if p not in (1, 2):
        raise ValueError(f"`p={p}` is not 1 or 2")
    if input.ndim not in (1, 2) or target.numel() != input.shape[:-1].numel():
        raise ValueError(f"a target of shape {tuple(target.shape)} does not fit an input of {tuple(input.shape)}")
    index = target.reshape(input.shape[:-1]).unsqueeze(-1)
    terms = torch.relu(margin - input.gather(-1, index) + input)
    if p == 2:
        terms = terms * terms
    if weight is not None:
        terms = terms * weight[index]
    others = torch.arange(input.shape[-1], device=input.device) != index
    losses = torch.where(others, terms, 0.0).sum(-1) / input.shape[-1]
    return _reduced(losses, legacy_reduction(size_average, reduce, reduction))


@rule(
    F.multilabel_margin_loss,
    why="it has no forward-mode and no second derivative",
    upstream=_FORMULAS,
    when="gradients",
)
def _multilabel_margin(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``sum_{labels y} sum_{classes j that are no label} max(0, 1 - x_y + x_j) / classes``; a -1 ends the labels."""
    if input.ndim not in (1, 2) or target.shape != input.shape:
        raise ValueError(f"a target of shape {tuple(target.shape)} does not fit an input of {tuple(input.shape)}")
    classes = input.shape[-1]
    listed = (target >= 0).cumprod(-1).bool()
    index = torch.where(listed, target, 0)
    one_hot = torch.arange(classes, device=input.device) == index.unsqueeze(-1)  # (..., labels, classes)
    is_label = (one_hot & listed.unsqueeze(-1)).any(-2)
    terms = torch.relu(1 - input.gather(-1, index).unsqueeze(-1) + input.unsqueeze(-2))
    counted = listed.unsqueeze(-1) & ~is_label.unsqueeze(-2)
    losses = torch.where(counted, terms, 0.0).sum((-2, -1)) / classes
    return _reduced(losses, legacy_reduction(size_average, reduce, reduction))


# Other losses ------------------------------------------------------------------------------------------------------


@rule(
    F.gaussian_nll_loss,
    why="it checks the sign of the variances, a branch on values",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/functional.py",
)
def _gaussian_nll(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    if not torch.compiler.is_compiling() and bool((unwrapped(var) < 0).any()):
        raise ValueError("var has negative entry/entries")
    if var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    if var.ndim != input.ndim or any(v not in (1, n) for v, n in zip(var.shape, input.shape, strict=True)):
        raise ValueError(f"`var` of shape {tuple(var.shape)} does not fit an input of {tuple(input.shape)}")
    var = var + (var.clamp(min=eps) - var).detach()  # as torch: the bound changes the value, not the slope
    losses = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    return _reduced(losses + 0.5 * math.log(2 * math.pi) if full else losses, reduction)


@rule(
    F.linear_cross_entropy,
    why="the chunked path that `options` choose has a zero forward-mode and a wrong second derivative, no error",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/linear_cross_entropy.py",
    when="always",
)
def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    options: Any = None,
    **kwargs: Any,
) -> Tensor:
    def run(options: Any) -> Callable[..., Tensor]:
        def loss(x: Tensor, w: Tensor, y: Tensor, b: Tensor | None, v: Tensor | None) -> Tensor:
            return F.linear_cross_entropy(x, w, y, linear_bias=b, weight=v, options=options, **kwargs)

        return loss

    inputs = (input, linear_weight, target, linear_bias, weight)
    if options is None or transforming():
        return run(None)(*inputs)
    return twice_differentiable(run(options), run(None), *inputs)


_NEVER = -1e30  # the log of a probability that cannot be: finite, so that no gradient is inf - inf


@rule(
    F.ctc_loss,
    why="it has no forward-mode and no second derivative, and cannot be mapped over lengths",
    upstream=_FORMULAS,
    when="gradients",
)
def _ctc(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """The forward algorithm over the alignments. Source: Graves et al., Connectionist temporal classification (2006).

    Its gradient is torch's, which takes `log_probs` to be normalized: that of the loss as a function of the
    activations before a log-softmax.
    """
    single = log_probs.ndim == 2
    if single:
        log_probs = log_probs.unsqueeze(1)
    frames, batch, _ = log_probs.shape
    lengths = _as_lengths(input_lengths, batch, log_probs)
    label_lengths = _as_lengths(target_lengths, batch, log_probs)
    if not torch.compiler.is_compiling() and bool((unwrapped(lengths) > frames).any()):
        raise ValueError(f"`input_lengths` go beyond the {frames} frames of `log_probs`")
    labels = _padded_labels(targets, label_lengths, batch, blank)
    states = 2 * labels.shape[1] + 1
    extended = torch.stack([labels, torch.full_like(labels, blank)], -1).flatten(1)
    extended = torch.cat([labels.new_full((batch, 1), blank), extended], 1)  # (batch, states)
    emitted = log_probs.gather(2, extended.expand(frames, batch, states))
    skips = torch.zeros_like(extended, dtype=torch.bool)
    skips[:, 2:] = (extended[:, 2:] != blank) & (extended[:, 2:] != extended[:, :-2])
    position = torch.arange(states, device=labels.device)
    never = torch.full_like(emitted[0], _NEVER)
    alpha = torch.where(position < 2, emitted[0], never) if frames else never
    for t in range(1, frames):
        one = F.pad(alpha, (1, 0), value=_NEVER)[:, :states]
        two = torch.where(skips, F.pad(alpha, (2, 0), value=_NEVER)[:, :states], never)
        arrived = torch.logsumexp(torch.stack([alpha, one, two]), 0) + emitted[t]
        alpha = torch.where((t < lengths)[:, None], arrived, alpha)
    last = (position == 2 * label_lengths[:, None]) | (position == 2 * label_lengths[:, None] - 1)
    losses = -torch.logsumexp(torch.where(last, alpha, never), 1)
    losses = torch.where(lengths == 0, torch.where(label_lengths == 0, torch.zeros_like(losses), -_NEVER), losses)
    within = torch.arange(frames, device=labels.device)[:, None] < lengths
    mass = torch.where(within, log_probs.exp().sum(2), 0.0).sum(0)
    losses = losses + (mass - mass.detach())
    impossible = losses > -_NEVER / 2
    losses = torch.where(impossible, 0.0 if zero_infinity else float("inf"), losses)
    if reduction == "mean":
        losses = losses / label_lengths.clamp(min=1)
    return _reduced(losses[0] if single and reduction == "none" else losses, reduction)


def _as_lengths(lengths: Any, batch: int, like: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(lengths, device=like.device)
    return lengths.to(like.device, torch.int64).reshape(-1).expand(batch)


def _padded_labels(targets: Tensor, lengths: Tensor, batch: int, blank: int) -> Tensor:
    """Labels as ``(batch, most labels)``, blank where a sequence has ended; torch also takes them one after another."""
    if targets.ndim == 1:
        start = lengths.cumsum(0) - lengths
        most = targets.shape[0]
        index = start[:, None] + torch.arange(most, device=targets.device)
        padded = torch.cat([targets, targets.new_zeros(1)])[index.clamp(max=most)]
    else:
        padded = targets
    used = torch.arange(padded.shape[1], device=targets.device) < lengths[:, None]
    return torch.where(used, padded, blank).to(torch.int64)


# Layers ------------------------------------------------------------------------------------------------------------


@rule(
    F.rrelu,
    why="it has no batching rule",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/functorch/BatchRulesRandomness.cpp",
)
def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not mapping():
        return F.rrelu(input, lower, upper, training, inplace)
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2, inplace)
    slopes = lower + (upper - lower) * torch.rand_like(input)
    out = torch.where(input > 0, input, input * slopes)
    return input.copy_(out) if inplace else out


@rule(
    F.normalize,
    why="spectral_norm writes its result through `out=`, which vmap refuses",
    upstream="https://docs.pytorch.org/docs/stable/func.ux_limitations.html",
)
def _normalize(
    input: Tensor, p: float = 2.0, dim: int | Sequence[int] = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    result = F.normalize(input, p, dim, eps)  # pyright: ignore[reportArgumentType]
    return result if out is None else out.copy_(result)
