"""The words of the public signatures, for annotations in code that uses statelessify.

`Tree` is any nesting of dicts, lists, tuples and NamedTuples (whatever optree takes) with tensors at its leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

__all__ = [
    "Backend",
    "Batch",
    "Buffers",
    "ChunkSize",
    "GradTransform",
    "InDims",
    "Loss",
    "Params",
    "Policy",
    "Randomness",
    "Tree",
]

Tree = Any
"""Any nesting of containers with tensors at its leaves."""

Params = dict[str, torch.Tensor]
"""Trainable tensors by dotted name, as `stateless` returns them."""

Buffers = dict[str, torch.Tensor]
"""Every other tensor of a module by dotted name: buffers and frozen parameters."""

Policy = Literal["alias", "clone", "detach"]
"""How a tree of tensors is copied."""

Backend = Literal["auto", "vmap", "loop"]
"""How a function of one task is mapped over tasks."""

ChunkSize = int | Literal["auto"] | None
"""How many tasks run at once: so many, as many as a memory budget lets, or all."""

Randomness = Literal["different", "same", "error"]
"""Whether tasks draw their own random numbers, as in `torch.vmap`."""

InDims = Any
"""The task dimension of each argument, in `torch.vmap`'s form: an integer, None, or a nesting of these."""

Batch = Any
"""A tree of tensors, or a callable ``(step, params) -> tree``."""

Loss = Callable[..., Any]
"""``loss(params, batch) -> scalar``, or with a carry ``loss(params, carry, batch) -> (scalar, carry)``."""

GradTransform = Callable[[Any], Any]
"""Gradients of one task in, gradients of one task out."""
