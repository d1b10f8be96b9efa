"""How many tasks run at once: all, so many, or as many as a memory budget lets.

``"auto"`` evaluates nothing twice. The first chunk is one task, and what it takes is measured while it does its work;
from that follows the size of the next one, which is measured too, until a larger one would not fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import ceil
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._memory import Measured, device_of, free_memory
from ._random import drawn_since, random_state, set_random_state
from ._transforms import depth, unwrapped
from ._tree import tree_leaves
from ._words import nearest
from .errors import CompileError, TaskError
from .typing import ChunkSize, Randomness

__all__: list[str] = []

Result = TypeVar("Result")

GROWTH = 8  # a chunk is at most so many times larger than the one that was measured
MARGIN = 0.9  # what is laid aside of the budget: joining chunks, and what a step makes around them
HEADROOM = 1.5  # one task alone can take less than its share of two: views instead of copies, other kernels


def check_chunks(chunk_size: Any, memory_budget: Any) -> None:
    """Refuse what is no chunk size or no budget."""
    if isinstance(chunk_size, str) and chunk_size != "auto":
        raise TaskError(f'`chunk_size={chunk_size!r}` is not "auto"{nearest(chunk_size, ["auto"])}')
    if chunk_size is not None and chunk_size != "auto" and not _is_positive(chunk_size):
        raise TaskError(
            f'`chunk_size={chunk_size!r}` is not a number of tasks; write a positive integer, "auto", or None'
        )
    if memory_budget is None:
        return
    if not _is_positive(memory_budget):
        raise TaskError(
            f"`memory_budget={memory_budget!r}` is not a number of bytes; write a positive integer (`4 * 2**30`), or "
            "None for half of what is free"
        )
    if chunk_size != "auto":
        raise TaskError(
            f"`memory_budget` is kept by choosing the chunk size, and `chunk_size={chunk_size!r}` is chosen already; "
            'write `chunk_size="auto"`, or leave `memory_budget` out'
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Chunks:
    """Runs a function of a slice of tasks over all of them, in chunks.

    Args:
        size: how many tasks at once; None is all.
        budget: bytes, for ``"auto"``; None is half of what is free at the first run.
        name: the user's function, for messages.
    """

    def __init__(self, size: ChunkSize = None, budget: int | None = None, name: str = "") -> None:
        self.size, self._budget, self._name = size, budget, name
        self._known: dict[Any, _Estimate] = {}
        self._drawn: list[tuple[list[Tensor], list[int]]] = []
        self._warned = False

    def run(self, call: Callable[[slice], Result], tasks: int, randomness: Randomness, tensors: Any) -> list[Result]:
        """``call(here)`` for each chunk; `tensors`, a tree, say on which device."""
        if isinstance(self.size, str):
            return self._run_measured(call, tasks, randomness, device_of(tree_leaves(tensors)))
        size = tasks if self.size is None else min(self.size, tasks)
        sizes = [min(size, tasks - start) for start in range(0, tasks, size)]
        return _run_sizes(call, sizes, randomness)

    def settled(self) -> Chunks:
        """Chunks of one size, which is the one that was found where ``"auto"`` has run."""
        if not isinstance(self.size, str):
            return self
        return Chunks(min((known.size for known in self._known.values()), default=1))

    def _run_measured(
        self, call: Callable[[slice], Result], tasks: int, randomness: Randomness, device: torch.device
    ) -> list[Result]:
        if torch.compiler.is_compiling():
            raise CompileError(
                '`chunk_size="auto"` measures what a chunk takes while it runs, and torch.compile runs nothing while '
                "it traces; write a number of tasks"
            )
        before = random_state()
        for state, sizes in self._drawn:
            if all(map(torch.equal, state, before)):  # a step that is computed again: each task draws what it drew
                return _run_sizes(call, sizes, randomness)
        if self._budget is None:
            self._budget = max(1, free_memory(device) // 2)
        # A step may be computed again with a graph, or inside a transform: then it takes more.
        known = self._known.setdefault((torch.is_grad_enabled(), depth()), _Estimate())
        results: list[Result] = []
        sizes: list[int] = []
        kept = 0
        while (start := sum(sizes)) < tasks:
            count = ceil((tasks - start) / ceil((tasks - start) / known.size))
            if randomness == "same":
                set_random_state(before)
            sizes.append(count)
            if known.settled:
                results.append(call(slice(start, start + count)))
                continue
            with Measured(device) as seen:
                results.append(call(slice(start, start + count)))
            need = max(kept + seen.peak, known.learn(count, seen, _size(results[-1]), tasks, self._budget))
            kept += seen.kept
            if need > self._budget:
                self._warn(need, tasks)
        if randomness == "different" and drawn_since(before):
            self._drawn.append((before, sizes))
        return results

    def _warn(self, need: int, tasks: int) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{tasks} tasks of `{self._name}` take {need:,} bytes, more than the budget of {self._budget:,}: chunks "
            "from here on are smaller where they can be, and what remains is one task's own memory, the results, and "
            "the graph where one is recorded (`checkpoint_every` keeps less of it); write a larger `memory_budget`, or "
            "pass fewer tasks",
            stacklevel=6,
        )


def _run_sizes(call: Callable[[slice], Result], sizes: list[int], randomness: Randomness) -> list[Result]:
    numbers = random_state() if randomness == "same" and len(sizes) > 1 else None
    results: list[Result] = []
    start = 0
    for size in sizes:
        if numbers is not None:
            set_random_state(numbers)
        results.append(call(slice(start, start + size)))
        start += size
    return results


class _Estimate:
    """What the chunks so far say about the next one.

    Attributes:
        size: how many tasks it may have.
        settled: whether more would not fit, or would not make the chunks fewer.
    """

    def __init__(self) -> None:
        self.size, self.settled, self._begun = 1, False, False

    def learn(self, count: int, seen: Measured, results: int, tasks: int, budget: int) -> int:
        """Learn from a chunk whose results have so many bytes; the bytes that all tasks need, as far as is known."""
        kept = max(0, seen.kept) / count
        on_top = max(1.0, seen.peak / count - kept)
        left = MARGIN * budget - kept * tasks
        fits = min(int(left / (on_top * HEADROOM if count == 1 else on_top)), GROWTH * count, tasks)
        self.size = max(1, fits)
        if not self._begun:  # the first call of all may set up what stays and is no task's own
            self._begun = True
            return 0
        self.settled = self.size <= count or ceil(tasks / self.size) == ceil(tasks / count)
        joining = results / count * tasks if self.size < tasks else 0
        return int(kept * tasks + max(on_top, joining))


def _size(result: Any) -> int:
    """Bytes of the tensors of a result, as the innermost level of transforms holds them."""
    return sum(unwrapped(leaf).nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
