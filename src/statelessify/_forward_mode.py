"""`ForwardMode`: the derivative of the state is carried along with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._attach import Tensors, attach, detached
from ._capture import Replaced
from ._loop import Loop, State, unrolled
from ._random import drawn_from, random_state
from ._split import split
from ._transforms import forward_mode, levels
from ._values import Values
from .errors import DerivativeError, DtypeError, HyperparameterError

__all__ = ["ForwardMode"]


@dataclass(frozen=True)
class ForwardMode:
    """Carry the derivative of the state along: memory is that of one step, however many there are.

    Exact, as `Unroll()`, and it reaches the same tensors. Each step runs once more for each number that needs a
    gradient, so these should be few, such as rates and other hyperparameters; initial parameters that need no
    meta-gradient have to be detached. The meta-gradient has no derivative of its own.

    Args:
        max_directions: how many numbers there may be.

    Raises:
        HyperparameterError: more numbers than that need a gradient.
        DerivativeError: the meta-gradient is differentiated again.

    Source: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization (ICML 2017).

    Example:
        >>> import torch
        >>> from statelessify import ForwardMode, adapt, optim
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> mode = ForwardMode()
        >>> w = adapt(loss, torch.zeros(1), torch.ones(1), optimizer=optim.sgd(lr=lr), steps=2, gradient=mode).params
        >>> torch.autograd.grad(w.sum(), lr)[0].item()
        2.0
    """

    max_directions: int = 64

    def check(self, steps: int) -> None:
        count: Any = self.max_directions
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise HyperparameterError(
                f"`max_directions={count!r}` is not a number of directions; write a positive integer"
            )

    def run(self, loop: Loop, state: State, steps: int) -> tuple[State, Sequence[Tensor]]:
        if not torch.is_grad_enabled() or forward_mode():
            return unrolled(loop, state, range(steps), True)
        if torch.compiler.is_compiling():
            raise DerivativeError("`ForwardMode()` does not run while torch.compile traces; write `Unroll()`")
        run = Values(state)
        tangents = _Tangents(self.max_directions, split(state).tensors)
        losses: list[Tensor] = []
        slopes: list[list[Tensor]] = []
        for index in range(steps):
            before = run.state
            batch = loop.batch_at(index, before)
            random = random_state()
            losses.append(run.step(loop.step, batch))
            tangents.add([*split(batch).tensors, *run.captures.found.values()])
            slopes.append(tangents.step(loop, before, batch, random))
        return tangents.attached(run, losses, slopes)


def _needs_gradient(tensor: Tensor) -> bool:
    return any(seen.requires_grad for seen in levels(tensor))


class _Tangents:
    """The derivatives of a state's tensors in each direction: one for each number that needs a gradient."""

    def __init__(self, limit: int, begin: list[Tensor]) -> None:
        self._limit = limit
        self.sources: dict[int, Tensor] = {}
        self.directions: list[tuple[int, int]] = []  # a source and an entry of it
        self._of_state: list[list[Tensor]] = []  # for each direction one for each floating tensor of the state
        self._begin = begin
        self.add(begin)

    def add(self, tensors: list[Tensor]) -> None:
        """Directions for those of the tensors that need a gradient."""
        for tensor in tensors:
            if id(tensor) in self.sources or not _needs_gradient(tensor):
                continue
            if tensor.is_complex():
                raise DtypeError("`ForwardMode()` differentiates with respect to real numbers; write `Unroll()`")
            self.sources[id(tensor)] = tensor
            self.directions += [(id(tensor), entry) for entry in range(tensor.numel())]
        if len(self.directions) > self._limit:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.sources.values())
            raise HyperparameterError(
                f"`ForwardMode()` takes one more pass for each number that needs a gradient, and "
                f"{len(self.directions)} do (tensors of shapes {shapes}); detach those that need no "
                "meta-gradient (often the initial parameters), write `Unroll()`, or `ForwardMode(max_directions=...)`"
            )

    def step(self, loop: Loop, state: State, batch: Any, random: list[Tensor]) -> list[Tensor]:
        """Take the derivatives through a step; that of its loss in each direction."""
        before, parts = split(state), split(batch)
        moving = [index for index, tensor in enumerate(before.tensors) if is_inexact(tensor)]
        sources = list(self.sources.values())

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            new = dict(zip(self.sources, tensors[len(moving) :], strict=True))
            values = list(before.tensors)
            for index, tensor in zip(moving, tensors, strict=False):
                values[index] = tensor
            constants = dict(zip(map(id, parts.tensors), detached(parts.tensors), strict=True)) | new
            with Replaced(new), drawn_from(random):
                own = parts.joined([constants[id(tensor)] for tensor in parts.tensors])
                after, loss = loop.step(before.joined(values), own, True)
            return (*(tensor for tensor in split(after).tensors if is_inexact(tensor)), loss)

        # Copies: a tensor that has been expanded over tasks takes no tangent.
        primals = (
            *(before.tensors[index].clone() for index in moving),
            *(source.detach().clone() for source in sources),
        )
        slopes: list[Tensor] = []
        # Not under `no_grad`, which loses tangents where vmap lies between this level and an outer grad.
        for number, direction in enumerate(self.directions):
            if number == len(self._of_state):
                own = [self._begin[index] for index in moving] if self._begin else []
                self._of_state.append(
                    [self._unit(direction, tensor, source) for tensor, source in zip(primals, own, strict=False)]
                    or [torch.zeros_like(tensor) for tensor in primals[: len(moving)]]
                )
            units = [self._unit(direction, p, s) for p, s in zip(primals[len(moving) :], sources, strict=True)]
            _, out = torch.func.jvp(of_tensors, primals, (*self._of_state[number], *units))
            *self._of_state[number], slope = detached(out)
            slopes.append(slope)
        self._begin = []
        return slopes

    def _unit(self, direction: tuple[int, int], like: Tensor, source: Tensor) -> Tensor:
        key, entry = direction
        zeros = torch.zeros_like(like)
        if key != id(source):
            return zeros
        one = torch.arange(like.numel(), device=like.device) == entry
        return zeros + one.reshape(like.shape).to(like.dtype)

    def attached(self, run: Values, losses: list[Tensor], slopes: list[list[Tensor]]) -> tuple[State, list[Tensor]]:
        """The last state and the losses, with these derivatives."""
        last = split(run.state)
        inexact = [index for index, tensor in enumerate(last.tensors) if is_inexact(tensor)]
        values = [*(last.tensors[index] for index in inexact), *losses]
        if not self.directions:
            return run.rejoined(), losses
        columns = [torch.stack(each) for each in zip(*self._of_state, strict=True)]
        for loss, found in zip(losses, slopes, strict=True):
            unknown = [torch.zeros_like(loss)] * (len(self.directions) - len(found))  # to that step
            columns.append(torch.stack([*found, *unknown]))
        sources = list(self.sources.values())
        new = attach(values, [*sources, *columns], _Contraction([source.numel() for source in sources]))
        tensors = [run.handed_on(tensor) for tensor in last.tensors]
        for index, tensor in zip(inexact, new, strict=False):
            tensors[index] = tensors[index] if tensors[index] is not None else tensor
        final = [new if new is not None else old for new, old in zip(tensors, last.tensors, strict=True)]
        return last.joined(final), new[len(inexact) :]


def is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@dataclass(eq=False)
class _Contraction:
    """The pullback of known derivatives: their products with the cotangents."""

    sizes: list[int]

    def __call__(
        self, inputs: Tensors, outputs: Tensors, cotangents: Tensors, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        count = len(self.sizes)
        sources, columns = inputs[:count], inputs[count:]
        with torch.no_grad():
            each = [
                (column.conj() * cotangent).real.reshape(len(column), -1).sum(1)
                for column, cotangent in zip(columns, cotangents, strict=True)
            ]
            total = torch.stack([part.to(each[0].dtype) for part in each]).sum(0)
            parts = total.split(self.sizes)
            found = [part.reshape(s.shape).to(s.dtype) for part, s in zip(parts, sources, strict=True)]
        if torch.is_grad_enabled():
            found = attach(found, [*inputs, *cotangents], _refuse)
        return [*found, *[None] * len(columns)]


def _refuse(inputs: Tensors, outputs: Tensors, cotangents: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    raise DerivativeError(
        "a meta-gradient that `ForwardMode()` has taken has no derivative; write `Unroll(checkpoint_every=...)`"
    )
