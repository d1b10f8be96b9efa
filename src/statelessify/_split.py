"""Trees taken apart into their tensors and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ._tree import TreeSpec, tree_flatten, tree_unflatten

__all__: list[str] = []


class Split(NamedTuple):
    """A tree as its tensors and the rest."""

    leaves: list[Any]  # None where a tensor stood
    places: list[int]
    tensors: list[Tensor]
    spec: TreeSpec

    def joined(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(self.spec, leaves)


def split(tree: Any) -> Split:
    leaves, spec = tree_flatten(tree)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[index] for index in places]
    return Split([None if isinstance(leaf, Tensor) else leaf for leaf in leaves], places, tensors, spec)
