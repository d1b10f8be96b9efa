"""Recomputation: inner steps that remember their inputs only, and run again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._attach import Function, Tensors, attach, detached, vjp
from ._capture import Replaced
from ._loop import Loop, State, Step
from ._random import drawn_from, drawn_since, random_state
from ._repeats import autocast_as, autocast_state, check_repeats, kept
from ._split import Split, split
from ._transforms import transforming
from ._values import Reach, Values
from .rules._registry import rules_here

__all__: list[str] = []


def checkpointed(loop: Loop, state: State, indices: Sequence[int], reach: Reach) -> tuple[State, list[Tensor]]:
    """Some steps, of which only what goes in is remembered; `reach` is shared by all steps of the loop."""
    begin = split(state)
    # A carry may be constant though a step makes it anew, as running statistics are; the rest of the state is not.
    values = Values(state, reach if split(state.carry).tensors and not transforming() else None)
    batches: list[Split] = []
    states: list[list[Tensor] | None] = []
    losses: list[Tensor] = []
    for index in indices:
        batch = loop.batch_at(index, values.state)
        batches.append(split(batch))
        before = random_state()
        losses.append(values.step(loop.step, batch))
        states.append(before if drawn_since(before) else None)
    last = split(values.state)
    needs = values.needs or [True] * len(last.tensors)
    made = [t for t, needed in zip(last.tensors, needs, strict=True) if needed and values.handed_on(t) is None]
    made = list({id(t): t for t in made if t.is_floating_point() or t.is_complex()}.values())
    tensors = [*begin.tensors, *(t for batch in batches for t in batch.tensors), *values.captures.found.values()]
    inputs = list({id(tensor): tensor for tensor in tensors}.values())
    positions = [next(i for i, t in enumerate(last.tensors) if t is tensor) for tensor in made]
    reads = bool(values.captures.found) or values.captures.met_known
    block = _Block(loop.step, begin, batches, states, inputs, positions, autocast_state(), reads)
    attached = attach([*made, *losses], inputs, Recomputed(block))
    block.results = kept(attached)
    new = {id(old): tensor for old, tensor in zip(made, attached, strict=False)}
    values.state = last.joined([new.get(id(tensor), tensor) for tensor in last.tensors])
    return values.rejoined(), attached[len(made) :]


@dataclass(eq=False)  # a NamedTuple would be a tree to torch, which would take it apart
class Recomputed:
    """A pullback that runs its function again, and is recomputed itself where its own derivative is taken."""

    fn: Function

    def __call__(
        self, inputs: Tensors, outputs: Tensors, cotangents: Tensors, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        count = len(inputs)

        def pull(tensors: list[Tensor]) -> list[Tensor]:
            with rules_here():
                return vjp(self.fn, tensors[:count], wanted, once=True)[1](tensors[count:])

        tensors = [*inputs, *cotangents]
        if torch.is_grad_enabled():
            with torch.no_grad():
                values = pull(detached(tensors))
            found = attach([value.detach() for value in values], tensors, Recomputed(pull))
        else:
            found = pull(tensors)
        remaining = iter(found)
        return [next(remaining) if w else None for w in wanted]


@dataclass(eq=False)
class _Block:
    """Some steps as a function of tensors alone: those of the state, of the batches, and captured ones.

    Attributes:
        reads: whether the steps read tensors past their arguments, which then have to be replaced.
    """

    step: Step
    begin: Split
    batches: list[Split]
    random: list[list[Tensor] | None]
    inputs: list[Tensor]
    positions: list[int]
    autocast: list[dict[str, Any]]
    reads: bool
    results: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        new = {id(old): tensor for old, tensor in zip(self.inputs, tensors, strict=True)}

        def of(part: Split) -> Any:
            return part.joined([new[id(tensor)] for tensor in part.tensors])

        # Each on its own, as `apart` makes the first ones: two may be one tensor, or what the loss reads besides.
        own = [new[id(tensor)] for tensor in self.begin.tensors]
        if not transforming():
            own = [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in own]
        state, values = self.begin.joined(own), list[Tensor]()
        replaced = Replaced(new)
        with replaced if self.reads or transforming() else nullcontext(), autocast_as(self.autocast):
            for batch, random in zip(self.batches, self.random, strict=True):
                with nullcontext() if random is None else drawn_from(random):
                    state, value = self.step(state, of(batch), True)
                values.append(value)
        found = split(state).tensors
        results = [*(found[place] for place in self.positions), *values]
        if not transforming():
            if not self.reads and replaced.stray(results, tensors) is not None:
                self.reads = True  # or the step makes leaves, which only the mode can tell from what it reads
                return self(tensors)
            replaced.check(results, tensors)
        same_tree = len(found) == len(self.begin.tensors)
        start = [new[id(self.begin.tensors[place])] if same_tree else None for place in self.positions]
        check_repeats(self.results, results, [*start, *[None] * len(values)], "leave `checkpoint_every` out")
        return results
