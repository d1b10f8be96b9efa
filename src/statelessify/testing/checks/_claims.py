"""What autograd, or the user, says a derivative is; in the form in which differences can be held against it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...errors import DerivativeError
from ._differences import Call, Line, length, size
from ._real import RealFunction

__all__: list[str] = []

RTOL = {torch.float64: 1e-6, torch.float32: 1e-4}
"""By the dtype in which derivatives are taken: what rounding may do to a gradient that is right."""

FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative to the typical entry of a leaf: what is left of an entry that is zero but for rounding."""


class Problem(NamedTuple):
    """One derivative to check.

    Attributes:
        call: real tensors in, real tensors out.
        function: for the names of the leaves.
        outputs: names of what `call` returns.
        point: where.
        values: what `call` returns there.
        rough: how large the numbers are from which rounding makes the values.
        given: the user's gradients of ``call``, or None for those of autograd.
        order: 1 or 2, for messages.
    """

    call: Call
    function: RealFunction
    outputs: list[str]
    point: list[Tensor]
    values: list[Tensor]
    rough: list[Tensor]
    given: Callable[[list[Tensor]], list[Tensor]] | None
    order: int

    @property
    def dtype(self) -> torch.dtype:
        """The least exact dtype that takes part."""
        return max((t.dtype for t in (*self.point, *self.values)), key=lambda dtype: torch.finfo(dtype).eps)


class Claim(NamedTuple):
    """The derivative along a line, as a mode gives it: what `estimate` needs, and how far it may be off."""

    view: Callable[[Sequence[Tensor]], Tensor]
    linear: Callable[[Tensor], Tensor]
    allowed: Tensor
    rough: Tensor


def of_user(function: RealFunction, grads: Callable[[Any], Any]) -> Callable[[list[Tensor]], list[Tensor]]:
    def given(point: list[Tensor]) -> list[Tensor]:
        return function.given(grads, needing_grad(point))

    return given


