"""One call of a module's pure form and of an ordinary copy of the module, and what has to hold between them."""

from __future__ import annotations

import itertools
import pickle
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from ..._skeleton import Slots
from ..._tree import tree_leaves
from ..._words import listed
from ...errors import StatelessifyError
from ...typing import Buffers, Params
from .._close import assert_trees_close
from .._unmutated import Watch
from ._probe import Unwritten, copies, gradients, is_inexact, needing, number, own_leaves, plain, seeded
from ._twins import copy_of, draws, grad_of, keeps_inputs, pickles, put, read, scaled

__all__: list[str] = []

Apply = Callable[..., tuple[Any, Mapping[str, Tensor]]]
CALLS = 3
"""Calls of each thread."""


class Call(NamedTuple):
    """What one call gave.

    Attributes:
        out: what it returned.
        buffers: what they were afterwards.
        gradient: of a number that depends on all outputs, by parameters and inputs; None where there is none.
    """

    out: Any
    buffers: dict[str, Tensor]
    gradient: dict[str, Any] | None


class Case(NamedTuple):
    """A module and what it is called with.

    Attributes:
        module: the module in the mode that is tested.
        args: its positional arguments.
        kwargs: its keyword arguments.
        wanted: by which leaves of its arguments gradients are taken.
        slots: where its tensors live.
        watch: what the user's module was.
        tolerances: relative and absolute.
        note: the last line of messages.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[bool]
    slots: Slots
    watch: Watch
    tolerances: tuple[float | None, float | None]
    note: str

    def fail(self, what: str, where: str) -> NoReturn:
        raise AssertionError(f"{what}\n  {where}\n  {self.note}")

    # What the module does, and what the function does ----------------------------------------------------------------

    def ordinary(self, params: Params, buffers: Buffers) -> Call:
        """A call of a copy of the module that holds these values, and `backward`."""
        twin = copy_of(self.module)
        own = put(twin, self.slots, params, buffers)
        args, kwargs = self.inputs()
        with seeded(1):
            out = twin(*copies(args), **copies(kwargs))
        after = read(twin, self.slots)
        result = plain(out)  # before `backward`, which may run a part again
        total = number(out)
        try:
            if total is not None:
                total.backward()
        except (RuntimeError, NotImplementedError):  # torch has no such derivative
            return Call(result, after, None)
        found = {name: grad_of(tensor) for name, tensor in own.items()}
        inputs = [grad_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_inexact(leaf)]
        return Call(result, after, {"params": found, "inputs": inputs})

    def inputs(self) -> Any:
        """Arguments of one's own, in which those require a gradient that are wanted."""
        return own_leaves((self.args, self.kwargs), self.wanted)

    def pure(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> Call:
        """A call of the function under test, with gradients."""
        leaves, others, (args, kwargs) = own_leaves(params), detached_copies(buffers), self.inputs()
        weights, given, named = copies(leaves), copies(args), copies(kwargs)  # into leaves torch lets nobody write
        watched, inputs = Unwritten(params=weights, buffers=others), Unwritten(args=given, kwargs=named)
        with seeded(1):
            out, new = self.unpacked(apply(weights, others, *given, **named), apply, where)
        self.check_unchanged(apply, where)
        note = f"{where}\n  {self.note}"
        watched.check(name_of(apply), note)
        if keeps_inputs(self.module, self.args, self.kwargs):
            inputs.check(name_of(apply), note)
        result, after, total = plain(out), plain(new), number(out)
        trees = {"params": leaves, "inputs": [leaf for leaf in tree_leaves((args, kwargs)) if is_inexact(leaf)]}
        try:
            flat = gradients(total, needing(trees))
        except (RuntimeError, NotImplementedError) as error:
            if self.ordinary(params, buffers).gradient is not None:
                self.fail(f"torch takes the gradient of the module, and not that of {name_of(apply)}: {error}", where)
            return Call(result, after, None)
        watched.check(name_of(apply), note)
        zero = torch.zeros_like
        by_inputs = [flat.get(f"inputs.{i}", zero(leaf)) for i, leaf in enumerate(trees["inputs"])]
        return Call(result, after, {"params": {name: flat[f"params.{name}"] for name in leaves}, "inputs": by_inputs})

    def values_of(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> Call:
        """A call of the function under test, for its values."""
        leaves = own_leaves(params)  # a module may ask whether they require a gradient
        returned = apply(leaves, copies(buffers), *copies(self.args), **copies(self.kwargs))
        out, new = self.unpacked(returned, apply, where)
        return Call(plain(out), plain(new), None)

    def unpacked(self, returned: Any, apply: Apply, where: str) -> tuple[Any, dict[str, Any]]:
        if isinstance(returned, tuple) and len(cast("tuple[Any, ...]", returned)) == 2:
            out, new = cast("tuple[Any, Any]", returned)
            if isinstance(new, Mapping):
                return out, dict(cast("Mapping[str, Any]", new))
        self.fail(f"{name_of(apply)} did not return a pair `(output, new_buffers)` with a dict", where)

    def check_unchanged(self, apply: Apply, where: str) -> None:
        """The user's module is what it was."""
        changes = self.watch.changes()
        if changes:
            self.fail(f"{name_of(apply)} changed the {type(self.module).__name__}: {'; '.join(changes[:4])}", where)

    # What has to hold ------------------------------------------------------------------------------------------------

    def check(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> None:
        """Two calls, the second from the buffers of the first."""
        expected_buffers = buffers
        for count in ("first call", "second call, from the buffers of the first"):
            expected = self.ordinary(params, expected_buffers)
            found = self.pure(apply, params, buffers, f"{where}, {count}")
            self.close(found, expected, apply, f"{where}, {count}")
            buffers, expected_buffers = found.buffers, expected.buffers

    def close(self, found: Call, expected: Call, apply: Apply, where: str) -> None:
        rtol, atol = self.tolerances
        lost = [name for name in expected.buffers if name not in found.buffers]
        if lost:
            self.fail(f"{name_of(apply)} did not return {listed(lost)} in `new_buffers`", where)
        names, note = (name_of(apply), "the module"), f"{where}\n  {self.note}"
        for part, ours, theirs in zip(Call._fields, found, expected, strict=True):
            if theirs is not None:
                pair: Any = {part: ours}, {part: theirs}
                assert_trees_close(*pair, rtol=rtol, atol=atol, equal_nan=True, names=names, note=note)

    def check_silent(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> None:
        """Under `torch.no_grad` the same numbers, without a graph."""
        leaves, (args, kwargs) = own_leaves(params), self.inputs()
        with torch.no_grad(), seeded(1):
            out, new = self.unpacked(apply(leaves, copies(buffers), *copies(args), **copies(kwargs)), apply, where)
        self.close(Call(plain(out), plain(new), None), self.without_gradient(params, buffers), apply, where)
        for leaf in tree_leaves((out, new)):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                self.fail(f"{name_of(apply)} recorded a graph", where)

    def without_gradient(self, params: Params, buffers: Buffers) -> Call:
        return self.ordinary(params, buffers)._replace(gradient=None)

    def check_threads(self, apply: Apply, params: Params, buffers: Buffers, threads: int, where: str) -> None:
        """Each thread with values of its own gets the numbers that it gets alone."""
        if threads < 2 or draws(self.module, self.args, self.kwargs):  # they would share one generator
            return
        where = f"{where}, called from {threads} threads at once"
        given = [scaled(params, 0.1 * index) for index in range(threads)]
        expected = [self.without_gradient(own, buffers) for own in given]
        start = threading.Barrier(threads)

        def work(own: Params) -> list[Call]:
            start.wait()
            with torch.no_grad(), yielding():
                return [self.values_of(apply, own, buffers, where) for _ in range(CALLS)]

        try:
            with ThreadPoolExecutor(threads) as pool:
                results = list(pool.map(work, given))
        except (AssertionError, StatelessifyError):
            raise
        except Exception as error:  # alone it raises nothing
            self.fail(f"{name_of(apply)} raised {error!r}", where)
        for right, calls in zip(expected, results, strict=True):
            for found in calls:
                self.close(found, right, apply, where)
        self.check_unchanged(apply, where)

    def check_pickled(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> None:
        """What comes out of a pickle gives the same numbers; what Python cannot pickle, a local function, need not."""
        try:
            again = pickle.loads(pickle.dumps(apply))
        except Exception as error:  # classes may raise anything
            local = isinstance(getattr(apply, "func", apply), FunctionType)
            if local or not pickles(self.module, self.args, self.kwargs):
                return
            self.fail(f"{name_of(apply)} does not pickle, and the module does: {error!r}", where)
        if again is apply or not pickles(self.module, self.args, self.kwargs):
            return
        with seeded(1):
            found = self.values_of(again, params, buffers, where)
        self.close(found, self.without_gradient(params, buffers), apply, where)


def name_of(apply: Apply) -> str:
    return f"`{getattr(apply, '__name__', 'apply')}`"


def detached_copies(tree: Buffers) -> Buffers:
    return {name: tensor.detach().clone() for name, tensor in tree.items()}


@contextmanager
def yielding() -> Generator[None]:
    """This thread lets the others run at every seventh call of a Python function."""
    before, events = sys.getprofile(), itertools.count()

    def rest(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and next(events) % 7 == 0:
            time.sleep(1e-6)

    sys.setprofile(rest)
    try:
        yield
    finally:
        sys.setprofile(before)
