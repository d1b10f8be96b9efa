"""What an `Apply` knows of its module's tensors: names, slots, shapes, which of them are buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ._expected import Expected
from ._skeleton import Slot, Slots
from ._structure import named_parts
from ._vacant import storage_of

__all__: list[str] = []

Tensors = Sequence[Tensor | None]
"""In the order of the slots' names; None for one that is empty."""


class Layout:
    """The names of a module's tensors, in order, and what is to be known of each.

    Attributes:
        module: the name of the module's class.
        params, buffers, empty: the slots of each name, as `Slots` has them.
        places: these three together.
        expected: which tensors a call has to give.
        attributes: what hangs on the module's own tensors.
        overlapping: the names whose storage another name's tensor shares.
        registered: the position and the name of each registered buffer.
        packed: the weights of torch's batch norms, by name their positions. On CPUs their backward pass takes a strided
            one, such as a column of a matrix, for a contiguous one: wrong gradients, and no error (torch 2.13).
    """

    def __init__(self, template: nn.Module, slots: Slots) -> None:
        self.module = type(template).__name__
        self.params, self.buffers, self.empty = slots.params, slots.buffers, slots.empty
        self.places = {**slots.params, **slots.buffers, **{name: (slot,) for name, slot in slots.empty.items()}}
        # The shapes as they were: parameters may be moved and cast later, never reshaped.
        shapes = {name: slots.tensors[name].shape for name in (*slots.params, *slots.buffers)}
        self.expected = Expected(self.module, shapes, slots.empty)
        self.attributes = {name: vars(t).copy() for name, t in slots.tensors.items() if vars(t)}
        storages = [storage_of(tensor) for tensor in slots.tensors.values()]
        self.overlapping = {
            name for name, place in zip(slots.tensors, storages, strict=True) if place and storages.count(place) > 1
        }
        self.registered = [
            (index, name)
            for index, (name, found) in enumerate(self.places.items())
            if any(place.registered_buffer for place in found)
        ]
        self.own_buffers = {name for _, name in self.registered}
        norms = [path for path, part in named_parts(template) if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        weights = {f"{path}.weight" if path else "weight" for path in norms}
        self.packed = {
            name: index
            for index, (name, found) in enumerate(self.places.items())
            if any(place.path in weights for place in found)
        }
        self.slots: tuple[Slot, ...] = tuple(place for found in self.places.values() for place in found)
        self._by_slot = [index for index, found in enumerate(self.places.values()) for _ in found]
        self.tied = len(self.slots) > len(self.places)

    def by_slot(self, tensors: Tensors) -> Tensors:
        """The tensors by slot, of which a tied weight has several."""
        return [*map(tensors.__getitem__, self._by_slot)] if self.tied else tensors

    def with_packed(self, tensors: Tensors) -> Tensors:
        """The tensors, contiguous where they have to be."""
        for index in self.packed.values():
            tensor = tensors[index]
            if tensor is not None and not tensor.is_contiguous():
                tensors = [*tensors[:index], tensor.contiguous(), *tensors[index + 1 :]]
        return tensors

    def in_order(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Tensors by name in the order of the names, None where there is none."""
        return [tensors.get(name) for name in self.places]

    def copy(self) -> Layout:
        """One of its own for another mode of the module, in which buffers may get other shapes."""
        new = copy.copy(self)
        new.expected = self.expected.copy()
        return new
