"""What a call has done to the tensors and the skeleton that it was given: written, differentiated into, added to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._skeleton import Skeleton, find_slots
from ._transforms import levels, transforming
from ._words import listed
from .errors import ModuleError, MutationError

__all__: list[str] = []

Grads = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""The `.grad` of each leaf, and a copy of it."""


def grads_of(tensors: Mapping[str, Tensor]) -> Grads:
    return {name: _grad(tensor) for name, tensor in tensors.items()}


def _grad(tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    grad = tensor.grad if tensor.is_leaf else None
    return grad, None if grad is None else grad.detach().clone()


def check_grads(given: Mapping[str, Tensor], before: Grads, module: str) -> None:
    """An error where forward has run a backward pass into the caller's tensors, which get their `.grad` back."""
    reached: list[str] = []
    for name, (grad, value) in before.items():
        now = given[name].grad if given[name].is_leaf else None
        if now is not grad or (value is not None and grad is not None and not torch.equal(value, grad)):
            reached.append(name)
            given[name].grad = grad
            if grad is not None and value is not None:
                grad.data.copy_(value)
    if reached:
        raise MutationError(
            f"`{module}` calls `backward` in forward, which adds to the `.grad` of {listed(reached)}; write "
            "`torch.autograd.grad`"
        )


def check_new_slots(skeleton: Skeleton, known: Mapping[str, object], installed: set[int], module: str) -> None:
    """An error where forward makes parameters: no one would train them, and each call would draw others."""
    for name, tensor in find_slots(skeleton.inner).tensors.items():
        made = name not in known and id(tensor) not in installed
        if made and isinstance(tensor, nn.Parameter) and tensor.is_leaf:
            raise ModuleError(
                f"`{module}` makes the parameter `{name}` in forward, which a pure function cannot keep; call "
                "the module once before `stateless`, or make its parameters in `__init__`"
            )


def version_of(tensor: Tensor) -> tuple[int, ...]:
    """How often a tensor has been written to, at each level of transforms."""
    return tuple(0 if seen.is_inference() else seen._version for seen in levels(tensor))


def is_written(installed: Tensor, version: tuple[int, ...], given: Tensor) -> bool:
    """Whether a call has written into a tensor, or into its clone."""
    return version_of(installed) != version or (installed is not given and _differs(installed, given))


def is_changed(clone: Tensor, given: Tensor) -> bool:
    """Whether a call in eager code has written into the clone that it got of a tensor."""
    return version_of(clone) != (0,) or _differs(clone, given)


def _differs(clone: Tensor, given: Tensor) -> bool:
    """Versions do not count what goes through ``.data``, nor what a fused batch norm does to its statistics."""
    if clone.is_meta or clone.layout is not torch.strided or transforming() or torch.equal(clone, given):
        return False
    if not clone.isnan().any():
        return True
    return not bool(((clone == given) | ((clone != clone) & (given != given))).all())
