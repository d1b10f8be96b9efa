"""One task of `adapt_tasks`: `adapt`, without a task dimension on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ._adapt import Adapted, adapt
from ._task_trees import Tasks
from ._tree import tree_map, tree_unflatten
from .typing import Loss

__all__: list[str] = []


def adapt_one(
    loss: Loss, known: Mapping[str, Tasks], batch: Callable[[int, Any], Any] | None, **options: Any
) -> Adapted:
    """`adapt` for the one task of these trees: parameters, carry, and batches, unless `batch` makes them."""
    given = alone(known["batches"]) if batch is None else batch
    found = adapt(loss, alone(known["params"]), given, carry=alone(known["carry"]), **options)
    return Adapted(*map(lined_up, found))


def alone(tasks: Tasks) -> Any:
    """The tree of the one task."""
    leaves = [leaf.squeeze(0) if mapped else leaf for leaf, mapped in zip(tasks.leaves, tasks.mapped, strict=True)]
    return tree_unflatten(tasks.spec, leaves)


def lined_up(tree: Any) -> Any:
    """The tree with a task dimension of length one."""
    return tree_map(_lined_up, tree)


def _lined_up(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf
