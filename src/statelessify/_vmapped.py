"""One level of vmap over a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _remove_batch_dim, _vmap_decrement_nesting, _vmap_increment_nesting
from torch._functorch import predispatch
from torch.func import vmap

from ._budget import Chunks
from .typing import Randomness

__all__: list[str] = []

OfTensors = Callable[..., Sequence[Tensor]]
"""Tensors in, a sequence of tensors out."""


def vmapped(
    fn: OfTensors, inputs: Sequence[Tensor], tasks: int, randomness: Randomness, chunks: Chunks
) -> Sequence[Tensor]:
    """``torch.vmap(fn)(*inputs)`` along their first dimensions."""
    if torch.compiler.is_compiling() and not isinstance(chunks.size, str):
        return vmap(fn, randomness=randomness, chunk_size=chunks.size)(*inputs)

    def chunk(here: slice) -> Sequence[Tensor]:
        count = here.stop - here.start
        part = inputs if count == tasks else [tensor[here] for tensor in inputs]
        return _level(fn, part, count, randomness)

    found = chunks.run(chunk, tasks, randomness, inputs)
    return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]


def _level(fn: OfTensors, inputs: Sequence[Tensor], tasks: int, randomness: Randomness) -> Sequence[Tensor]:
    """What `torch.vmap` does once it has looked at its arguments, which takes longer than a small network."""
    if not predispatch.DECOMPOSITIONS_LOADED:
        predispatch.lazy_load_decompositions()
    level = _vmap_increment_nesting(tasks, randomness)
    try:
        results = fn(*[_add_batch_dim(tensor, 0, level) for tensor in inputs])
        return [_remove_batch_dim(tensor, level, tasks, 0) for tensor in results]
    finally:
        _vmap_decrement_nesting()
