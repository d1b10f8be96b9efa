"""Cross-entropy with weights and smoothed labels, which torch computes by selecting entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._losses import legacy_reduction
from ._registry import rule

__all__: list[str] = []


@rule(
    F.cross_entropy,
    why="with `weight` and `label_smoothing` it selects entries by a mask, which vmap refuses",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/LossNLL.cpp",
)
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``(1 - s) w_y l_y + s / classes sum_c w_c l_c``, ``l`` the negative log-softmax; the mean is by ``w_y``."""
    reduction = legacy_reduction(size_average, reduce, reduction)
    if weight is None or not label_smoothing or target.is_floating_point():
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    dim = min(1, input.ndim - 1)
    classes, surprise = input.shape[dim], -input.log_softmax(dim)
    counted = target != ignore_index
    index = torch.where(counted, target, 0)
    own = torch.where(counted, weight[index], 0.0)
    of_label = surprise.gather(dim, index.unsqueeze(dim)).squeeze(dim) * own
    of_all = (surprise * weight.view([-1 if d == dim else 1 for d in range(input.ndim)])).sum(dim)
    losses = torch.where(counted, (1 - label_smoothing) * of_label + label_smoothing / classes * of_all, 0.0)
    if reduction == "mean":
        return losses.sum() / own.sum()
    return losses.sum() if reduction == "sum" else losses
