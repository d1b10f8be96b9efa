"""Derivatives by finite differences that know how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

__all__: list[str] = []

Call = Callable[[list[Tensor]], list[Tensor]]
"""A function of real tensors that returns real tensors."""

View = Callable[[Sequence[Tensor]], Tensor]
"""Outputs, to the vector of numbers whose derivatives are compared."""

STEPS = (2**-7, 2**-12, 2**-3, 2**-17, 2**-22, 2**-27)
"""Step sizes, as parts of the direction; the first is enough for most functions."""

NEARLY = 100.0
"""Errors are estimates too: steps whose error is so many times the least one may speak for the claimed derivative."""

MARGIN = 10.0
"""A residual counts only if it is so many times the error of the differences."""

TINY = 1e-100
"""What is smaller counts as zero: its products with steps and tolerances may be."""

NOISE_STEPS = (0.8 * 2**-12, 0.8 * 2**-16, 0.8 * 2**-20, 0.8 * 2**-24, 0.8 * 2**-32)
"""How far around the point values are taken to see their noise."""

NOISE_PLACES = tuple(2 * (k * 0.6180339887498949 % 1) - 1 for k in range(11))
"""Where within them; irregular, for rounding divides regular steps evenly, and the noise would not show."""


def length(x: Tensor) -> Tensor:
    """The Euclidean norm."""
    return cast("Tensor", torch.linalg.vector_norm(x))


def size(x: Tensor) -> float:
    """The typical entry; 1 where all are zero."""
    typical = float(length(x.to(torch.float64))) / x.numel() ** 0.5
    return typical if typical > TINY else 1.0


def sizes(x: Tensor, of_zero: float) -> Tensor:
    """That of each entry."""
    wide = x.to(torch.float64).abs()
    return torch.where(wide > TINY, wide, of_zero)


class Estimate(NamedTuple):
    """By how much the true derivative exceeds the claimed one, for each component.

    Attributes:
        residual: true minus claimed derivative along the direction.
        error: how far the residual may be off, by what smaller steps changed and by rounding.
        explained: whether rounding alone explains that error.
        agrees: whether the claimed derivative is right, by one of the steps that are nearly as exact as the best.
    """

    residual: Tensor
    error: Tensor
    explained: Tensor
    agrees: Tensor


class Line:
    """A function along one direction of one leaf; it remembers its values, for each mode asks for the same ones."""

    def __init__(self, call: Call, point: Sequence[Tensor], leaf: int, direction: Tensor) -> None:
        self.call = call
        self.point = point
        self.leaf = leaf
        self.direction = direction
        self._known: dict[float, list[Tensor] | Exception] = {}

    def moved(self, t: float) -> Tensor:
        x = self.point[self.leaf]
        return (x.to(torch.float64) + t * self.direction).to(x.dtype)

    def displacement(self, t: float) -> Tensor:
        """What ``direction`` has become by rounding."""
        return (self.moved(t).to(torch.float64) - self.moved(-t).to(torch.float64)) / (2 * t)

    def at(self, t: float) -> list[Tensor]:
        """The outputs in float64 at ``point + t * direction``."""
        if t not in self._known:
            point = [p.clone() for p in self.point]
            point[self.leaf] = self.moved(t)
            try:
                outputs = self.call([p.requires_grad_() for p in point])
                self._known[t] = [output.detach().to(torch.float64) for output in outputs]
            except Exception as error:  # outside the domain of the function, which a smaller step is not
                self._known[t] = error
        found = self._known[t]
        if isinstance(found, Exception):
            raise found
        return found

    def pair(self, t: float) -> tuple[list[Tensor], list[Tensor]] | None:
        """The outputs on either side, or None where the function has none."""
        try:
            return self.at(t), self.at(-t)
        except Exception:
            return None

    def steps(self) -> list[float]:
        """The step sizes to try, in order."""
        length = float(self.direction.abs().max())
        absolute = [2**-6 / length, 2**-12 / length] if 0 < length < 2**-4 else []  # cos(x) at x = 1e-6
        first, second, third, *rest = STEPS
        return [first, second, third, *absolute, *rest]


def estimate(
    line: Line, view: View, linear: Callable[[Tensor], Tensor], allowed: Tensor, epsilon: float, rough: Tensor
) -> Estimate:
    """Compare a claimed derivative with differences: central, extrapolated twice, at the steps that suit best.

    Args:
        line: the function and the direction.
        view: what of the outputs is compared.
        linear: the claimed derivative along a displacement.
        allowed: residuals up to this are fine, and no further step is tried.
        epsilon: rounding error of an output, relative to its size.
        rough: sizes of the components, for their rounding errors.
    """
    residuals, changes, lengths = [torch.full_like(allowed, math.nan)], [torch.full_like(allowed, math.inf)], [1.0]
    noise = epsilon * rough
    for index, step in enumerate(line.steps()):
        if index == 1:
            noise = torch.maximum(noise, _noise(line, view, allowed))
        rows: list[Tensor] = []
        for t in (step, step / 2, step / 4):
            pair = line.pair(t)
            if pair is not None:
                rows.append((view(pair[0]) - view(pair[1])) / (2 * t) - linear(line.displacement(t)))
        if len(rows) < 3:
            continue
        wide, narrow = (4 * rows[1] - rows[0]) / 3, (4 * rows[2] - rows[1]) / 3
        here = (16 * narrow - wide) / 15
        residuals.append(here)
        changes.append(torch.where(here.isfinite(), (narrow - wide).abs() / 4, math.inf))
        lengths.append(step / 4)
        if bool((here.abs() <= allowed).all()):
            break
    residual, rounding = torch.stack(residuals), torch.stack([noise / length for length in lengths])
    error = torch.stack(changes) + rounding
    least, best = error.min(0)
    near = error <= NEARLY * least
    agrees = (near & (residual.abs() <= allowed + MARGIN * error)).any(0) & least.isfinite()
    found, rounding = (every.gather(0, best[None])[0] for every in (residual, rounding))
    return Estimate(found, least, least <= 50 * rounding, agrees)


def _noise(line: Line, view: View, like: Tensor) -> Tensor:
    """How much the values scatter about a cubic, between points so close that a smooth function is one there."""
    places = torch.tensor(NOISE_PLACES, dtype=like.dtype)
    powers = cast("Tensor", torch.linalg.vander(places, N=4))
    cubics = cast("Tensor", torch.linalg.qr(powers)[0]).to(like.device)
    freedom = len(NOISE_PLACES) - 4
    found = torch.zeros_like(like)
    for step in NOISE_STEPS:
        try:
            values = torch.stack([view(line.at(place * step)) for place in NOISE_PLACES])
        except Exception:
            continue
        values = values - values[0]
        scatter = (values - cubics @ (cubics.T @ values)).square().sum(0).div(freedom).sqrt()
        found = torch.where(scatter.isfinite(), torch.maximum(found, scatter), found)
    return found


def has_kink(line: Line, view: View, component: int, residual: float, epsilon: float) -> bool:
    """Whether the slopes to the left and to the right differ, by as much as would explain a residual."""
    middle = view(line.at(0.0))[component]
    noise = 4 * epsilon * float(middle.abs())
    gaps: list[float] = []
    for step in sorted(line.steps()):
        if noise / step > 0.05 * abs(residual):
            continue
        pair = line.pair(step)
        other = line.pair(step * 4)
        if pair is None or other is None:
            return False
        for (above, below), t in ((pair, step), (other, step * 4)):
            gaps.append(abs(float(view(above)[component] + view(below)[component] - 2 * middle)) / t)
        break
    return len(gaps) == 2 and gaps[0] >= 0.5 * abs(residual) and 0.5 <= gaps[1] / gaps[0] <= 2
