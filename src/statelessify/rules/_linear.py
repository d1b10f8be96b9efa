"""`linear` with weights per task, as one operation.

torch's batching rule multiplies by one, adds and expands: as many nodes again in each derivative of a small network,
where the number of nodes is what costs time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
)

from ._registry import quicker

__all__: list[str] = []


@quicker(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return F.linear(input, weight, bias)
    top = peek_interpreter_stack()
    if top is None or top.key() != TransformType.Vmap:
        return F.linear(input, weight, bias)
    level = top.level()
    x, x_dim = _unwrap_batched(input, level)
    w, w_dim = _unwrap_batched(weight, level)
    b, b_dim = (None, None) if bias is None else _unwrap_batched(bias, level)
    plain = weight.ndim == 2 and input.ndim > 0 and input.shape[-1] == weight.shape[1]
    fits = plain and (bias is None or (bias.ndim == 1 and bias.shape[0] == weight.shape[0]))
    if not fits or w_dim is None or any(t is not None and t.layout is not torch.strided for t in (x, w, b)):
        return F.linear(input, weight, bias)
    saved = pop_dynamic_layer_stack()  # what follows is an operation of the level below, on all tasks at once
    try:
        out = _all_tasks(_in_front(x, x_dim), x_dim is not None, _in_front(w, w_dim), _in_front(b, b_dim))
    finally:
        push_dynamic_layer_stack(saved)
    return _add_batch_dim(out, 0, level)


def _in_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    return tensor.movedim(dim, 0) if tensor is not None and dim else tensor


def _all_tasks(x: Tensor, x_mapped: bool, w: Tensor, b: Tensor | None) -> Tensor:
    """``x`` is ``(tasks, ..., in)`` or shared, ``w`` is ``(tasks, out, in)``, ``b`` is ``(tasks, out)`` or shared."""
    shape = x.shape[x_mapped:-1]
    if not x_mapped:
        x = x.expand(w.shape[0], *x.shape)
    if len(shape) != 1:
        x = x.reshape(w.shape[0], shape.numel(), x.shape[-1])
    if b is None:
        out = torch.bmm(x, w.mT)
    else:
        out = torch.baddbmm(b.unsqueeze(1) if b.ndim == 2 else b, x, w.mT)
    return out if len(shape) == 1 else out.view(w.shape[0], *shape, w.shape[1])
