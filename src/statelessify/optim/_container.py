"""The dict of hyperparameters in a state: to transforms only what is a tensor in it, to everyone else a dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .._tree import register_mapping, same_static

__all__: list[str] = []


class Hyperparameters(dict[str, Any]):
    """The hyperparameters in a state, by name, and the rule that they belong to.

    To `torch.vmap` and torch's own pytree, what is not a tensor in it is structure, so that a step can be mapped by
    them although plain numbers stand in the state. What is structure stays so when the rest is mapped to anything.
    """

    def __init__(self, values: Mapping[str, Any], rule: str = "") -> None:
        super().__init__(values)
        self.rule = rule
        self.seen: tuple[Any, ...] | None = None  # the values and shapes of which the rule knows that it can use them
        self.layout: _Layout | None = None


class _Layout(NamedTuple):
    """The nesting of hyperparameters, and what is fixed in it; a hole where there is a tensor."""

    spec: Any
    fixed: tuple[Any, ...]
    rule: str

    def rest(self, values: Hyperparameters) -> list[Any] | None:
        """What stands in the holes; None if something else than that is no longer what it was."""
        try:
            leaves = self.spec.flatten_up_to(dict(values))
        except ValueError:
            return None
        pairs = list(zip(leaves, self.fixed, strict=True))
        if all(kept is _HOLE or same_static(leaf, kept) for leaf, kept in pairs):
            return [leaf for leaf, kept in pairs if kept is _HOLE]
        return None


_HOLE = "(a tensor)"


def _split(values: Hyperparameters) -> tuple[list[Any], _Layout]:
    if values.layout is not None and (rest := values.layout.rest(values)) is not None:
        return rest, values.layout
    leaves, spec = pytree.tree_flatten(dict(values))
    fixed = tuple(leaf if _is_fixed(leaf) else _HOLE for leaf in leaves)
    return [leaf for leaf, kept in zip(leaves, fixed, strict=True) if kept is _HOLE], _Layout(spec, fixed, values.rule)


def _is_fixed(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, (int, float, str)) or callable(leaf)


def _joined(leaves: Iterable[Any], layout: _Layout) -> Hyperparameters:
    remaining = iter(leaves)
    filled = [next(remaining) if kept is _HOLE else kept for kept in layout.fixed]
    found = Hyperparameters(pytree.tree_unflatten(filled, layout.spec), layout.rule)
    found.layout = layout
    return found


def is_checked(values: dict[str, Any], shapes: list[torch.Size]) -> bool:
    """Whether a rule has checked these very values for parameters of these shapes."""
    if not isinstance(values, Hyperparameters) or values.seen is None:
        return False
    if torch.compiler.is_compiling():
        return True
    known, *before = values.seen
    same = len(before) == len(values) and all(a is b for a, b in zip(before, values.values(), strict=True))
    return same and known == shapes


def checked(values: dict[str, Any], rule: str, shapes: list[torch.Size]) -> Hyperparameters:
    """The hyperparameters of a rule, which checks them if this is not the very same object.

    Their user may have put a plain dict in their place.
    """
    if isinstance(values, Hyperparameters) and is_checked(values, shapes):
        return values
    found = Hyperparameters(values, rule)
    found.seen = shapes, *found.values()
    return found


def replaced(values: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a state with others for some of them."""
    both = {**values, **new}
    return Hyperparameters(both, values.rule) if isinstance(values, Hyperparameters) else both


pytree.register_pytree_node(Hyperparameters, _split, _joined)
register_mapping(Hyperparameters, lambda values: values.rule, Hyperparameters)
