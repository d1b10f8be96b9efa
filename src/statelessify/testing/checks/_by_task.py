"""Arguments of which some have a task dimension, a plain loop over the tasks, and in which tasks two results differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..._tree import (
    TreeSpec,
    broadcast_prefix,
    first_difference,
    same_static,
    tree_flatten,
    tree_map,
    tree_names,
    tree_unflatten,
)
from ..._words import listed
from ...errors import TaskError, TreeError
from .._close import assert_trees_close, worst
from ._probe import accepted, code_of, is_inexact, own_leaves

__all__: list[str] = []

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float32: (1e-4, 1e-5),
    torch.complex64: (1e-4, 1e-5),
    torch.float64: (1e-7, 1e-8),
    torch.complex128: (1e-7, 1e-8),
}
"""By dtype: relative tolerance, and absolute tolerance where the largest number is 1. Many tasks at once are computed
by other kernels than one, in another order."""


class Given(NamedTuple):
    """Arguments for many tasks.

    Attributes:
        leaves: of ``{"args": args, "kwargs": kwargs}``.
        dims: the task dimension of each; None where all tasks share it.
        spec: the structure.
        tasks: how many there are.
        wanted: by which leaves gradients are taken.
    """

    leaves: list[Any]
    dims: list[int | None]
    spec: TreeSpec
    tasks: int
    wanted: list[bool]

    @property
    def tree(self) -> dict[str, Any]:
        return tree_unflatten(self.spec, self.leaves)

    @property
    def own(self) -> Given:
        """With tensors of its own, of which those require a gradient that are wanted."""
        return self._replace(leaves=own_leaves(self.leaves, self.wanted))

    def task(self, index: int) -> dict[str, Any]:
        """The arguments of one task, contiguous: torch's `batch_norm` on CPUs takes a strided weight for such a one."""
        pairs = zip(self.leaves, self.dims, strict=True)
        entries = [leaf if dim is None else leaf.select(dim, index).contiguous() for leaf, dim in pairs]
        return tree_unflatten(self.spec, entries)

    def rearranged(self, sources: Sequence[int]) -> Given:
        """Arguments whose task i is task ``sources[i]`` of these."""
        pairs = zip(self.leaves, self.dims, strict=True)
        leaves = [
            leaf if dim is None else torch.stack([leaf.select(dim, i) for i in sources], dim) for leaf, dim in pairs
        ]
        return self._replace(leaves=leaves, tasks=len(sources))


def given_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], in_dims: Any) -> Given:
    """Read `in_dims` as `over_tasks` does, by code of its own."""
    tree: dict[str, Any] = {"args": args, "kwargs": dict(kwargs)}
    if isinstance(in_dims, (tuple, list)):
        entries = list(cast("Sequence[Any]", in_dims))
        if len(entries) > 1 and entries[-1] is ...:
            entries = (entries[:-1] + [entries[-2]] * len(args))[: len(args)]
        in_dims = tuple(entries)
    try:
        dims = broadcast_prefix({"args": in_dims, "kwargs": None}, tree)
    except ValueError:
        raise TaskError(
            f"`in_dims={in_dims!r}` does not fit the {len(args)} arguments; write one entry for each"
        ) from None
    leaves, spec = tree_flatten(tree)
    dims = [dim if isinstance(leaf, Tensor) else None for leaf, dim in zip(leaves, dims, strict=True)]
    counts: dict[str, int] = {}
    for name, leaf, dim in zip(tree_names(tree), leaves, dims, strict=True):
        if dim is None:
            continue
        if not isinstance(dim, int) or not -leaf.ndim <= dim < leaf.ndim:
            raise TaskError(f"`in_dims` asks for dimension {dim!r} of `{name}`, whose shape is {tuple(leaf.shape)}")
        counts[name] = leaf.shape[dim]
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise TaskError(
            f"the arguments need one number of tasks, at least one, and have {counts or 'no task dimension'}"
        )
    return Given(leaves, dims, spec, next(iter(counts.values())), [is_inexact(leaf) for leaf in leaves])


def without_refused(fn: Callable[..., Any], given: Given) -> Given:
    """Gradients are wanted only by leaves of which torch does not refuse them."""

    def call(leaves: list[Any]) -> None:
        task = given._replace(leaves=leaves).task(0)
        fn(*task["args"], **task["kwargs"])

    return given._replace(wanted=accepted(call, given.leaves))


def loop(fn: Callable[..., Any], given: Given) -> Any:
    """``fn`` called for one task after the other; in the result each tensor is ``(tasks, ...)``."""
    rows: list[list[Any]] = []
    spec, result = given.spec, None
    for index in range(given.tasks):
        task = given.task(index)
        result = fn(*task["args"], **task["kwargs"])
        row, other = tree_flatten(result)
        if rows and other != spec:
            raise TreeError(f"task {index} returned another structure than task 0: {first_difference(other, spec)}")
        spec = other
        rows.append(row)
    names = tree_names(result)
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return tree_unflatten(spec, [_stacked(name, column) for name, column in columns])


