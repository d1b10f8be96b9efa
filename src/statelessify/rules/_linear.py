"""`linear` with weights per task, as one operation.

torch's batching rule multiplies by one, adds and expands: as many nodes again in each derivative of a small network,
where the number of nodes is what costs time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched

from .._transforms import below, level_of_tasks
from ._registry import quicker

__all__: list[str] = []


@quicker(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    level = level_of_tasks()
    if level is None or torch._C._is_any_autocast_enabled():  # which chooses dtypes
        return F.linear(input, weight, bias)
    x, x_dim = _unwrap_batched(input, level)
    w, w_dim = _unwrap_batched(weight, level)
    b, b_dim = (None, None) if bias is None else _unwrap_batched(bias, level)
    vectors = b is None or b.ndim == (1 if b_dim is None else 2)
    if w_dim is None or w.ndim != 3 or not vectors or x.ndim == (x_dim is not None):
        return F.linear(input, weight, bias)
    with below():  # on all tasks at once
        if w_dim:
            w = w.movedim(w_dim, 0)
        if x_dim:
            x = x.movedim(x_dim, 0)
        if b is not None and b_dim is not None:
            b = b.t().unsqueeze(1) if b_dim else b.unsqueeze(1)
        if x_dim is None or x.ndim != 3:
            out = _on_rows(x, x_dim is None, w, b)
        else:
            out = torch.bmm(x, w.mT) if b is None else torch.baddbmm(b, x, w.mT)
    return _add_batch_dim(out, 0, level)


def _on_rows(x: Tensor, shared: bool, w: Tensor, b: Tensor | None) -> Tensor:
    """The same for inputs that are no matrix: ``(tasks, ..., in)``, or ``(..., in)`` for all tasks."""
    if shared:
        x = x.expand(w.shape[0], *x.shape)
    shape = x.shape[1:-1]
    rows = x.reshape(w.shape[0], shape.numel(), x.shape[-1])
    out = torch.bmm(rows, w.mT) if b is None else torch.baddbmm(b, rows, w.mT)
    return out.view(w.shape[0], *shape, w.shape[1])