def gradient_of(problem: Problem, seed: int) -> Problem:
    """The gradient as a function, whose derivative is the second one."""
    weights = _weights(problem, seed)
    names = problem.function.names

    def call(point: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            inputs = needing_grad(point)
            if problem.given is not None:
                return problem.given(inputs)
            found: list[Tensor] = []
            for output, weight in zip(problem.call(inputs), weights, strict=True):
                rows: Any = [None] * len(inputs)
                if output.requires_grad:
                    total = (output * weight.to(output.dtype)).sum()
                    rows = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
                found += [torch.zeros_like(p) if row is None else row for p, row in zip(inputs, rows, strict=True)]
            return found

    labels = (
        names
        if problem.given is not None
        else [f"{name} (of {output})" if output else name for output in problem.outputs for name in names]
    )
    values = [value.detach() for value in call(problem.point)]
    # A gradient may be all rounding: that of numbers as large as the function is, by those of its input.
    largest = max(float(value.abs().max()) for value in problem.values if value.numel())
    rough = [value.abs() + largest / size(p) for value, p in zip(values, itertools.cycle(problem.point))]
    return Problem(call, problem.function, labels, problem.point, values, rough, None, 2)


def without_graph(problem: Problem, seed: int) -> list[Tensor]:
    """The gradients of `gradient_of`, as they are where nothing is to be differentiated again."""
    return [gradient for row in _rows(problem, _weights(problem, seed)) for gradient in row]


def _weights(problem: Problem, seed: int) -> list[Tensor]:
    """Random numbers that make one number of each output; a scalar stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    weights: list[Tensor] = []
    for value in problem.values:
        if value.ndim == 0:
            weights.append(torch.ones((), dtype=torch.float64, device=value.device))
        else:
            weights.append(spread(value, generator))
    return weights


def spread(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of either sign between 0.5 and 1.5."""
    size = torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return (size * sign).to(like.device)


def _rows(problem: Problem, weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each output, the gradient of its weighted sum with respect to each leaf, in float64."""
    if problem.given is not None:
        return [[g.detach().to(torch.float64) for g in problem.given(problem.point)]]
    inputs = needing_grad([p.clone() for p in problem.point])
    outputs = problem.call(inputs)
    rows: list[list[Tensor]] = []
    for output, weight in zip(outputs, weights, strict=True):
        found: Any = [None] * len(inputs)
        if output.requires_grad:
            try:
                found = torch.autograd.grad(
                    output, inputs, weight.to(output.dtype).reshape(output.shape), retain_graph=True, allow_unused=True
                )
            except (RuntimeError, NotImplementedError) as error:
                raise _impossible("reverse", problem.order, error) from error
        rows.append(
            [
                torch.zeros_like(p, dtype=torch.float64) if g is None else g.detach().to(torch.float64)
                for p, g in zip(inputs, found, strict=True)
            ]
        )
    return rows


def _impossible(mode: str, order: int, error: Exception) -> DerivativeError:
    other = "reverse" if mode == "forward" else "forward"
    return DerivativeError(
        f"torch cannot take the {'first' if order == 1 else 'second'} derivative in {mode} mode: {error}; "
        f'write `modes=("{other}",)` to leave it out'
    )


Claims = Callable[[Line], Claim]


def claims(problem: Problem, mode: str, seed: int, rtol: float | None, atol: float) -> Claims:
    """What a mode says of each line."""
    weights = _weights(problem, seed)
    tolerance = Tolerance(RTOL[problem.dtype] if rtol is None else rtol, FLOOR[problem.dtype], atol)
    if mode == "forward":
        return Forward(problem, tolerance)
    return Reverse(problem, tolerance, weights, _rows(problem, weights))


class Tolerance(NamedTuple):
    """What a derivative may be off: relative to itself, to the typical entry beside it, and absolutely."""

    rtol: float
    floor: float
    atol: float


class Reverse(NamedTuple):
    """Gradients; the components are weighted sums, one for each output."""

    problem: Problem
    tolerance: Tolerance
    weights: list[Tensor]
    rows: list[list[Tensor]]

    def __call__(self, line: Line) -> Claim:
        rows = [row[line.leaf] for row in self.rows]

        def view(outputs: Sequence[Tensor]) -> Tensor:
            return torch.stack([(w * out.to(w)).sum() for w, out in zip(self.weights, outputs, strict=True)])

        def linear(displacement: Tensor) -> Tensor:
            return torch.stack([(row * displacement).sum() for row in rows])

        direction, (rtol, floor, atol) = line.direction, self.tolerance
        size = torch.stack([length(row * direction) for row in rows])
        typical = torch.stack([length(row) / row.numel() ** 0.5 for row in rows])
        allowed = rtol * size + (floor * typical + atol) * length(direction)
        values = zip(self.weights, self.problem.rough, strict=True)
        return Claim(view, linear, allowed, torch.stack([(w * value.to(w)).abs().sum() for w, value in values]))


class Forward(NamedTuple):
    """Derivatives along a line; the components are the entries of all outputs."""

    problem: Problem
    tolerance: Tolerance

    def __call__(self, line: Line) -> Claim:
        found = self._tangents(line)
        along = view_all(found)

        def linear(displacement: Tensor) -> Tensor:
            return along

        rtol, floor, atol = self.tolerance
        typical = torch.cat([length(part).expand(part.numel()) / max(1, part.numel()) ** 0.5 for part in found])
        allowed = rtol * along.abs() + floor * typical + atol * length(line.direction)
        return Claim(view_all, linear, allowed, view_all(self.problem.rough))

    def _tangents(self, line: Line) -> list[Tensor]:
        _load_forward_mode()
        with forward_ad.dual_level():
            inputs = needing_grad([p.clone() for p in self.problem.point])
            x = inputs[line.leaf]
            inputs[line.leaf] = forward_ad.make_dual(x, line.direction.to(x.dtype))
            try:
                outputs = self.problem.call(inputs)
            except (RuntimeError, NotImplementedError) as error:
                raise _impossible("forward", self.problem.order, error) from error
            tangents = [forward_ad.unpack_dual(output).tangent for output in outputs]
            found = zip(self.problem.values, tangents, strict=True)
            return [(torch.zeros_like(v) if t is None else t).detach().to(torch.float64) for v, t in found]


@cache
def _load_forward_mode() -> None:
    """What torch loads at the first use of it warns of a deprecation that is torch's own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def view_all(outputs: Sequence[Tensor]) -> Tensor:
    """All entries of the outputs, in a row."""
    return torch.cat([output.to(torch.float64).reshape(-1) for output in outputs])


def needing_grad(point: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as such that code may take gradients of."""
    return [p if p.requires_grad else p.detach().requires_grad_() for p in point]