def _stacked(name: str, column: Sequence[Any]) -> Any:
    if all(isinstance(leaf, Tensor) for leaf in column):
        shapes = [tuple(leaf.shape) for leaf in column]
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise TreeError(f"result `{name}` has shape {shape} in task {index}, and {shapes[0]} in task 0")
        return torch.stack(tuple(column))
    for index, leaf in enumerate(column):
        if not same_static(leaf, column[0]):
            raise TreeError(
                f"result `{name}` is no tensor, and {code_of(leaf)} in task {index}, {code_of(column[0])} in task 0; "
                "return a tensor"
            )
    return column[0]


def picked(results: Any, tasks: Sequence[int]) -> Any:
    """The results of some tasks."""

    def pick(leaf: Any) -> Any:
        return leaf[list(tasks)] if isinstance(leaf, Tensor) else leaf

    return tree_map(pick, results)


def blank(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


class Tolerance(NamedTuple):
    """What numbers may be off; None: what rounding explains."""

    rtol: float | None
    atol: float | None

    def at(self, leaf: Any, largest: float) -> tuple[float, float]:
        rtol, atol = TOLERANCES.get(leaf.dtype, (0.0, 0.0)) if isinstance(leaf, Tensor) else (0.0, 0.0)
        return rtol if self.rtol is None else self.rtol, atol * max(1.0, largest) if self.atol is None else self.atol


EXACT = Tolerance(0, 0)


class Difference(NamedTuple):
    """How two trees differ: in words, and the worst task, if it can be told."""

    text: str
    task: int | None = None


def difference(
    found: Any, expected: Any, dims: Sequence[int | None], names: tuple[str, str], tolerance: Tolerance
) -> Difference | None:
    """How two trees differ that have their tasks in `dims`, by leaf, and are called `names`; None if they do not."""
    ours, spec = tree_flatten(found)
    theirs, other = tree_flatten(expected)
    if spec != other:
        return Difference(f"{names[0]} has another structure than {names[1]}: {first_difference(spec, other)}")
    largest = max(map(_largest, theirs), default=0.0)
    wrong: dict[str, Difference] = {}
    for name, a, b, dim in zip(tree_names(expected), ours, theirs, dims, strict=True):
        here = _leaf_difference(name, a, b, dim, names, tolerance.at(b, largest))
        if here is not None:
            wrong[name] = here
    if not wrong:
        return None
    first, *rest = wrong
    more = f"\n  {len(rest)} more of {len(ours)} leaves differ: {listed(rest)}" if rest else ""
    return wrong[first]._replace(text=wrong[first].text + more)


def _largest(leaf: Any) -> float:
    if not is_inexact(leaf) or not leaf.numel():
        return 0.0
    return float(torch.where(leaf.isfinite(), leaf.abs(), 0).max())


def _leaf_difference(
    name: str, a: Any, b: Any, dim: int | None, names: tuple[str, str], tolerance: tuple[float, float]
) -> Difference | None:
    rtol, atol = tolerance
    try:
        assert_trees_close({name: a}, {name: b}, rtol=rtol, atol=atol, equal_nan=True, names=names)
    except AssertionError as error:
        text = str(error)
    else:
        return None
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or dim is None:
        return Difference(text)
    words = _what_became_of_the_tasks(a, b.movedim(dim, 0), rtol, atol)
    if a.shape != b.shape:
        return Difference(text + words)
    pairs = zip(a.unbind(dim), b.unbind(dim), strict=True)
    bad = [i for i, (one, two) in enumerate(pairs) if worst(one, two, rtol, atol, equal_nan=True)]
    task = bad[0] if len(bad) == 1 else cast("Any", worst(a, b, rtol, atol, equal_nan=True)).at[dim]
    others = "" if len(bad) == 1 else f"\n  tasks {', '.join(map(str, bad))} of {len(a.unbind(dim))} differ"
    return Difference(f"task {task}: {text}{others}{words}", task)


def _what_became_of_the_tasks(a: Tensor, b: Tensor, rtol: float, atol: float) -> str:
    for dim in range(1, a.ndim):
        moved = a.movedim(dim, 0)
        if moved.shape == b.shape and worst(moved, b, rtol, atol, equal_nan=True) is None:
            return f"\n  its tasks lie in dimension {dim}, and should lie in dimension 0"
    if a.shape == b.shape[1:]:
        return "\n  the task dimension is missing: each task has a result of its own, no sum or mean"
    if a.ndim == b.ndim and a.shape[1:] == b.shape[1:] and len(a) < len(b):
        return f"\n  there are {len(b)} tasks and {len(a)} results: task {len(a)} has none, if they are in order"
    return ""
