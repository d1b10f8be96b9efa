"""`over_tasks`: a function of one task becomes a function of many."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import current_level, is_batchedtensor, maybe_get_level

from ._budget import Chunks, check_chunks
from ._compile import compiled_call, plain, refuse_measuring
from ._random import drawn_since, random_state, set_random_state
from ._task_trees import Tasks, as_tasks, count_tasks, share_integers
from ._transforms import unseen
from ._tree import (
    TreeSpec,
    same_static,
    stack_leaves,
    tree_flatten,
    tree_names,
    tree_unflatten,
)
from ._vmapped import vmapped
from ._words import nearest
from .errors import RandomnessError, StatelessifyError, TaskError, TreeError, VmapError
from .rules._registry import rules, rules_here
from .typing import Backend, ChunkSize, InDims, Randomness

__all__ = ["over_tasks"]


def check_choices(backend: str, randomness: str) -> None:
    for name, value, choices in (
        ("backend", backend, ("auto", "vmap", "loop")),
        ("randomness", randomness, ("different", "same", "error")),
    ):
        if value not in choices:
            raise TaskError(f"`{name}={value!r}` is not one of {choices}{nearest(str(value), choices)}")


def over_tasks(
    fn: Callable[..., Any],
    *,
    in_dims: InDims = (None, 0, ...),
    chunk_size: ChunkSize = None,
    memory_budget: int | None = None,
    randomness: Randomness = "different",
    backend: Backend = "auto",
) -> Callable[..., Any]:
    """Map a function of one task over many: ``fn(params, batch)`` becomes a function of ``(tasks, ...)`` batches.

    Args:
        fn: any function of trees that returns a tree. It is written for one task.
        in_dims: where each positional argument has its tasks, as in `torch.vmap`; None shares it. ``...`` repeats
            the entry before it, so the default shares the first argument and maps all others along dimension 0.
            Keyword arguments are shared, and so are leaves that are not tensors.
        chunk_size: at most so many tasks at once, for less memory. None: all. ``"auto"``: as many as `memory_budget`
            lets. Each call begins with one task, which is measured while it does its work, then up to 8, and so on;
            a chunk whose memory grows faster than its tasks may go over the budget once.
        memory_budget: for ``"auto"``, bytes that the call may take above what there was before: results, what is
            computed on the way, and the graph where one is recorded; not the backward pass through that graph. It
            counts tensors on the device of the mapped arguments, as torch's allocator reports them. None: half of
            what is free on the device.
        randomness: whether tasks draw ``"different"`` random numbers or the ``"same"``; ``"error"`` forbids them.
        backend: ``"vmap"``, ``"loop"``, or ``"auto"``: the loop for one task, else vmap, and where torch has no
            batching rule the loop, with one warning. The numbers are the same.

    Returns:
        A function with the arguments of `fn`, in whose result each tensor is ``(tasks, ...)``.

    Raises:
        TaskError: leading dimensions differ, there are zero tasks, or no argument is mapped.
        TreeError: results that are not tensors differ between tasks.
        VmapError: ``backend="vmap"``, and torch cannot batch `fn`.
        CompileError: ``chunk_size="auto"`` in compiled code, which cannot measure.

    Warns:
        UserWarning: one task at a time takes more than the budget. The call goes on with that.

    Example:
        >>> from statelessify import over_tasks
        >>> over_tasks(lambda w, x: (w * x).sum())(torch.ones(3), torch.ones(5, 3)).shape
        torch.Size([5])
    """
    check_choices(backend, randomness)
    check_chunks(chunk_size, memory_budget)
    refuse_measuring(fn, chunk_size)

    @wraps(fn, updated=())
    def mapped(*args: Any, **kwargs: Any) -> Any:
        tasks = as_tasks(args, _repeated(in_dims, len(args)), "arguments")
        count = count_tasks(args=tasks)
        if count is None:
            raise TaskError(
                f"no argument is mapped over tasks: `in_dims={in_dims!r}` shares all {len(args)}; "
                "write `in_dims=0` to map the first one"
            )
        source = plain(fn)
        mapper = Mapper(count, backend, randomness, chunk_size, memory_budget)
        call = partial(source, **kwargs) if kwargs else source
        return compiled_call(fn, lambda given: mapper(call, given, source))(tasks).expanded(count)

    return mapped


def _repeated(in_dims: InDims, count: int) -> Any:
    """`in_dims` with its ``...`` written out for `count` arguments."""
    if isinstance(in_dims, list):
        in_dims = tuple(cast("list[Any]", in_dims))
    if not isinstance(in_dims, tuple):
        return in_dims
    entries = cast("tuple[Any, ...]", in_dims)
    if len(entries) > 1 and entries[-1] is ...:
        body = entries[:-1]
        entries = (body + (body[-1],) * (count - len(body)))[:count]
    if len(entries) != count:
        raise TaskError(f"`in_dims={in_dims!r}` has {len(entries)} entries for {count} positional arguments")
    return entries


_warned: set[Any] = set()


def _warn_once(key: Any, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, stacklevel=5)


class Mapper:
    """How the tasks of one run are mapped: the same choice for each of its functions and steps.

    Once torch has refused to batch a function, the run stays with the loop.
    """

    def __init__(
        self,
        tasks: int,
        backend: Backend = "auto",
        randomness: Randomness = "different",
        chunk_size: ChunkSize = None,
        memory_budget: int | None = None,
    ) -> None:
        self.tasks = tasks
        self._chunk_size: ChunkSize = chunk_size
        self._memory_budget = memory_budget
        self._chunks: dict[int, Chunks] = {}
        self._all_alike = Chunks(chunk_size)
        self.randomness: Randomness = randomness
        self._loops = backend == "loop" or (backend == "auto" and tasks == 1)
        self._falls_back = backend == "auto"
        self._random_state: list[Tensor] = []

    def chunks(self, source: Callable[..., Any]) -> Chunks:
        """How a function is run in chunks, and what is known about that so far."""
        if self._chunk_size != "auto":
            return self._all_alike
        if id(source) not in self._chunks:
            name = getattr(source, "__name__", type(source).__name__)
            self._chunks[id(source)] = Chunks("auto", self._memory_budget, name)
        return self._chunks[id(source)]

    def __call__(
        self,
        fn: Callable[..., Any],
        args: Tasks,
        source: Callable[..., Any] | None = None,
        chunks: Chunks | None = None,
    ) -> Tasks:
        """``fn(*args)`` for each task; `source` is the user's function, for messages.

        `chunks` are those of `source` if nothing else is given.
        """
        with unseen():
            args = share_integers(args)
            count = next((leaf.shape[0] for leaf, m in zip(args.leaves, args.mapped, strict=True) if m), self.tasks)
        if self._loops:
            return _loop(fn, args, count, self.randomness)
        if torch.compiler.is_compiling():
            return _vmap(fn, args, count, chunks or self.chunks(source or fn), self.randomness)
        self._random_state = before = random_state()
        try:
            return _vmap(fn, args, count, chunks or self.chunks(source or fn), self.randomness)
        except StatelessifyError:
            raise
        except Exception as error:
            set_random_state(before)
            result = _loop(fn, args, count, self.randomness)  # if it raises too, its error is the one that helps
            if not self._falls_back:
                raise VmapError(
                    f"torch.vmap cannot batch {_blame(error, source or fn)}: {_first_line(error)}; "
                    'write `backend="loop"`, or "auto" to take the loop where it is needed'
                ) from error
            after = random_state()
            self.fall_back(error, source or fn)
            set_random_state(after)
            return result

    @property
    def one_alone(self) -> bool:
        """Whether there is one task, which runs as if there were no task dimension."""
        return self._loops and self.tasks == 1 and self.randomness != "error"

    def fall_back(self, error: Exception, source: Callable[..., Any]) -> bool:
        """Stay with the loop from now on, with one warning, if that was left open; whether it was.

        The random state is then that before the last call, which can be repeated.
        """
        if self._loops or not self._falls_back:
            return False
        self._loops = True
        set_random_state(self._random_state)
        _warn_once(
            getattr(source, "__code__", None) or id(source),
            f"torch.vmap cannot batch {_blame(error, source)} ({_first_line(error)}); its tasks run in a loop instead, "
            'with the same numbers. Write `backend="loop"` to silence this',
        )
        return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _blame(error: BaseException, fn: Callable[..., Any]) -> str:
    """The innermost module, else the function, whose code was running when torch gave up."""
    name = getattr(fn, "__name__", type(fn).__name__)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith("statelessify."):
            name = type(owner).__name__
    return f"`{name}`"


def _vmap(fn: Callable[..., Any], args: Tasks, tasks: int, chunks: Chunks, randomness: Randomness) -> Tasks:
    """One level of vmap over the mapped leaves; everything that is not a tensor travels beside it."""
    inputs = [leaf for leaf, mapped in zip(args.leaves, args.mapped, strict=True) if mapped]
    aside: list[tuple[list[Any], list[bool], TreeSpec]] = []

    def one_task(*values: Tensor) -> tuple[Tensor, ...]:
        leaves: Any = values
        if len(values) < len(args.leaves):
            remaining = iter(values)
            leaves = [next(remaining) if m else leaf for leaf, m in zip(args.leaves, args.mapped, strict=True)]
        with rules("transforms"):
            out = fn(*tree_unflatten(args.spec, leaves))
        results, spec = tree_flatten(out)
        with unseen():
            mapped = [_per_task_result(leaf) for leaf in results]
        aside.append(([None if m else leaf for leaf, m in zip(results, mapped, strict=True)], mapped, spec))
        return tuple(leaf for leaf, m in zip(results, mapped, strict=True) if m)

    outputs = iter(vmapped(one_task, inputs, tasks, randomness, chunks))
    leaves, mapped, spec = aside[0]
    names = tree_names(tree_unflatten(spec, [0] * len(leaves))) if len(aside) > 1 else [""] * len(leaves)
    for chunk, _, other in aside[1:]:
        if other != spec:
            raise TreeError("the function returned different structures for different chunks of tasks")
        for name, a, b in zip(names, leaves, chunk, strict=True):
            _check_agree(name, a, b)
    return Tasks([next(outputs) if m else leaf for leaf, m in zip(leaves, mapped, strict=True)], list(mapped), spec)


def _check_agree(name: str, a: Any, b: Any) -> None:
    if not isinstance(a, Tensor) and not same_static(a, b):
        raise TreeError(f"result `{name}` is not a tensor and differs between tasks: {a!r} and {b!r}; return a tensor")


def _per_task_result(leaf: Any) -> bool:
    """Integer tensors that stayed shared inside (counters) stay shared; every other tensor gets a task dimension."""
    if not isinstance(leaf, Tensor):
        return False
    if leaf.is_floating_point() or leaf.is_complex():
        return True
    return is_batchedtensor(leaf) and (torch.compiler.is_compiling() or maybe_get_level(leaf) == current_level())


def _entries(leaf: Tensor, count: int) -> Sequence[Tensor]:
    entries = leaf.unbind(0) if count > 1 else (leaf.squeeze(0),)  # whose backward is a view
    # The backward pass of torch's `batch_norm` on CPUs reads a weight as if it were contiguous.
    return entries if entries[0].is_contiguous() else [entry.contiguous() for entry in entries]


def _loop(fn: Callable[..., Any], args: Tasks, count: int, randomness: Randomness) -> Tasks:
    columns = [_entries(leaf, count) if mapped else [leaf] * count for leaf, mapped in zip(*args[:2], strict=True)]
    state = random_state() if randomness == "same" else None
    before = random_state() if randomness == "error" else None
    rows: list[list[Any]] = []
    spec: TreeSpec | None = None
    names: list[str] = []
    for index in range(count):
        if state is not None:
            set_random_state(state)
        with rules_here():
            out = fn(*tree_unflatten(args.spec, [column[index] for column in columns]))
        if before is not None and drawn_since(before):
            raise RandomnessError(
                f'`{getattr(fn, "__name__", fn)}` draws random numbers, which `randomness="error"` forbids; write '
                '"different" or "same"'
            )
        row, other = tree_flatten(out)
        if spec is None:
            spec, names = other, tree_names(out)
        elif other != spec:
            raise TreeError(f"task {index} returned another structure than task 0: {other} and {spec}")
        rows.append(row)
    assert spec is not None
    if count == 1:
        stacked = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in rows[0]]
    else:
        stacked = [stack_leaves(name, column) for name, column in zip(names, zip(*rows, strict=True), strict=True)]
    return Tasks(stacked, [isinstance(leaf, Tensor) for leaf in stacked], spec)
