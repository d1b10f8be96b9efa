"""`check_modes`: all ways to differentiate one inner loop, held against plain loops and against each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._adapt import adapt, check_loop
from ..._adapt_tasks import adapt_tasks
from ..._forward_mode import ForwardMode
from ..._implicit import Implicit
from ..._loop import Gradient
from ..._random import drawn_since, random_state
from ..._tree import (
    stack_leaves,
    tree_detach,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_stack,
    tree_unflatten,
)
from ..._unroll import FirstOrder, Unroll
from ...errors import HyperparameterError
from ...optim import Optimizer
from .._close import assert_trees_close
from ._closed import closed_over
from ._inner import Inner, Promised, hyperparameters_of, is_exact, plain_loop
from ._probe import gradients, is_inexact, needing, own_leaves, plain, seeded
from ._routes import anew, silent
from ._say import call_of_loop, optimizer_code

__all__ = ["check_modes"]

MOST_DIRECTIONS = 64
"""So many numbers `ForwardMode` is asked for; where there are more, for the hyperparameters alone."""

PLAIN, SAME, NARROW = 1e-10, 1e-12, 1e-4
"""How near results are: in float64, to a plain loop; to `Unroll()`; and in float32."""


def check_modes(
    loss: Callable[[Any, Any], Tensor],
    params: Any,
    support: Any,
    query: Any = None,
    *,
    optimizer: Optimizer,
    steps: int,
    modes: Sequence[Gradient] | None = None,
    tasks: int = 3,
    rtol: float | None = None,
) -> None:
    """Assert that all modes of `adapt` agree on one problem, as far as they promise to.

    The values and losses of each mode, and the gradient of ``loss(adapted, query)`` by all that goes in (initial
    parameters, data, hyperparameters, closed-over tensors), are those of a plain loop: the exact one for `Unroll()`,
    and then `Unroll()`'s for any `checkpoint_every` and `ForwardMode()`; one with constant inner gradients for
    `FirstOrder()`; one whose first steps are constant but for an identity path for `truncate`; a step of Newton's
    method for `Implicit()`. Under `torch.no_grad` the values are the same and nothing is recorded; `adapt_tasks` gives
    the numbers of a loop over the tasks. A loss that draws random numbers draws the same ones in each run; `truncate`,
    `Implicit()` and `adapt_tasks` are left out for it.

    Args:
        loss: ``loss(params, batch) -> scalar``.
        params: the initial parameters.
        support: what the loop is trained on; a tree, or a callable ``batch(step, params)`` (without `adapt_tasks`).
        query: what the adapted parameters are judged by. None: `support`.
        optimizer: an `optim.Optimizer`.
        steps: of the loop.
        modes: which; None: all but `Implicit()`, with every `checkpoint_every` and `truncate` from 1 to `steps`.
        tasks: how many are made of `support`, with other numbers; 0 leaves `adapt_tasks` out.
        rtol: how near results have to be. None: 1e-10 to a plain loop and 1e-12 to `Unroll()`, in float32 1e-4.

    Raises:
        AssertionError: a mode differs. It names the mode, the leaf, the worst entry and both values.
        HyperparameterError: arguments that do not fit together.

    Example:
        >>> import torch
        >>> from statelessify import optim
        >>> from statelessify.testing import check_modes
        >>> fit = lambda w, target: ((w - target) ** 4).sum()
        >>> start, target = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        >>> check_modes(fit, start, target, optimizer=optim.adam(lr=torch.tensor(0.1)), steps=2)
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HyperparameterError(f"`tasks={tasks!r}` is not a number of tasks; write an integer, 0 or more")
    chosen = list(_all_modes(steps)) if modes is None else list(modes)
    for mode in (Unroll(), *chosen):
        check_loop(optimizer, steps, mode)
    tree = {"params": params, "support": support, **({} if query is None else {"query": query})}
    found = hyperparameters_of(optimizer.init(params))
    tree |= {"hyperparameters": found} if found else {}
    shown = {"optimizer": optimizer_code(optimizer), "steps": steps}
    shown |= {} if modes is None else {"modes": chosen}
    note = f"reproduce: {call_of_loop('check_modes', loss, params, support, query, shown)}"
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        check = _Check(Inner(loss, optimizer, steps), tree, rtol, note)
        if check.draws:
            chosen = [mode for mode in chosen if is_exact(mode) or isinstance(mode, FirstOrder)]
        check.against_plain_loops(chosen)
        check.without_graph(chosen)
        if tasks and not callable(support) and not check.draws:
            check.many_tasks(chosen, tasks)


