"""Trees of which some leaves have a task dimension, and the others are shared by all tasks."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._tree import TreeSpec, broadcast_prefix, tree_flatten, tree_names, tree_unflatten, tuple_spec
from .errors import TaskError, TreeError
from .typing import InDims

__all__: list[str] = []


class Tasks(NamedTuple):
    """A tree of which some leaves have a leading task dimension (`mapped`), and the others are shared."""

    leaves: list[Any]
    mapped: list[bool]
    spec: TreeSpec

    @property
    def tree(self) -> Any:
        return tree_unflatten(self.spec, self.leaves)

    def expanded(self, tasks: int) -> Any:
        """The tree with each tensor as ``(tasks, ...)``."""
        return tree_unflatten(self.spec, [_expand(*pair, tasks) for pair in zip(self.leaves, self.mapped, strict=True)])


def _expand(leaf: Any, mapped: bool, tasks: int) -> Any:
    return leaf.expand(tasks, *leaf.shape) if isinstance(leaf, Tensor) and not mapped else leaf


def shared(tree: Any) -> Tasks:
    """A tree that all tasks share."""
    leaves, spec = tree_flatten(tree)
    return Tasks(leaves, [False] * len(leaves), spec)


def per_task(tree: Any) -> Tasks:
    """A tree in which each tensor is ``(tasks, ...)``."""
    leaves, spec = tree_flatten(tree)
    return Tasks(leaves, [isinstance(leaf, Tensor) for leaf in leaves], spec)


def as_tasks(tree: Any, in_dims: InDims, what: str = "argument") -> Tasks:
    """Read `in_dims` as vmap does, and move each task dimension to the front."""
    leaves, spec = tree_flatten(tree)
    try:
        one = in_dims is None or isinstance(in_dims, int)
        dims: list[Any] = [in_dims] * len(leaves) if one else broadcast_prefix(in_dims, tree)
    except ValueError:
        raise TreeError(
            f"`in_dims={in_dims!r}` does not fit the structure of the {what}; write one integer or None for each "
            "argument, or a nesting that mirrors it"
        ) from None
    moved: list[Any] = []
    for index, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is None or not isinstance(leaf, Tensor):
            moved.append(leaf)
            continue
        if not isinstance(dim, int) or not -leaf.ndim <= dim < leaf.ndim:
            raise TaskError(
                f"`in_dims` asks for the tasks in dimension {dim!r} of the {what}'s leaf `{tree_names(tree)[index]}`, "
                f"whose shape is {tuple(leaf.shape)}; give the leaf a task dimension, or None to share it"
            )
        moved.append(leaf.movedim(dim, 0) if dim else leaf)
    mapped = [dim is not None and isinstance(leaf, Tensor) for leaf, dim in zip(leaves, dims, strict=True)]
    return Tasks(moved, mapped, spec)


def count_tasks(**trees: Tasks) -> int | None:
    """The common leading dimension of all mapped leaves; None where there is none.

    Raises:
        TaskError: the leading dimensions differ, or are zero.
    """
    quick = {
        leaf.shape[0] if leaf.ndim else 0
        for each in trees.values()
        for leaf, mapped in zip(each.leaves, each.mapped, strict=True)
        if mapped
    }
    if len(quick) == 1 and 0 not in quick:
        return quick.pop()
    sizes: dict[str, int] = {}
    for what, each in trees.items():
        for name, leaf, mapped in zip(tree_names(each.tree), each.leaves, each.mapped, strict=True):
            where = f"{what}.{name}" if name else what
            if mapped and leaf.ndim == 0:
                raise TaskError(f"`{where}` has no task dimension; give it one entry per task")
            if mapped:
                sizes[where] = leaf.shape[0]
    if len(set(sizes.values())) > 1:
        raise TaskError(
            f"the leading dimensions differ: {', '.join(f'`{k}` has {v}' for k, v in sizes.items())}; "
            "each tensor that is not shared needs one entry per task"
        )
    found = next(iter(sizes.values()), None)
    if found == 0:
        raise TaskError(f"there are zero tasks: the leading dimension of `{next(iter(sizes))}` is 0; pass at least one")
    return found


def share_integers(tasks: Tasks) -> Tasks:
    """Counters that were expanded at the border are one number again: a module may read it (`BatchNorm`)."""
    expanded = [
        mapped and not leaf.is_floating_point() and not leaf.is_complex() and leaf.stride(0) == 0
        for leaf, mapped in zip(tasks.leaves, tasks.mapped, strict=True)
    ]
    if True not in expanded or expanded == tasks.mapped:
        return tasks
    leaves = [leaf[0] if each else leaf for leaf, each in zip(tasks.leaves, expanded, strict=True)]
    return tasks._replace(leaves=leaves, mapped=[m and not e for m, e in zip(tasks.mapped, expanded, strict=True)])


class Mark:
    """A leaf, and whether it has a task dimension."""

    __slots__ = ("leaf", "mapped")

    def __init__(self, leaf: Any, mapped: bool) -> None:
        self.leaf, self.mapped = leaf, mapped


def marked(tasks: Tasks) -> Any:
    return tree_unflatten(tasks.spec, [Mark(*pair) for pair in zip(tasks.leaves, tasks.mapped, strict=True)])


def all_marked(tree: Any, mapped: bool) -> Any:
    """A tree of marks whose tensors are all mapped, or all shared."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten(spec, [Mark(leaf, mapped and isinstance(leaf, Tensor)) for leaf in leaves])


def from_marks(tree: Any) -> Tasks:
    marks, spec = tree_flatten(tree)
    return Tasks([mark.leaf for mark in marks], [mark.mapped for mark in marks], spec)


def joined(*trees: Tasks) -> Tasks:
    """Arguments side by side."""
    leaves = [leaf for each in trees for leaf in each.leaves]
    return Tasks(leaves, [flag for each in trees for flag in each.mapped], tuple_spec([each.spec for each in trees]))


def sliced(tasks: Tasks, here: slice) -> Tasks:
    return tasks._replace(
        leaves=[leaf[here] if m else leaf for leaf, m in zip(tasks.leaves, tasks.mapped, strict=True)]
    )
