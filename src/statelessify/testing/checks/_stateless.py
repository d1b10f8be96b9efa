"""`check_stateless`: a module as a pure function does what the module itself does, and nothing else."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..._skeleton import Slots, check_is_module, find_slots
from ..._stateless import stateless
from ..._structure import named_parts
from ..._tree import tree_leaves
from ..._words import listed, nearest
from ...errors import NamesError
from ...typing import Buffers, Params
from .._close import assert_trees_close
from .._unmutated import Watch
from ._probe import Unwritten, call_of, code_of, copies, gradients, is_inexact, number, own_leaves, plain, seeded
from ._twins import copy_of, draws, grad_of, keeps_inputs, pickled, pickles, put, read, scaled, works

__all__ = ["check_stateless"]

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


def check_stateless(
    module: nn.Module,
    *args: Any,
    apply: Apply | None = None,
    params: Params | None = None,
    buffers: Buffers | None = None,
    kwargs: Mapping[str, Any] | None = None,
    threads: int = 4,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that a module's pure form gives what the module gives, and leaves everything else as it is.

    With ordinary copies of the module are compared, for its own values and for others, in training and in evaluation:
    outputs, gradients by parameters and floating inputs (those of tied weights are sums), new buffers, and a second
    call from these. Also that no call writes into what it is given or into the module, that nothing is recorded
    under `torch.no_grad`, that calls from several threads do not disturb each other, and that the function pickles
    if the module does. Random numbers come from the same seed.

    Args:
        module: any module; it is left as it is.
        *args: what it is called with.
        apply: the function under test, ``apply(params, buffers, *args, **kwargs) -> (out, new_buffers)`` with two dicts
            of tensors by name. None: that of `stateless`. One of your own is tested in the module's mode alone.
        params: the parameters that it is called with. None: every trainable parameter once, by its first name.
        buffers: likewise. None: every other tensor of the module.
        kwargs: keyword arguments of the call.
        threads: how many threads call it at once; 1 leaves this out.
        rtol: relative tolerance, as for `assert_trees_close`.
        atol: absolute tolerance.

    Raises:
        AssertionError: they differ, or something was written into. It names the leaf, its worst entry, both values,
            and the call.
        StatelessifyError: what `stateless` and `apply` refuse.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> check_stateless(nn.Linear(3, 2), torch.ones(4, 3))
        >>> model = nn.BatchNorm1d(1)
        >>> def mine(params, buffers, x):  # the statistics move in place
        ...     return torch.func.functional_call(model, (params, dict(buffers)), x), buffers
        >>> check_stateless(model, torch.tensor([[1.0], [3.0]]), apply=mine)
        Traceback (most recent call last):
        ...
        AssertionError: `mine` wrote into `buffers`, which it was given:
          leaf `buffers.num_batches_tracked`: 1 of 1 entries differ
          worst after 1, before 0 (difference 1, allowed 0)
          2 more of 3 leaves differ: `buffers.running_mean`, `buffers.running_var`
          in its own mode, with the module's own values, first call
          to reproduce: check_stateless(BatchNorm1d, torch.tensor([[1.0], [3.0]], dtype=torch.float32), apply=mine)
    """
    check_is_module(module)
    watch = Watch(module)
    subject = stateless(module).apply if apply is None else apply
    options = {} if apply is None else {"apply": code_of(apply)}
    note = call_of("check_stateless", module, args, **options)
    case = Case(module, args, dict(kwargs or {}), find_slots(module), (rtol, atol), note)
    own = case.values(params, buffers)
    modes = {"its own mode": (subject, module)}
    if apply is None:
        case.check_names(list(own[1]))
        for name, training in (("training", True), ("evaluation", False)):
            modes[name] = cast("Any", subject).train(training), copy_of(module).train(training)
        if all(part.training == module.training for _, part in named_parts(module)):
            modes["training" if module.training else "evaluation"] = modes.pop("its own mode")
    for mode, (function, original) in modes.items():
        here = case._replace(module=original)
        others = scaled(own[0]), scaled(own[1])
        for values, trees in (("the module's own", own), ("other", others)):
            where = f"in {mode}, with {values} values"
            if not works(original, here.args, here.kwargs) and original is not module:
                break
            here.check(function, *trees, where)
        else:
            here.check_silent(function, *own, f"in {mode}")
            here.check_threads(function, *own, threads, f"in {mode}")
            here.check_pickled(function, *own, f"in {mode}", apply is None)
    watch.check()


