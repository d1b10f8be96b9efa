"""An inner loop of which only the values are computed."""

from __future__ import annotations

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


class Values:
    """The state of an inner loop whose steps are constants; what a step hands on unchanged stays in its graph.

    Attributes:
        state: the state, whose tensors are constants.
        captures: the tensors from outside that the steps have read and that need a gradient.
    """

    def __init__(self, state: State) -> None:
        begin = split(state)
        constants = detached(begin.tensors)
        self._own = {id(constant): own for constant, own in zip(constants, begin.tensors, strict=True)}
        self._constants = constants  # held, so that the numbers by which they are known stay theirs
        self._candidates = needing(**state._asdict())
        self.state: State = begin.joined(constants)
        self.captures = Captures(begin.tensors)
        self.batches: list[Any] = []  # the first one and the last one

    def step(self, step: Step, batch: Any) -> Tensor:
        """Take one step; its loss."""
        parts = split(batch)
        given = detached(parts.tensors)
        constants = parts.joined(given)
        self.captures.new_step([*split(self.state).tensors, *given])
        # The rules of the run that is differentiated hold here too, so that both have the same values.
        with torch.no_grad(), self.captures, nullcontext() if transforming() else rules("gradients"):
            state, value = step(self.state, constants, False)
        new = split(state)
        self.state = new.joined([t if id(t) in self._own else t.detach() for t in new.tensors])
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
