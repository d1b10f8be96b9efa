"""`check_over_tasks`: a function of many tasks gives what a plain loop over the tasks gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..._random import drawn_since, random_state
from ..._tasks import check_choices, over_tasks
from ..._tree import tree_flatten, tree_leaves, tree_map, tree_names, tree_unflatten
from ...typing import Backend, InDims, Randomness
from ._by_task import EXACT, Difference, Given, Tolerance, blank, difference, given_of, loop, picked, without_refused
from ._probe import call_of, code_of, copies, gradients, needing, number, plain, seeded

__all__ = ["check_over_tasks"]

SEEDS = 20
"""Draws that are equal with so many seeds are no accident: two masks of one unit are, half of the time."""


def check_over_tasks(
    fn: Callable[..., Any],
    *args: Any,
    in_dims: InDims = (None, 0, ...),
    mapped: Callable[..., Any] | None = None,
    backends: Sequence[Backend] = ("vmap", "loop"),
    chunk_sizes: Sequence[int] = (1, 2),
    kwargs: Mapping[str, Any] | None = None,
    randomness: Randomness = "different",
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that a function of many tasks gives what a plain loop gives: ``fn`` called for each task, results stacked.

    Compared are results, and the gradients of a weighted sum of them by each floating leaf of the arguments (those of
    shared ones are sums over the tasks). Also that tasks in another order give the same results in that order, that
    the data of a task change no other task's results, and that nothing is written into the arguments. Of a function
    that draws random numbers, results cannot be compared with the loop's: their structure and shapes are, and that
    the draws differ between tasks, or are the same.

    Args:
        fn: written for one task: any function of trees that returns a tree. What it closes over is not differentiated.
        *args: the arguments for all tasks.
        in_dims: where each has its tasks, as in `over_tasks`.
        mapped: the function of many tasks that is under test, called with all arguments: ``torch.vmap(fn)``, one that
            calls `adapt_tasks`, code of your own. None: ``over_tasks(fn, in_dims=in_dims)`` with each backend and
            chunk size.
        backends: those of `over_tasks` to test.
        chunk_sizes: likewise, beside all tasks at once.
        kwargs: keyword arguments, which all tasks share.
        randomness: whether the tasks have to draw ``"different"`` random numbers or the ``"same"``; ``"error"``: none.
        rtol: relative tolerance. None: 1e-7 in float64, 1e-4 in float32.
        atol: absolute tolerance. None: 1e-8 and 1e-5, times the largest number of all leaves if that is above 1.

    Raises:
        AssertionError: it differs from the loop, or one of the rest does not hold. It names the task, the leaf, the
            worst entry, both values, and the call.
        TaskError: `in_dims` does not fit.
        TreeError: `fn` returns for different tasks what cannot be stacked.
        VmapError: torch cannot batch `fn`; ``backends=("loop",)`` leaves this out.

    Example:
        >>> import torch
        >>> def loss(w, x):
        ...     return (w - x).square()
        >>> def mine(w, x):
        ...     return (w - x).square().mean().expand(2)
        >>> check_over_tasks(loss, 1.0, torch.tensor([2.0, 4.0]))
        >>> check_over_tasks(loss, 1.0, torch.tensor([2.0, 4.0]), mapped=mine)
        Traceback (most recent call last):
        ...
        AssertionError: `mapped` differs from a loop over the tasks in its results:
          task 0: 2 of 2 entries differ
          worst at [0]: `mapped` 5, the loop 1 (difference 4, allowed 0.00019)
          tasks 0, 1 of 2 differ
          task 1 changes when only the data of task 0 do
          to reproduce: check_over_tasks(loss, 1.0, torch.tensor([2.0, 4.0], dtype=torch.float32), mapped=mine)
    """
    for backend in backends:
        check_choices(backend, randomness)
    given = without_refused(fn, given_of(args, kwargs or {}, in_dims))
    options: dict[str, Any] = {} if in_dims == (None, 0, ...) else {"in_dims": in_dims}
    options |= {"mapped": code_of(mapped)} if mapped is not None else {}
    options |= {"kwargs": kwargs} if kwargs else {}
    options |= {"randomness": repr(randomness)} if randomness != "different" else {}
    case = Case(fn, given, randomness, Tolerance(rtol, atol), call_of("check_over_tasks", fn, args, **options))
    right, drawing = case.loop()
    for subject in _subjects(fn, mapped, in_dims, backends, chunk_sizes, randomness, given.tasks):
        if drawing is not None:
            case.check_draws(subject, right.results, drawing)
        else:
            case.check(subject, right)


