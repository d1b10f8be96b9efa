"""What a call has done to the tensors and the skeleton that it was given: written, differentiated into, added to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ._layout import Layout
from ._skeleton import Skeleton, find_slots
from ._transforms import levels, transforming
from ._words import listed
from .errors import ModuleError, MutationError
from .typing import Buffers, Params

__all__: list[str] = []

Versions = list[Any]
"""How often each of several tensors has been written to."""

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


def versions_of(tensors: Sequence[Tensor | None], inside: bool) -> Versions:
    """The same for each of several tensors; where it is not inside a transform, in a few operations that run in C."""
    if not inside:
        try:
            return [*map(_VERSION, tensors)]
        except (AttributeError, RuntimeError):  # an empty slot, an inference tensor
            pass
    return [() if tensor is None else version_of(tensor) for tensor in tensors]


_VERSION = attrgetter("_version")


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


def harvest(
    layout: Layout,
    values: Sequence[Tensor | None],
    given: Mapping[str, Tensor],
    installed: Mapping[str, Tensor],
    versions: Mapping[str, tuple[int, ...]],
    params: Params,
    touched: bool,
) -> Buffers:
    """The tensors that stand in the slots after a call; an error where a parameter's has changed.

    `values` is what stands there now; `touched` says whether the caller's own tensors were installed.
    """
    found_now: Buffers = {}
    eager = not transforming()
    remaining = iter(values)
    shapes = layout.expected.shapes
    for name, places in layout.places.items():
        found = [next(remaining) for _ in places]
        before = installed.get(name)
        own = name in layout.own_buffers
        # A parameter's slot that is empty now was cleared for this call; the parameter itself is as it was.
        value = next((new for new in found if new is not before and (own or new is not None)), before)
        written = value is not before
        if before is not None and not written and name in versions:
            written = is_written(before, versions[name], given[name])
        if written and name in layout.overlapping:
            raise MutationError(
                f"`{layout.module}` writes into `{name}`, whose storage another of its tensors shares: the other one "
                "would not see it; give each a tensor of its own"
            )
        if written and not own and name not in layout.empty:
            raise writes_parameter(layout.module, name, touched)
        if name in params:
            continue
        if value is None:
            if own and name in shapes:
                layout.expected.emptied.add(name)
            continue
        found_now[name] = given[name] if not written and (not own or (eager and name in versions)) else value
        if name in shapes and value.shape != shapes[name]:
            layout.expected.resized.add(name)
    order = [name for name in given if name not in params]
    return {name: found_now[name] for name in (*order, *found_now) if name in found_now}


def writes_parameter(module: str, name: str, touched: bool) -> MutationError:
    """The error where forward changes a parameter; `touched` as for `harvest`."""
    return MutationError(
        f"`{module}` changes its parameter `{name}` in forward, which a pure function cannot do: compute the new value "
        "out of place, or register the tensor as a buffer"
        + ("; the tensor that was passed in has been changed" if touched else "")
    )