def _all_modes(steps: int) -> Iterator[Gradient]:
    yield Unroll()
    yield from (Unroll(checkpoint_every=every) for every in range(1, steps + 1))
    yield Unroll(checkpoint_every="auto")
    yield ForwardMode()
    yield from (Unroll(truncate=last) for last in range(1, steps + 1))
    if steps > 2:
        yield Unroll(truncate=2, checkpoint_every=1)
    yield FirstOrder()


def _kind(mode: Gradient) -> Any:
    return type(mode), *((mode.truncate is None, mode.checkpoint_every is None) if isinstance(mode, Unroll) else ())


class _Results(NamedTuple):
    """What one run gave.

    Attributes:
        params: the adapted parameters.
        losses: before each update.
        gradient: of the query's loss, by leaf; for exact modes with all losses added to it.
    """

    params: Any
    losses: Any
    gradient: dict[str, Any]


_PARTS = ("parameters differ", "losses differ", "meta-gradient differs")


class _Check:
    """One call of `check_modes`."""

    def __init__(self, inner: Inner, tree: Any, rtol: float | None, note: str) -> None:
        self.inner, self.tree, self.rtol, self.note = inner, tree, rtol, note
        leaves = own_leaves(tree)
        self.closed = closed_over(lambda: self._judged(plain_loop(inner, leaves)[0], leaves), tree_leaves(leaves))
        tensors = [leaf for leaf in (*tree_leaves(tree), *self.closed.values()) if is_inexact(leaf)]
        self.narrow = any(t.dtype not in (torch.float64, torch.complex128) for t in tensors)
        with seeded(1):
            start = random_state()
            plain_loop(inner, own_leaves(tree))
            self.draws = drawn_since(start)
        self.exact = self._results(lambda tree: plain_loop(inner, tree, True), True)

    def _judged(self, params: Any, tree: Any) -> Tensor:
        return self.inner.loss(params, tree.get("query", tree["support"]))

    def _adapted(self, tree: Any, mode: Gradient) -> tuple[Any, Any]:
        loss = self.inner.loss if is_exact(mode) else anew(self.inner.loss)
        with silent(not is_exact(mode)):
            found = adapt(loss, tree["params"], tree["support"], **self.inner.options(tree, mode))
        return found.params, found.losses

    def _results(self, run: Callable[[Any], tuple[Any, Any]], exact: bool, few: bool = False) -> _Results:
        tree = own_leaves(self.tree)
        closed = dict(self.closed)
        if few:
            tree = {name: part if name == "hyperparameters" else tree_detach(part) for name, part in tree.items()}
            closed = {}
        with seeded(1):
            params, losses = run(tree)
        losses = torch.stack(list(losses)) if len(losses) else torch.zeros(0)
        with seeded(2):
            value = self._judged(params, tree)
        if exact and len(losses):
            value = value + (losses * torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)).sum()
        wanted = needing(tree) | {f"closed.{name}": t for name, t in closed.items()}
        return _Results(plain(params), losses.detach(), gradients(value, wanted))

    def against_plain_loops(self, modes: Sequence[Gradient]) -> None:
        unrolled = self._results(lambda tree: self._adapted(tree, Unroll()), True)
        self._assert(unrolled, self.exact, PLAIN, "Unroll()", "a plain loop")
        for mode in modes:
            if mode == Unroll():
                continue
            most = mode.max_directions if isinstance(mode, ForwardMode) else sys.maxsize
            few = self._count() > most
            if few and ("hyperparameters" not in self.tree or self._count("hyperparameters") > most):
                continue
            found = self._results(lambda tree, mode=mode: self._adapted(tree, mode), is_exact(mode), few)
            if isinstance(mode, ForwardMode):
                expected = unrolled._replace(gradient={name: unrolled.gradient[name] for name in found.gradient})
                self._assert(found, expected, PLAIN, repr(mode), "Unroll()")
            elif is_exact(mode):
                self._assert(found, unrolled, SAME, repr(mode), "Unroll()")
            else:
                with seeded(1):
                    promised = Promised(self.inner, mode, own_leaves(self.tree))
                expected = self._results(lambda tree, promised=promised: promised(tree, True), False)
                near = 1e-6 if isinstance(mode, Implicit) else PLAIN  # it solves a system up to a tolerance
                self._assert(found, expected, near, repr(mode), f"a plain loop with what `{mode!r}` promises")

    def _count(self, part: str | None = None) -> int:
        """How many numbers need a gradient, if of the arguments one part alone does."""
        leaves = [*tree_leaves(self.tree if part is None else self.tree[part]), *self.closed.values()]
        return sum(leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in leaves if is_inexact(leaf))

    def without_graph(self, modes: Sequence[Gradient]) -> None:
        """Under `torch.no_grad` each mode gives the same values, without a graph."""
        for mode in modes:
            with torch.no_grad(), seeded(1):
                params, losses = self._adapted(own_leaves(self.tree), mode)
            if any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in tree_leaves((params, losses))):
                raise AssertionError(f"`{mode!r}` recorded a graph under `torch.no_grad`\n  {self.note}")
            found = _Results(plain(params), plain(losses), {})
            self._assert(found, self.exact._replace(gradient={}), PLAIN, f"{mode!r} under no_grad", "a plain loop")

    # Many tasks ----------------------------------------------------------------------------------------------------

    def many_tasks(self, modes: Sequence[Gradient], tasks: int) -> None:
        """`adapt_tasks` gives what a loop of `adapt` over tasks gives, in one mode of each kind."""
        supports = [tree_map(_varied(k), self.tree["support"]) for k in range(tasks)]
        leaves, spec = tree_flatten(supports[0])
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return
        for mode in {_kind(mode): mode for mode in reversed(modes)}.values():
            if isinstance(mode, ForwardMode) and self._count() * tasks > MOST_DIRECTIONS:
                continue
            alone = [self._per_task({**self.tree, "support": support}, mode) for support in supports]
            columns = zip(*map(tree_leaves, supports), strict=True)
            stacked = tree_unflatten(spec, [stack_leaves("", c) if isinstance(c[0], Tensor) else c[0] for c in columns])
            together = self._per_task({**self.tree, "support": stacked}, mode, True)
            sums = {name: sum(each.gradient[name] for each in alone) for name in alone[0].gradient}
            shared = {name: sums[name] for name in sums if not name.startswith("support")}
            per_task = {
                name: torch.stack([each.gradient[name] for each in alone]) for name in sums if name not in shared
            }
            expected = _Results(
                tree_stack([each.params for each in alone]),
                torch.stack([each.losses for each in alone]),
                {name: {**shared, **per_task}[name] for name in sums},
            )
            near = 1e-6 if isinstance(mode, Implicit) else PLAIN
            self._assert(together, expected, near, f"adapt_tasks with {mode!r}", "a loop of `adapt` over the tasks")

    def _per_task(self, tree: Any, mode: Gradient, many: bool = False) -> _Results:
        tree = own_leaves(tree)
        with silent(True):
            run = adapt_tasks if many else adapt
            options = self.inner.options(tree, mode)
            found = run(anew(self.inner.loss), tree["params"], tree["support"], **options)
        leaves = [leaf for leaf in tree_leaves(found.params) if is_inexact(leaf)]
        parts = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves]
        value = torch.stack([(index + 1) * part.sin().sum() for index, part in enumerate(parts)]).sum()
        wanted = {name: t for name, t in needing(tree).items() if not name.startswith("query")}
        wanted |= {f"closed.{name}": t for name, t in self.closed.items()}
        return _Results(plain(found.params), found.losses.detach(), gradients(value, wanted))

    # Comparison ----------------------------------------------------------------------------------------------------

    def _assert(self, found: _Results, expected: _Results, near: float, who: str, whom: str) -> None:
        rtol = self.rtol if self.rtol is not None else NARROW if self.narrow else near
        names = (f"`{who}`" if " " not in who else who, whom)
        for what, one, two in zip(_PARTS, found, expected, strict=True):
            size = max((float(t.abs().max()) for t in tree_leaves(two) if is_inexact(t) and t.numel()), default=0.0)
            try:
                assert_trees_close(one, two, rtol=rtol, atol=rtol * size, equal_nan=True, names=names, note=self.note)
            except AssertionError as error:
                raise AssertionError(f"{names[0]}: the {what} from {whom}: {error}") from None


def _varied(index: int) -> Callable[[Any], Any]:
    """Other numbers with the same signs, for another task; labels stay."""

    def other(leaf: Any) -> Any:
        if not is_inexact(leaf):
            return leaf
        factors = torch.linspace(1, 1 + 0.2 * index, leaf.numel(), device=leaf.device)
        return leaf.detach() * factors.reshape(leaf.shape).to(leaf.dtype)

    return other
