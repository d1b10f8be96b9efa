"""An inner loop as the modes of `gradient=` see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .typing import GradTransform

__all__: list[str] = []


class State(NamedTuple):
    """What goes from step to step: three trees."""

    params: Any
    opt_state: Any
    carry: Any


Step = Callable[[State, Any, bool], tuple[State, Tensor]]
"""``step(state, batch, differentiable) -> (state, loss)``: one inner update."""


class Loop(Protocol):
    """What a mode is handed.

    Attributes:
        source: the user's loss, for messages.
        grad_transform: what is done to gradients before each update.
        compiled: `step` as compiled code, where the user asks for that; it is computed again in the backward pass.
    """

    @property
    def source(self) -> Callable[..., Any]: ...

    @property
    def grad_transform(self) -> GradTransform | None: ...

    @property
    def compiled(self) -> Step | None: ...

    def step(self, state: State, batch: Any, differentiable: bool) -> tuple[State, Tensor]: ...

    def gradient(self, params: Any, carry: Any, batch: Any) -> Any:
        """The gradient of one task's loss, differentiable."""
        ...

    def parts(self, carry: Any, batch: Any) -> tuple[Any, list[bool]]:
        """A carry and a batch as one tree, and which of its tensors have a task dimension."""
        ...

    def lift(self, fn: Callable[[list[Tensor]], list[Tensor]], mapped: Sequence[bool]) -> Any:
        """A function of one task's tensors over all tasks; `mapped` are the tensors that have a task dimension."""
        ...

    def batch_at(self, index: int, state: State) -> Any:
        """The batch of a step; called once for each, in order."""
        ...


class Gradient(Protocol):
    """A way to differentiate an inner loop."""

    def check(self, steps: int) -> None:
        """Refuse what this mode cannot do with so many steps."""
        ...

    def run(self, loop: Loop, state: State, steps: int) -> tuple[State, Sequence[Tensor]]: ...


def unrolled(loop: Loop, state: State, indices: Sequence[int], differentiable: bool) -> tuple[State, list[Tensor]]:
    """The steps one after the other, with whatever graph they make."""
    losses: list[Tensor] = []
    step = loop.compiled or loop.step
    for index in indices:
        state, value = step(state, loop.batch_at(index, state), differentiable)
        losses.append(value)
    return state, losses
