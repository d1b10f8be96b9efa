"""The leaves of one step: which of them share their numbers, which are alike, and several of them as one tensor."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from .._transforms import transforming, unseen

__all__: list[str] = []

Slots = dict[str, Tensor]
"""What a rule remembers of one leaf, by slot."""

ListedSlots = dict[str, list[Tensor]]
"""What a rule remembers of several leaves, by slot."""

STACKED = 4  # as many leaves are worth the copies into one tensor and out of it
SMALL = 2**14  # entries of a leaf; above, an operation costs more than its launch


class Work:
    """The leaves of a step, old and new."""

    def __init__(self, leaves: list[Tensor], gradients: list[Tensor], slots: Mapping[str, list[Any]]) -> None:
        self.leaves, self._gradients, self._slots = list(leaves), gradients, slots
        self.new_slots = {slot: list(column) for slot, column in slots.items()}

    def take(self, index: int, slots: Iterable[str]) -> tuple[Tensor, Tensor, Slots]:
        return self.leaves[index], self._gradients[index], {slot: self._slots[slot][index] for slot in slots}

    def put(self, index: int, new: tuple[Tensor, Slots]) -> None:
        self.leaves[index], slots = new
        for slot, tensor in slots.items():
            self.new_slots[slot][index] = tensor

    def put_scalars(self, members: list[int], scalars: Slots) -> None:
        for slot in scalars.keys() & self.new_slots.keys():
            for index in members:
                self.new_slots[slot][index] = scalars[slot]

    def alike(self, members: list[int]) -> Iterable[list[int]]:
        """The leaves that may be stacked with each other; those above a size stay alone."""
        groups: dict[Any, list[int]] = {}
        for index in members:
            leaf, gradient = self.leaves[index], self._gradients[index]
            shape = leaf.shape
            small = shape.numel() <= SMALL
            kind = (shape, leaf.dtype, leaf.device, leaf.requires_grad, gradient.requires_grad) if small else index
            groups.setdefault(kind, []).append(index)
        return groups.values()

    def lists(self, members: list[int], slots: Iterable[str]) -> tuple[list[Tensor], list[Tensor], ListedSlots] | None:
        """The leaves as lists; None where torch's operations on lists would do another thing than on each of them."""

        def listed(column: list[Tensor]) -> list[Tensor]:
            return [column[index] for index in members]

        leaves, gradients = listed(self.leaves), listed(self._gradients)
        found = {slot: listed(self._slots[slot]) for slot in slots}
        with unseen():
            return (leaves, gradients, found) if all(map(is_uniform, (leaves, gradients, *found.values()))) else None

    def put_lists(self, members: list[int], new: tuple[list[Tensor], ListedSlots]) -> None:
        leaves, slots = new
        for row, index in enumerate(members):
            self.leaves[index] = leaves[row]
            for slot, column in slots.items():
                self.new_slots[slot][index] = column[row]

    def stack(self, members: list[int], slots: Iterable[str]) -> tuple[Tensor, Tensor, Slots]:
        def stacked(column: list[Tensor]) -> Tensor:
            return torch.stack([column[index] for index in members])

        return stacked(self.leaves), stacked(self._gradients), {slot: stacked(self._slots[slot]) for slot in slots}

    def put_stack(self, members: list[int], new: tuple[Tensor, Slots]) -> None:
        leaf, slots = new
        # Copies: views of one tensor could not be changed in place, and each would keep all of it alive.
        apart = cast("Callable[[Tensor], tuple[Tensor, ...]]", torch.unbind if transforming() else torch.unbind_copy)
        for index, tensor in zip(members, apart(leaf), strict=True):
            self.leaves[index] = tensor
        for slot, stack in slots.items():
            column = self.new_slots[slot]
            for index, tensor in zip(members, stack.unbind(), strict=True):
                column[index] = tensor


def is_uniform(tensors: list[Tensor]) -> bool:
    """Whether all or none of them require gradients: else each result of an operation on the list would do so."""
    return len({*map(_REQUIRES_GRAD, tensors)}) == 1


_REQUIRES_GRAD = attrgetter("requires_grad")


def sharing(*columns: Sequence[Any]) -> Iterable[list[int]]:
    """The places at which all of these columns hold the same objects."""
    if not torch.compiler.is_compiling() and all(map(_is_one_object, columns)):
        return [list(range(len(columns[0])))]
    groups: dict[Any, list[int]] = {}
    # A graph with the number of an object in it would serve that object only.
    keys: Iterable[Any] = range(len(columns[0]))
    if not torch.compiler.is_compiling():
        keys = zip(*(map(id, column) for column in columns), strict=True)
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups.values()


def _is_one_object(column: Sequence[Any]) -> bool:
    return len(column) > 0 and all(map(operator.is_, column, itertools.repeat(column[0])))


def by_kind(leaves: list[Tensor], members: list[int]) -> Iterable[tuple[bool, list[int]]]:
    """Complex leaves and real ones apart."""
    with unseen():
        on_pairs = [index for index in members if leaves[index].is_complex()]
    if on_pairs:
        yield True, on_pairs
        members = [index for index in members if index not in on_pairs]
    if members:
        yield False, members
