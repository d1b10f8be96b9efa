"""One level of vmap over a list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _remove_batch_dim, _vmap_decrement_nesting, _vmap_increment_nesting
from torch._functorch.predispatch import lazy_load_decompositions
from torch.func import vmap

from ._random import random_state, set_random_state
from .typing import Randomness

__all__: list[str] = []

OfTensors = Callable[..., Sequence[Tensor]]
"""Tensors in, a sequence of tensors out."""


def vmapped(
    fn: OfTensors, inputs: Sequence[Tensor], tasks: int, randomness: Randomness, chunk_size: int | None
) -> Sequence[Tensor]:
    """``torch.vmap(fn)(*inputs)`` along their first dimensions."""
    if torch.compiler.is_compiling():
        return vmap(fn, randomness=randomness, chunk_size=chunk_size)(*inputs)
    if chunk_size is None or chunk_size >= tasks:
        return _level(fn, inputs, tasks, randomness)
    numbers = random_state() if randomness == "same" else None
    chunks: list[Sequence[Tensor]] = []
    for start in range(0, tasks, chunk_size):
        if numbers is not None:
            set_random_state(numbers)
        here = slice(start, min(start + chunk_size, tasks))
        chunks.append(_level(fn, [tensor[here] for tensor in inputs], here.stop - start, randomness))
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _level(fn: OfTensors, inputs: Sequence[Tensor], tasks: int, randomness: Randomness) -> Sequence[Tensor]:
    """What `torch.vmap` does once it has looked at its arguments, which takes longer than a small network."""
    lazy_load_decompositions()
    level = _vmap_increment_nesting(tasks, randomness)
    try:
        results = fn(*(_add_batch_dim(tensor, 0, level) for tensor in inputs))
        return [_remove_batch_dim(tensor, level, tasks, 0) for tensor in results]
    finally:
        _vmap_decrement_nesting()
