"""Trees while dynamo traces: torch's own pytree, which it can follow, in the meaning of optree (None is no leaf).

optree's functions have stand-ins inside dynamo, but these stop at a dict that holds constants only (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

from torch.utils import _pytree as pytree

__all__: list[str] = []


class TracedSpec(NamedTuple):
    """A structure, and which of its leaves are None."""

    spec: pytree.TreeSpec
    empty: tuple[bool, ...]

    def flatten_up_to(self, tree: Any) -> list[Any]:
        found = self.spec.flatten_up_to(tree)
        return [leaf for leaf, none in zip(found, self.empty, strict=True) if not none]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], TracedSpec]:
    leaves, spec = pytree.tree_flatten(tree, is_leaf)
    return [leaf for leaf in leaves if leaf is not None], TracedSpec(spec, tuple(leaf is None for leaf in leaves))


def unflatten(spec: TracedSpec, leaves: Iterable[Any]) -> Any:
    remaining = iter(leaves)
    return pytree.tree_unflatten([None if none else next(remaining) for none in spec.empty], spec.spec)


def tree_map(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    leaves, spec = flatten(tree, is_leaf)
    columns = [spec.flatten_up_to(other) for other in rest]
    return unflatten(spec, [fn(*row) for row in zip(leaves, *columns, strict=True)])


def names(tree: Any, is_leaf: Callable[[Any], bool] | None = None, prefix: tuple[str, ...] = ()) -> list[str]:
    if tree is None:
        return []
    if is_leaf is None or not is_leaf(tree):
        if isinstance(tree, dict):
            items = cast("dict[Any, Any]", tree).items()
            return [name for key, value in items for name in names(value, is_leaf, (*prefix, str(key)))]
        if isinstance(tree, (list, tuple)):
            entries = enumerate(cast("list[Any]", tree))
            return [name for index, value in entries for name in names(value, is_leaf, (*prefix, str(index)))]
    return [".".join(prefix)]


def broadcast_prefix(prefix: Any, tree: Any) -> list[Any]:
    _, spec = flatten(tree)
    found = pytree._broadcast_to_and_flatten(prefix, spec.spec)
    if found is None:
        raise ValueError("the prefix does not fit the tree")
    return [leaf for leaf, none in zip(found, spec.empty, strict=True) if not none]
