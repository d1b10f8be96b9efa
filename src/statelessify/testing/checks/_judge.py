"""What finite differences along a line say of a claimed derivative: right, wrong, or not to be judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._claims import Claims, Problem
from ._differences import MARGIN, Estimate, Line, estimate, has_kink, size, sizes

__all__: list[str] = []

UNCLEAR = {torch.float64: 1e-3, torch.float32: 5e-2}
"""Differences that are known no better than this say nothing,"""

NOISY = 0.1
"""unless it is rounding that hides their digits: then this much."""


class Verdict(NamedTuple):
    """What a line says of each component."""

    estimate: Estimate
    claimed: Tensor
    wrong: Tensor
    unclear: Tensor

    @property
    def bad(self) -> bool:
        return bool(self.wrong.any()) or bool(self.unclear.any())

    @property
    def worst(self) -> int:
        """The component that is worst."""
        excess = torch.where(self.wrong, self.estimate.residual.abs().nan_to_num(torch.inf, torch.inf), -1.0)
        return int(excess.argmax()) if bool(self.wrong.any()) else int(self.unclear.to(torch.float64).argmax())


def judge(problem: Problem, claims: Claims, line: Line) -> Verdict:
    claim, epsilon = claims(line), torch.finfo(problem.dtype).eps
    found = estimate(line, claim.view, claim.linear, claim.allowed, epsilon, claim.rough)
    claimed = claim.linear(line.direction)
    doubt = MARGIN * found.error
    wrong = ~found.agrees
    true = (claimed + found.residual).abs()
    close = found.residual.abs() <= claim.allowed
    known = torch.where(found.explained, NOISY, UNCLEAR[problem.dtype])
    # A slope that is small beside the function's own size cannot be known as well as others.
    visible = torch.maximum(known * torch.maximum(claimed.abs(), true), 10 * epsilon**0.5 * claim.rough)
    unclear = ~wrong & ~close & (doubt > visible)
    # What is flat up to rounding is flat; more than rounding would be noise that hides a slope.
    rounding = doubt <= UNCLEAR[problem.dtype] * (1 + claim.rough)
    flat = found.explained & rounding & (torch.maximum(claimed.abs(), true) <= 3 * doubt)
    unclear &= ~flat
    nowhere = ~found.residual.isfinite() & claimed.isfinite()
    return Verdict(found, claimed, wrong & ~nowhere, unclear | nowhere)


def kinked(problem: Problem, claims: Claims, line: Line, verdict: Verdict) -> bool:
    """Whether a kink explains the worst component."""
    epsilon = torch.finfo(problem.dtype).eps
    residual = float(verdict.estimate.residual[verdict.worst])
    return has_kink(line, claims(line).view, verdict.worst, residual, epsilon)


def unit(x: Tensor, position: int) -> Tensor:
    """The direction of one entry, as long as that is."""
    direction = torch.zeros(x.numel(), dtype=torch.float64, device=x.device)
    direction[position] = sizes(x, min(size(x), 1.0)).reshape(-1)[position]
    return direction.reshape(x.shape)