class Case(NamedTuple):
    """A module and what it is called with.

    Attributes:
        module: the module in the mode that is tested.
        args: its positional arguments.
        kwargs: its keyword arguments.
        slots: where its tensors live.
        tolerances: relative and absolute.
        note: the last line of messages.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: Slots
    tolerances: tuple[float | None, float | None]
    note: str

    def values(self, params: Params | None, buffers: Buffers | None) -> tuple[Params, Buffers]:
        tensors = self.slots.tensors
        given = {name: tensors[name] for name in self.slots.params if name not in (buffers or {})}
        others = {name: tensors[name] for name in self.slots.buffers if name not in (params or {})}
        given, others = given if params is None else params, others if buffers is None else buffers
        places = {**self.slots.params, **self.slots.buffers}
        first = {place.path: name for name, found in places.items() for place in found}
        for name in {**given, **others}:
            if name not in first and name not in self.slots.empty:
                raise NamesError(f"`{name}` is no tensor of {code_of(self.module)}{nearest(name, places)}")
            if first.get(name, name) != name:
                raise AssertionError(
                    f"`{name}` is tied to `{first[name]}`, and so is no tensor of its own\n  {self.note}"
                )
        return {k: v.detach().clone() for k, v in given.items()}, {k: v.detach().clone() for k, v in others.items()}

    def check_names(self, others: list[str]) -> None:
        """What `stateless` returns are the trainable tensors once, and all others once."""
        found = stateless(self.module)
        wanted = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
        for what, ours, theirs in (("params", found.params, wanted), ("buffers", found.buffers, others)):
            if list(ours) != theirs:
                raise AssertionError(f"`{what}` has {listed(ours)}, and should have {listed(theirs)}\n  {self.note}")

    def check(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> None:
        """Two calls, the second from the buffers of the first."""
        expected_buffers = buffers
        for count in ("first call", "second call, from the buffers of the first"):
            expected = self.ordinary(params, expected_buffers)
            found = self.pure(apply, params, buffers, f"{where}, {count}")
            if expected.gradient is None:
                found = found._replace(gradient=None)
            self.close(found, expected, apply, f"{where}, {count}")
            buffers, expected_buffers = found.buffers, expected.buffers

    def close(self, found: Call, expected: Call, apply: Apply, where: str) -> None:
        rtol, atol = self.tolerances
        ours, theirs = ({k: v for k, v in call._asdict().items() if v is not None} for call in (found, expected))
        if ours.keys() != theirs.keys():
            raise AssertionError(f"{name_of(apply)} returned tensors without a gradient\n  {where}\n  {self.note}")
        names, note = (name_of(apply), "the module"), f"{where}\n  {self.note}"
        for part, values in theirs.items():
            pair: Any = {part: ours[part]}, {part: values}
            assert_trees_close(*pair, rtol=rtol, atol=atol, equal_nan=True, names=names, note=note)

    def ordinary(self, params: Params, buffers: Buffers) -> Call:
        """A call of a copy of the module that holds these values, and `backward`."""
        twin = copy_of(self.module)
        own = put(twin, self.slots, params, buffers)
        args, kwargs = own_leaves((self.args, self.kwargs))
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

    def pure(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> Call:
        """A call of the function under test."""
        leaves, others = own_leaves(params), {name: tensor.detach().clone() for name, tensor in buffers.items()}
        args, kwargs = own_leaves((self.args, self.kwargs))
        given, named = copies(args), copies(kwargs)
        watched = Unwritten(params=leaves, buffers=others)
        inputs = Unwritten(args=given, kwargs=named)
        with seeded(1):
            out, new = unpacked(apply(leaves, others, *given, **named), apply, self.note)
        note = f"{where}\n  {self.note}"
        watched.check(name_of(apply), note)
        if keeps_inputs(self.module, self.args, self.kwargs):
            inputs.check(name_of(apply), note)
        after: dict[str, Tensor] = plain(dict(new))
        total = number(out)
        trees = {"params": leaves, "inputs": [leaf for leaf in tree_leaves((args, kwargs)) if is_inexact(leaf)]}
        result = plain(out)
        try:
            flat = gradients(total, trees)
        except (RuntimeError, NotImplementedError):
            if self.ordinary(params, buffers).gradient is not None:
                raise
            return Call(result, after, None)
        watched.check(name_of(apply), note)
        by_inputs = [flat[f"inputs.{index}"] for index in range(len(trees["inputs"]))]
        return Call(result, after, {"params": {name: flat[f"params.{name}"] for name in leaves}, "inputs": by_inputs})

    # Silence, threads, pickles ---------------------------------------------------------------------------------------

    def check_silent(self, apply: Apply, params: Params, buffers: Buffers, where: str) -> None:
        """Under `torch.no_grad` the same numbers, without a graph."""
        leaves, (args, kwargs) = own_leaves(params), own_leaves((self.args, self.kwargs))
        with torch.no_grad():
            found = self.values_of(apply, leaves, copies(buffers), copies(args), copies(kwargs))
        expected = self.ordinary(params, buffers)
        where = f"{where}, under `torch.no_grad`"
        self.close(Call(plain(found[0]), plain(found[1]), None), expected._replace(gradient=None), apply, where)
        given = {id(leaf) for leaf in tree_leaves((leaves, args, kwargs))}
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None and id(leaf) not in given:
                raise AssertionError(f"{name_of(apply)} recorded a graph {where}\n  {self.note}")

    def values_of(self, apply: Apply, params: Params, buffers: Buffers, args: Any, kwargs: Any) -> Any:
        with seeded(1):
            out, new = unpacked(apply(params, buffers, *args, **kwargs), apply, self.note)
        return out, dict(new)

    def check_threads(self, apply: Apply, params: Params, buffers: Buffers, threads: int, where: str) -> None:
        """Each thread with values of its own gets the numbers that it gets alone."""
        if threads < 2 or draws(self.module, self.args, self.kwargs):  # they would share one generator
            return
        given = [own_leaves(scaled(params, 0.1 * index)) for index in range(threads)]  # a module may ask about them
        expected = [self.ordinary(own, buffers)._replace(gradient=None) for own in given]
        start = threading.Barrier(threads)

        def work(index: int) -> list[Call]:
            start.wait()
            found: list[Call] = []
            with torch.no_grad(), yielding():
                for _ in range(CALLS):
                    returned = apply(given[index], copies(buffers), *copies(self.args), **copies(self.kwargs))
                    out, new = unpacked(returned, apply, self.note)
                    found.append(Call(plain(out), plain(dict(new)), None))
            return found

        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, range(threads)))
        for right, calls in zip(expected, results, strict=True):
            for call in calls:
                self.close(call, right, apply, f"{where}, called from {threads} threads at once")

    def check_pickled(self, apply: Apply, params: Params, buffers: Buffers, where: str, required: bool) -> None:
        """What comes out of a pickle gives the same numbers; it must pickle if it is `required` and the module does."""
        if not (pickles(self.module, self.args, self.kwargs) if required else pickled(apply)):
            return
        again = pickled(apply)
        if again is None:
            raise AssertionError(f"{name_of(apply)} does not pickle, and the module does\n  {where}\n  {self.note}")
        found = self.values_of(again, own_leaves(params), copies(buffers), copies(self.args), copies(self.kwargs))
        expected = self.ordinary(params, buffers)._replace(gradient=None)
        self.close(Call(plain(found[0]), plain(found[1]), None), expected, apply, f"{where}, unpickled")


# The function under test -------------------------------------------------------------------------------------------


def name_of(apply: Apply) -> str:
    return f"`{getattr(apply, '__name__', 'apply')}`"


def unpacked(returned: Any, apply: Apply, note: str) -> tuple[Any, Mapping[str, Tensor]]:
    if isinstance(returned, tuple) and len(cast("tuple[Any, ...]", returned)) == 2:
        out, new = cast("tuple[Any, Any]", returned)
        if isinstance(new, Mapping):
            return out, cast("Mapping[str, Tensor]", new)
    raise AssertionError(f"{name_of(apply)} did not return a pair `(output, new_buffers)` with a dict\n  {note}")


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
