"""An inner loop of which only the values are computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._attach import detached
from ._capture import Captures
from ._loop import Loop, State, Step
from ._lost import closed_over, needing
from ._split import split
from ._transforms import transforming
from .rules._registry import rules

__all__: list[str] = []


EARLIER = " of an earlier step"
Needs = tuple[bool, ...]
Reach = dict[tuple[Needs, Needs], Needs]
"""Which tensors of a state and a batch need a gradient, and which ones of the next state do then."""


class Values:
    """The state of an inner loop whose steps are constants; what a step hands on unchanged stays in its graph.

    Attributes:
        state: the state, whose tensors are constants.
        captures: the tensors from outside that the steps have read and that need a gradient.
        needs: which tensors of the state would need a gradient if the steps were differentiated. None unless a dict
            `reach` is given, which remembers what has been learnt from one step for all that begin like it.
    """

    def __init__(self, state: State, reach: Reach | None = None) -> None:
        begin = split(state)
        self._reach = reach
        self.needs: Needs | None = None if reach is None else tuple(tensor.requires_grad for tensor in begin.tensors)
        constants = detached(begin.tensors)
        self._own = {id(constant): own for constant, own in zip(constants, begin.tensors, strict=True)}
        self._constants = constants  # held, so that the numbers by which they are known stay theirs
        self._candidates = needing(**state._asdict())
        self.state: State = begin.joined(constants)
        self.captures = Captures(begin.tensors)
        self.batches: list[Any] = []  # the first one and the last one

    def step(self, step: Step, batch: Any) -> Tensor:
        """Take one step; its loss."""
        parts, own = split(batch), split(self.state)
        given, tensors = detached(parts.tensors), own.tensors
        begin = (self.needs or (), tuple(tensor.requires_grad for tensor in parts.tensors))
        record = self._reach is not None and begin not in self._reach
        if record:
            tensors = detached(tensors)
            for tensor, needed in zip((*tensors, *given), itertools.chain(*begin), strict=True):
                tensor.requires_grad_(needed)
        self.captures.new_step([*tensors, *given])
        # The rules of the run that is differentiated hold here too, so that both have the same values.
        with torch.set_grad_enabled(record), self.captures, nullcontext() if transforming() else rules("gradients"):
            state, value = step(own.joined(tensors), parts.joined(given), record)
        new = split(state)
        if self._reach is not None:
            if record:
                self._reach[begin] = tuple(tensor.requires_grad for tensor in new.tensors)
            self.needs = self._reach[begin]
        same = {id(tensor): constant for tensor, constant in zip(tensors, own.tensors, strict=True)}
        results = [same.get(id(tensor), tensor) for tensor in new.tensors]
        self.state = new.joined([t if id(t) in self._own else t.detach() for t in results])
        self.captures.new_step()
        return value.detach()

    def take(self, loop: Loop, indices: Iterable[int]) -> list[Tensor]:
        """Take steps; their losses."""
        losses: list[Tensor] = []
        for index in indices:
            batch = loop.batch_at(index, self.state)
            if not self.batches or batch is not self.batches[-1]:
                self._candidates = self._earlier() | needing(batch=batch)
                self.batches = [*self.batches[:1], batch]
            losses.append(self.step(loop.step, batch))
        return losses

    def _earlier(self) -> dict[str, Tensor]:
        """The candidates, in which those of an earlier step's batch are called so."""
        first: dict[str, Tensor] = {}
        for name, tensor in self._candidates.items():
            of_batch = name.split(".")[0] == "batch" and not name.endswith(EARLIER)
            first.setdefault(name + EARLIER if of_batch else name, tensor)
        return first

    def handed_on(self, tensor: Tensor) -> Tensor | None:
        """The tensor of the first state that this one is, if no step has made another of it."""
        return self._own.get(id(tensor))

    def rejoined(self) -> State:
        """The last state, in which what was handed on is what it was."""
        parts = split(self.state)
        return parts.joined([self._own.get(id(tensor), tensor) for tensor in parts.tensors])

    def candidates(self) -> dict[str, Tensor]:
        """The tensors that would have a gradient through the steps, by name."""
        return self._candidates | closed_over(self.captures.found.values())
