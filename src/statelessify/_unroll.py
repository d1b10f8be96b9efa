"""Meta-gradients through the steps of a loop: all of them, recomputed ones, the last ones, or first-order ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._checkpoint import checkpointed
from ._loop import Loop, State, unrolled
from ._lost import warn_of_lost
from ._split import split
from ._transforms import forward_mode
from ._values import Reach, Values
from .errors import HyperparameterError

__all__ = ["FirstOrder", "Unroll"]


@dataclass(frozen=True)
class Unroll:
    """Differentiate through the inner steps; the meta-gradient is exact, unless `truncate` cuts it.

    It reaches the initial parameters, every hyperparameter, and whatever the loss reads: from its batch, its carry or
    its closure. Memory grows with the number of steps.

    Args:
        checkpoint_every: remember the state at each k-th step only, and compute the steps between again in the
            backward pass: memory for ``steps / k`` states and the graph of k steps, a third more time. ``"auto"``:
            about the square root of the steps. None remembers everything. The numbers are the same.
        truncate: differentiate through the last k steps only. Before them the initial parameters keep an identity
            path, and everything else is cut: truncated backpropagation. None cuts nothing.

    Raises:
        HyperparameterError: a number that is not positive, or `truncate` above the number of steps.

    Source: Maclaurin et al., Gradient-based hyperparameter optimization through reversible learning (ICML 2015);
    Finn et al., Model-agnostic meta-learning (ICML 2017); Chen et al., Training deep nets with sublinear memory cost
    (2016); Shaban et al., Truncated back-propagation for bilevel optimization (AISTATS 2019).

    Example:
        >>> from statelessify import Unroll
        >>> Unroll(checkpoint_every="auto", truncate=20)
        Unroll(checkpoint_every='auto', truncate=20)
    """

    checkpoint_every: int | Literal["auto"] | None = None
    truncate: int | None = None

    def __repr__(self) -> str:
        given = {"checkpoint_every": self.checkpoint_every, "truncate": self.truncate}
        return f"Unroll({', '.join(f'{name}={value!r}' for name, value in given.items() if value is not None)})"

    def __post_init__(self) -> None:
        if self.checkpoint_every != "auto":
            _check_count("checkpoint_every", self.checkpoint_every, ', "auto"')
        _check_count("truncate", self.truncate, "")

    def check(self, steps: int) -> None:
        if self.truncate is not None and self.truncate > steps:
            raise HyperparameterError(
                f"`truncate={self.truncate}` is more than the {steps} steps of the loop; write at most `{steps}`, or "
                "None to differentiate through all of them"
            )

    def run(self, loop: Loop, state: State, steps: int) -> tuple[State, list[Tensor]]:
        recording = torch.is_grad_enabled()
        first = steps - self.truncate if self.truncate is not None and recording else 0
        losses: list[Tensor] = []
        candidates: dict[str, Tensor] = {}
        if first:
            state, losses, candidates = _cut(loop, state, first)
        every = steps if self.checkpoint_every is None else self.checkpoint_every
        if every == "auto":
            every = max(1, round((steps - first) ** 0.5))
        # Forward mode keeps nothing that could be saved, and a compiled step is computed again as it is.
        plain = self.checkpoint_every is None or not recording or forward_mode()
        plain = plain or loop.compiled is not None or torch.compiler.is_compiling()
        reach: Reach = {}
        for start in range(first, steps, every):
            indices = range(start, min(start + every, steps))
            if plain:
                state, values = unrolled(loop, state, indices, True)
            else:
                state, values = checkpointed(loop, state, indices, reach)
            losses += values
        if first:
            results = [t for t in (*split(state).tensors, *losses[first:]) if t.requires_grad]
            instead = "write `gradient=Unroll()` or a larger `truncate` if it should"
            warn_of_lost(candidates, results, loop.source, f"Unroll(truncate={self.truncate})", instead)
        return state, losses


@dataclass(frozen=True)
class FirstOrder:
    """Inner gradients are constants: no second derivatives, and one step's memory.

    Initial parameters keep an identity path and hyperparameters are reached; what only shapes the inner gradient (a
    learned loss) is not. `Adapted.losses` are values.

    Source: Finn et al., Model-agnostic meta-learning (ICML 2017), section 5.2.
    """

    def check(self, steps: int) -> None:
        pass

    def run(self, loop: Loop, state: State, steps: int) -> tuple[State, list[Tensor]]:
        return unrolled(loop, state, range(steps), False)


def _check_count(name: str, value: Any, more: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise HyperparameterError(
            f"`{name}={value!r}` is not a number of steps; write a positive integer{more}, or None"
        )


def _cut(loop: Loop, state: State, steps: int) -> tuple[State, list[Tensor], dict[str, Tensor]]:
    """Take the first steps, of which nothing is differentiated but an identity path of the parameters.

    Also what would have had a gradient through them, by name.
    """
    run = Values(state)
    losses = run.take(loop, range(steps))
    last = run.rejoined()
    initial, params = split(state.params), split(last.params)
    pairs = zip(initial.tensors, params.tensors, strict=True)
    return (
        last._replace(params=params.joined([new + (old - old.detach()) for old, new in pairs])),
        losses,
        run.candidates(),
    )