class Subject(NamedTuple):
    """A function of many tasks.

    Attributes:
        name: what messages call it.
        call: the function.
        chunk_size: how many tasks it runs at once, where that is known.
    """

    name: str
    call: Callable[..., Any]
    chunk_size: int | None = None


class Found(NamedTuple):
    """What a function of many tasks gave; `gradients` is None where torch has no such derivative."""

    results: Any
    gradients: dict[str, Tensor] | None


def _subjects(
    fn: Callable[..., Any],
    mapped: Callable[..., Any] | None,
    in_dims: InDims,
    backends: Sequence[Backend],
    chunk_sizes: Sequence[int],
    randomness: Randomness,
    count: int,
) -> Iterator[Subject]:
    if mapped is not None:
        yield Subject("`mapped`", mapped)
        return
    for backend in backends:
        sizes = () if backend == "loop" else tuple(size for size in chunk_sizes if size < count)
        for size in (None, *sizes):
            words = f'backend="{backend}"' + (f", chunk_size={size}" if size else "")
            call = over_tasks(fn, in_dims=in_dims, backend=backend, chunk_size=size, randomness=randomness)
            yield Subject(f"`over_tasks(fn, {words})`", call, size)


class Case(NamedTuple):
    """What is checked, with what.

    Attributes:
        fn: the function of one task.
        given: its arguments, for all tasks.
        randomness: whether tasks draw different numbers.
        tolerance: of numbers.
        note: the last line of messages.
    """

    fn: Callable[..., Any]
    given: Given
    randomness: Randomness
    tolerance: Tolerance
    note: str

    # Calls -----------------------------------------------------------------------------------------------------------

    def run(self, who: str, call: Callable[[Given], Any], given: Given, *, seed: int = 1) -> Found:
        """A call with tensors of its own, into which nothing may be written, and gradients."""
        own = given.own
        passed = own._replace(leaves=copies(own.leaves))
        with seeded(seed):
            out = call(passed)
        now, before = tree_unflatten(given.spec, plain(passed.leaves)), tree_unflatten(given.spec, plain(own.leaves))
        written = difference(now, before, given.dims, ("after", "before"), EXACT)
        if written is not None:
            self.fail(f"{who} wrote into its arguments", written.text)
        results, total = plain(out), number(out)
        try:
            return Found(results, gradients(total, needing(own.tree)))
        except (RuntimeError, NotImplementedError):
            return Found(results, None)

    def subject(self, subject: Subject, sources: Sequence[int] | None = None, *, seed: int = 1) -> Found:
        """A call of a function under test, with tasks of which each may be another one of the given ones."""
        given = self.given if sources is None else self.given.rearranged(sources)

        def call(given: Given) -> Any:
            tree = given.tree
            out = subject.call(*tree["args"], **tree["kwargs"])
            leaves, spec = tree_flatten(tree)
            if spec != given.spec or any(a is not b for a, b in zip(leaves, given.leaves, strict=True)):
                self.fail(f"{subject.name} put other tensors into the containers that it was given")
            return out

        return self.run(subject.name, call, given, seed=seed)

    def loop(self) -> tuple[Found, int | None]:
        """What the loop gives, and a task whose results depend on random numbers; None: none do.

        There are no gradients of which the loop's are right where they alone do: of zeros, all dropout makes zeros.
        """
        moved: list[bool] = []

        def call(given: Given) -> Any:
            before = random_state()
            out = loop(self.fn, given)
            moved.append(drawn_since(before))
            return out

        right = self.run("`fn`", call, self.given)
        again = self.run("`fn`", call, self.given)
        if difference(again.results, right.results, self.dims(right.results), ("again", "first"), EXACT):
            self.fail("`fn` gives other numbers when it is called again, with the same arguments and the same seed")
        if not moved[0]:
            return right, None
        if self.randomness == "error":
            self.fail('`fn` draws random numbers, which `randomness="error"` forbids')
        gradients = right.gradients
        for seed in range(2, SEEDS):
            other = self.run("`fn`", call, self.given, seed=seed)
            off = difference(other.results, right.results, self.dims(right.results), ("", ""), EXACT)
            if off is not None:
                return right, off.task or 0
            if gradients is not None and not _same(other.gradients or {}, gradients):
                right = right._replace(gradients=None)
        return right, None

    # What has to hold ------------------------------------------------------------------------------------------------

    def check(self, subject: Subject, right: Found) -> None:
        """Results, gradients, other orders, other data, of a function that draws no random numbers."""
        found = self.subject(subject)
        off = self.results_differ(found.results, right.results, subject)
        if off is not None:
            fits = off.task is not None and self.given.tasks > 1
            cause = self.influence(subject, found.results) if fits else ""
            self.fail(f"{subject.name} differs from a loop over the tasks in its results", off.text, cause)
        if right.gradients is not None:
            self.check_gradients(subject, found.gradients, right.gradients)
        orders = {"with the tasks in reverse order": list(range(self.given.tasks))[::-1]}
        if subject.chunk_size is not None and self.given.tasks % subject.chunk_size == 0:
            orders["without the last task"] = list(range(self.given.tasks - 1))
        for words, sources in orders.items():
            off = self.results_differ(self.subject(subject, sources).results, picked(right.results, sources), subject)
            if off is not None:
                self.fail(f"{subject.name} differs from a loop over the tasks in its results, {words}", off.text)
        self.check_independent(subject, found.results)

    def check_gradients(self, subject: Subject, found: dict[str, Tensor] | None, right: dict[str, Tensor]) -> None:
        if found is None:
            self.fail(f"{subject.name} returned tensors whose gradient torch cannot take, and a loop has one")
        names = tree_names(self.given.tree)
        for shared in (False, True):
            dims = {
                n: dim for n, dim in zip(names, self.given.dims, strict=True) if n in right and (dim is None) == shared
            }
            ours, theirs = ({name: each[name] for name in dims} for each in (found, right))
            kind = "by shared arguments, which are sums over the tasks" if shared else "by mapped arguments"
            off = difference(ours, theirs, list(dims.values()), (subject.name, "the loop"), self.tolerance)
            if off is not None:
                what = f"{subject.name} differs from a loop over the tasks in gradients {kind}"
                self.fail(what, off.text, self.ratio(ours, theirs) if shared else "")

    def check_draws(self, subject: Subject, right: Any, drawing: int) -> None:
        """What can be said of a function that draws random numbers: shapes, and which tasks draw the same ones.

        All are given the data of a task on which the numbers have an effect.
        """
        found = self.subject(subject).results
        off = self.results_differ(tree_map(blank, found), tree_map(blank, right), subject)
        if off is not None:
            self.fail(f"{subject.name} differs from a loop over the tasks in its results", off.text)
        self.check_independent(subject, found)
        alike = {(i, k) for i in range(self.given.tasks) for k in range(i)}
        for seed in range(SEEDS):
            if not alike:
                return
            found = self.subject(subject, [drawing] * self.given.tasks, seed=seed).results
            same = {
                (i, k) for i, k in alike if not self.results_differ(picked(found, [i]), picked(found, [k]), subject)
            }
            if self.randomness == "same" and same != alike:
                first, second = min(alike - same)
                self.fail(f'tasks {second} and {first} of {subject.name} draw different numbers, not the `"same"`')
            if self.randomness == "different":
                alike = same
        if self.randomness == "different" and alike:
            first, second = min(alike)
            self.fail(f'tasks {second} and {first} of {subject.name} draw the same numbers, not `"different"` ones')

    def check_independent(self, subject: Subject, found: Any) -> None:
        words = self.influence(subject, found)
        if words:
            self.fail(f"{subject.name} lets tasks influence each other", words)

    def influence(self, subject: Subject, found: Any) -> str:
        """Which task changes with the data of another one; `found` are the results with the data as given."""
        count = self.given.tasks
        for changed in (0, count - 1) if count > 1 else ():
            sources = list(range(count))
            sources[changed] = (changed + 1) % count
            now = self.subject(subject, sources).results
            others = [task for task in range(count) if task != changed]
            off = difference(
                picked(now, others), picked(found, others), self.dims(found), ("after", "before"), self.tolerance
            )
            if off is not None and off.task is not None:
                return f"task {others[off.task]} changes when only the data of task {changed} do"
        return ""

    # Words -----------------------------------------------------------------------------------------------------------

    def results_differ(self, found: Any, right: Any, subject: Subject) -> Difference | None:
        return difference(found, right, self.dims(right), (subject.name, "the loop"), self.tolerance)

    def dims(self, results: Any) -> list[int | None]:
        return [0 if isinstance(leaf, Tensor) else None for leaf in tree_leaves(results)]

    def ratio(self, found: dict[str, Tensor], right: dict[str, Tensor]) -> str:
        """Whether the sum over tasks has become a mean."""
        mean = {name: value / self.given.tasks for name, value in right.items()}
        off = difference(found, mean, [None] * len(mean), ("", ""), self.tolerance)
        return "" if off else "it is the mean over the tasks in place of the sum"

    def fail(self, *lines: str) -> NoReturn:
        what, *rest = [line for line in lines if line]
        raise AssertionError("\n  ".join([what + (":" if rest else ""), *rest, self.note]))


def _same(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether the gradients of one draw are those of another one."""
    return all(torch.equal(grad.nan_to_num(), others[name].nan_to_num()) for name, grad in gradients.items())
