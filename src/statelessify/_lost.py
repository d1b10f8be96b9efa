"""Gradients that a mode does not pass on: one warning names them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ._graph import nodes
from ._task_trees import Tasks
from ._transforms import transforming
from ._tree import tree_leaves, tree_names

__all__: list[str] = []

_warned: set[Any] = set()


def needing(**trees: Any) -> dict[str, Tensor]:
    """The tensors of some trees that need a gradient, by name."""
    found: dict[str, Tensor] = {}
    for what, tree in trees.items():
        plain = tree.tree if isinstance(tree, Tasks) else tree
        for name, leaf in zip(tree_names(plain), tree_leaves(plain), strict=True):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                found[f"{what}.{name}" if name else what] = leaf
    return found


def closed_over(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"a closed-over tensor of shape {tuple(t.shape)}": t for t in tensors if t.requires_grad}


def warn_of_lost(
    candidates: Mapping[str, Tensor], results: Iterable[Tensor], source: Callable[..., Any], mode: str, instead: str
) -> None:
    """Name the candidates that the graph of `results` does not reach; once for each loss and mode, in eager code."""
    key = (getattr(source, "__code__", id(source)), mode)
    if transforming() or key in _warned:
        return
    seen: set[Any] = set()
    for node in nodes(results):
        seen.add(node)
        if hasattr(node, "variable"):
            seen.add(id(node.variable))
    lost = [n for n, t in candidates.items() if t.requires_grad and not any(each in seen for each in _places(t))]
    if not lost:
        return
    _warned.add(key)
    words = ", ".join(name if name.startswith("a closed") else f"`{name}`" for name in lost)
    warnings.warn(
        f"`{mode}` passes no gradient of the inner loop to {words}, which would need one; {instead}, or detach what "
        "needs none to silence this",
        stacklevel=6,
    )


def _places(tensor: Tensor) -> Iterator[Any]:
    """Where in a graph a tensor can stand: the loop's copies of a parameter are views of it, and it may be read too."""
    node: Any = tensor.grad_fn
    yield node or id(tensor)
    while type(node).__name__ in ("ViewBackward0", "ExpandBackward0"):
        node = node.next_functions[0][0]
        yield node
