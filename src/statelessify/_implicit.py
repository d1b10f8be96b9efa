"""`Implicit`: the meta-gradient at the point where the inner loop has arrived, not through its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import implicit
from ._attach import detached, vjp
from ._loop import Loop, State, unrolled
from ._lost import warn_of_lost
from ._random import drawn_from, random_state
from ._split import split
from ._task_states import Together
from ._task_trees import Tasks
from ._transforms import unwrapped
from ._values import Values
from .errors import DerivativeError, StationaryPointWarning
from .implicit._pullback import Solve, at_root
from .optim import OptState
from .optim._hyperparameters import has, is_nonzero
from .rules._registry import rules_here

__all__ = ["Implicit"]

STATIONARY = 0.1  # of the first gradient's norm: above, the last point is not taken for a stationary one
DECAYS = ("weight_decay", "lambd")  # by which an optimizer moves the point at which it rests


@dataclass(frozen=True)
class Implicit:
    """Differentiate the minimum that the inner loop has reached: memory and time do not depend on the steps.

    Where the gradient of the loss is zero, ``dx = -H^-1 (d grad / d theta) dtheta`` with the Hessian `H` of the loss.
    It reaches all that the loss reads at the last parameters, with the last step's batch: from the batch, the carry,
    or its closure. The starting point is reached only where the loss reads it (iMAML's proximal term), hyperparameters
    and the optimizer's state never. `Adapted.losses` are values.

    Args:
        solve: ``solve(matvec, b)`` for the system with the Hessian of one task: `implicit.cg`, `implicit.neumann`,
            `implicit.dense`, or one of these with other settings (`functools.partial`).

    Raises:
        DerivativeError: the optimizer decays weights, or there is a `grad_transform`: it does not rest where the
            gradient of the loss is zero.
        ConvergenceError: in the backward pass, where the system cannot be solved.

    Warns:
        StationaryPointWarning: the last gradient is not small beside the first one.

    Source: Rajeswaran et al., Meta-learning with implicit gradients (NeurIPS 2019).

    Example:
        >>> import torch
        >>> from statelessify import Implicit, adapt, optim
        >>> target = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> w = adapt(loss, torch.zeros(2), target, optimizer=optim.sgd(lr=0.4), steps=20, gradient=Implicit()).params
        >>> torch.autograd.grad(w.sum(), target)[0].tolist()
        [1.0, 1.0]
    """

    solve: Solve = implicit.cg

    def __repr__(self) -> str:
        name = getattr(self.solve, "__name__", repr(self.solve))
        return "Implicit()" if self.solve is implicit.cg else f"Implicit(solve={name})"

    def check(self, steps: int) -> None:
        if not callable(self.solve):
            raise DerivativeError(
                f"`solve={self.solve!r}` is not a function `solve(matvec, b)`; write `implicit.cg`, or "
                "`functools.partial(implicit.cg, maxiter=20)`"
            )

    def run(self, loop: Loop, state: State, steps: int) -> tuple[State, Sequence[Tensor]]:
        if not torch.is_grad_enabled():
            return unrolled(loop, state, range(steps), False)
        if torch.compiler.is_compiling():
            raise DerivativeError(
                "`Implicit()` does not run while torch.compile traces; compile the loss, not the loop"
            )
        _refuse_other_points(loop, state)
        run = Values(state)
        losses = run.take(loop, range(steps))
        last, batch = run.rejoined(), run.batches[-1]
        here = _Gradient(loop, last, batch)
        _warn_if_moving(here, _Gradient(loop, state, run.batches[0]), loop.source)
        values = at_root(
            here, here.params.tensors, here.rest.tensors, self.solve, here.params.spec, here.mapped, loop.lift
        )
        final = last._replace(params=here.params.joined(values))
        results = [tensor for tensor in split(final).tensors if tensor.requires_grad]
        instead = "it reaches what the loss reads at the last parameters; write `gradient=Unroll()` if it should"
        warn_of_lost(run.candidates(), results, loop.source, "Implicit()", instead)
        return final, losses


class _Gradient:
    """The gradient of one task's loss at a state, as a function of tensors alone, with the same random numbers."""

    def __init__(self, loop: Loop, state: State, batch: Any) -> None:
        self.loop = loop
        rest, self.mapped = loop.parts(state.carry, batch)
        self.params, self.rest = split(state.params), split(rest)
        self._random = random_state()

    def __call__(self, params: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
        with drawn_from(self._random):
            return split(self.loop.gradient(self.params.joined(params), *self.rest.joined(rest))).tensors

    def norm(self) -> Tensor:
        """``(tasks,)``, or 0-dim where there is one."""
        count = len(self.params.tensors)

        def of_tensors(tensors: list[Tensor]) -> list[Tensor]:
            grads = self(tensors[:count], tensors[count:])
            return [_square(grads).sqrt()]

        with torch.no_grad():
            tensors = detached([*self.params.tensors, *self.rest.tensors])
            return self.loop.lift(of_tensors, [*[True] * count, *self.mapped])(tensors)[0]

    def distance(self) -> Tensor:
        """How far along the gradient it vanishes, by its derivative there: infinite where that is zero."""
        count = len(self.params.tensors)

        def of_tensors(tensors: list[Tensor]) -> list[Tensor]:
            wanted = [True] * count + [False] * (len(tensors) - count)
            grads, pull = vjp(lambda each: self(each[:count], each[count:]), tensors, wanted)
            grads = detached(grads)
            changes = detached(pull(grads))
            return [_square(grads) / _square(changes).sqrt()]

        with torch.no_grad(), rules_here():
            tensors = detached([*self.params.tensors, *self.rest.tensors])
            return self.loop.lift(of_tensors, [*[True] * count, *self.mapped])(tensors)[0]


def _square(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.abs().double().square().sum() for tensor in tensors]).sum()


def _refuse_other_points(loop: Loop, state: State) -> None:
    """An error where the loop does not rest where the gradient of the loss is zero."""
    if loop.grad_transform is not None:
        raise DerivativeError(
            "`Implicit()` differentiates the point where the gradient of the loss is zero, and with a `grad_transform` "
            "the loop may rest elsewhere; leave it out, or write `gradient=Unroll()`"
        )
    opt_state = state.opt_state
    if isinstance(opt_state, (Tasks, Together)):
        opt_state = opt_state.tree if isinstance(opt_state, Tasks) else opt_state.state
    if not isinstance(opt_state, OptState):
        return
    for name in DECAYS:
        if has(opt_state.hyperparameters.get(name, 0), is_nonzero):
            raise DerivativeError(
                f"`Implicit()` differentiates the point where the gradient of the loss is zero, and an optimizer with "
                f"`{name}` rests elsewhere; put the decay in the loss, write `{name}=0`, or `gradient=Unroll()`"
            )


def _warn_if_moving(last: _Gradient, first: _Gradient, source: Callable[..., Any]) -> None:
    if not last.params.tensors:
        return
    now, before = unwrapped(last.norm()), unwrapped(first.norm())
    moving = (now > STATIONARY * before) | ~now.isfinite()
    key = getattr(source, "__code__", id(source))
    if key in _warned or not bool(moving.any()):
        return
    # A run that has begun at the minimum makes no progress either: it is there up to rounding, in any unit of the loss.
    size = max((float(unwrapped(t.detach()).abs().max()) for t in last.params.tensors if t.numel()), default=0.0)
    floor = torch.finfo(last.params.tensors[0].dtype).eps ** 0.5 * (1 + size)
    moving &= (now != 0) & ~(unwrapped(last.distance()) <= floor)
    if not bool(moving.any()):
        return
    _warned.add(key)
    ratio = float((now / before)[moving].max())
    warnings.warn(
        f"`Implicit()` takes the last parameters for a stationary point of the loss, and the gradient's norm there is "
        f"still {ratio:.1e} times that at the start: the meta-gradient is then wrong by about as much; take more steps "
        "or another rate, or write `gradient=Unroll()`; a loss without a minimum has no such point at all",
        StationaryPointWarning,
        stacklevel=5,
    )


_warned: set[Any] = set()
