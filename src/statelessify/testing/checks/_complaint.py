"""What the message of a wrong derivative says: the leaf, the worst entry, both values, the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._causes import cause
from ._claims import Claims, Problem, claims
from ._differences import Line
from ._judge import Verdict, judge, kinked, unit

__all__: list[str] = []

FEW = 64
"""Leaves of up to so many entries are checked entry by entry once they are known to be wrong."""


class Settings(NamedTuple):
    """How strict a check is, and what its messages say.

    Attributes:
        grads: what the messages call the user's gradients.
        hint: a last attempt to say what is wrong.
    """

    rtol: float | None
    atol: float
    seed: int
    entries: int
    kinks: str
    reproduce: str
    grads: str = "`grads`"
    hint: Callable[[], str] = str


def complaint(problem: Problem, mode: str, claim: Claims, line: Line, verdict: Verdict, settings: Settings) -> str:
    """The message for a line whose verdict is bad."""
    found = "" if bool(verdict.wrong.any()) else "unclear"
    line, verdict, counted = _worst(problem, claim, line, verdict)
    lines = [_headline(problem, mode, line, verdict, settings, found), counted]
    lines.append(_values(problem, mode, line, verdict, settings))
    if found:
        lines.append(
            "the function is not smooth here, or too noisy: move away from kinks and jumps, compute in float64, seed "
            "the noise"
        )
    elif kinked(problem, claim, line, verdict):
        lines[0] = f"the function has a kink here: its slopes to both sides differ at {_leaf(problem, line)}"
        lines.append('there is no derivative to check: move away from the kink, or write `kinks="skip"`')
    else:
        lines.append(_cause(problem, mode, claim, line, settings))
    lines.append(f"reproduce: {settings.reproduce}")
    return "\n  ".join(text for text in lines if text)


def _worst(problem: Problem, claim: Claims, line: Line, verdict: Verdict) -> tuple[Line, Verdict, str]:
    """The entry that is worst, and how many are bad where all were looked at."""
    x = problem.point[line.leaf]
    if x.numel() <= 1:
        return line, verdict, ""
    if x.numel() <= FEW:
        singles = [Line(problem.call, problem.point, line.leaf, unit(x, i)) for i in range(x.numel())]
        judged = [(single, judge(problem, claim, single)) for single in singles]
        bad = [(single, found) for single, found in judged if bool(found.wrong.any())]
        if not bad and int(line.direction.count_nonzero()) <= 1:
            return line, verdict, ""
        if not bad:
            return line, verdict, "only a direction over the whole leaf shows it, no single entry does"
        return (*max(bad, key=_badness), f"{len(bad)} of {x.numel()} entries are wrong")
    if int(line.direction.count_nonzero()) <= 1:
        return line, verdict, ""
    positions = torch.arange(x.numel())
    while len(positions) > 1:
        halves = positions.chunk(2)
        masked = [_masked(line.direction, half) for half in halves]
        judged = [
            (half, judge(problem, claim, Line(problem.call, problem.point, line.leaf, part)))
            for half, part in zip(halves, masked, strict=True)
        ]
        positions = max(judged, key=lambda item: float(item[1].estimate.residual.abs().nan_to_num(torch.inf).max()))[0]
    single = Line(problem.call, problem.point, line.leaf, unit(x, int(positions)))
    found = judge(problem, claim, single)
    if not bool(found.wrong.any()):
        return line, verdict, "only a direction over the whole leaf shows it, no single entry does"
    return single, found, ""


def _masked(direction: Tensor, positions: Tensor) -> Tensor:
    kept = torch.zeros(direction.numel(), dtype=torch.bool)
    kept[positions] = True
    return torch.where(kept.reshape(direction.shape).to(direction.device), direction, 0.0)


def _badness(item: tuple[Line, Verdict]) -> float:
    line, verdict = item
    residual = float(verdict.estimate.residual[verdict.worst].abs())
    return residual / float(line.direction.abs().max()) if residual == residual else float("inf")


def _leaf(problem: Problem, line: Line) -> str:
    name = problem.function.names[line.leaf]
    return f"leaf `{name}`" if name else "the input"


def _headline(problem: Problem, mode: str, line: Line, verdict: Verdict, settings: Settings, found: str) -> str:
    which = "derivative" if problem.order == 1 else "second derivative"
    who = settings.grads if problem.given is not None else f"{mode} mode"
    if found:
        return f"{_leaf(problem, line)}: the differences do not converge, so its {which} cannot be checked"
    return f"{_leaf(problem, line)}: the {which} by {who} is wrong{_output(problem, mode, verdict)}"


def _output(problem: Problem, mode: str, verdict: Verdict) -> str:
    """Of which output, and how it became one number."""
    component = verdict.worst
    if mode == "reverse":
        name, value = problem.outputs[component], problem.values[component]
        words = f", of the gradient by `{name}`" if problem.order == 2 and name else f", of output `{name}`"
        summed = " (its entries weighted by random numbers of `seed` and summed)" if value.ndim else ""
        return (words if name else "") + summed
    for name, value in zip(problem.outputs, problem.values, strict=True):
        if component < value.numel():
            index = [int(i) for i in torch.unravel_index(torch.tensor(component), value.shape)] if value.ndim else []
            kind = "the gradient by " if problem.order == 2 else "output "
            return f", of {kind}`{name}`{index or ''}" if name or index else ""
        component -= value.numel()
    return ""


def _values(problem: Problem, mode: str, line: Line, verdict: Verdict, settings: Settings) -> str:
    length = float(line.direction.abs().max())
    single = int(line.direction.count_nonzero()) == 1
    scale = length if single else 1.0
    claimed = float(verdict.claimed[verdict.worst]) / scale
    residual = float(verdict.estimate.residual[verdict.worst]) / scale
    error = float(verdict.estimate.error[verdict.worst]) / scale
    who = settings.grads if problem.given is not None else "autograd"
    where = "along the direction: "
    if single:
        position = torch.tensor(int(line.direction.reshape(-1).abs().argmax()))
        index = (
            tuple(int(i) for i in torch.unravel_index(position, line.direction.shape)) if line.direction.ndim else ()
        )
        shown, part = problem.function.entry_words(line.leaf, index)
        where = (f"worst at {shown}: " if shown else "") + part
    return f"{where}{who} {claimed:.9g}, differences {claimed + residual:.9g} (good to {error:.1g})"


def _cause(problem: Problem, mode: str, claim: Claims, line: Line, settings: Settings) -> str:
    zero = bool((claim(line).linear(torch.ones_like(line.direction)) == 0).all())

    def is_right() -> bool:
        again = claims(problem, mode, settings.seed, settings.rtol, settings.atol)
        return not judge(problem, again, line).bad

    def is_right_elsewhere() -> bool:  # where an inner loop then arrives
        again = claims(problem, mode, settings.seed, settings.rtol, settings.atol)
        return not judge(problem, again, Line(line.call, line.point, line.leaf, line.direction)).bad

    words = (cause(is_right) or cause(is_right_elsewhere)) if mode == "reverse" else ""
    if words:
        return words
    if zero and mode == "reverse":
        return (
            "it is zero, but the function depends on this leaf: the graph is cut on the way (`.detach()`, `.data`, "
            "`.item()`, numpy, a tensor made from numbers; in higher: `track_higher_grads=False`)"
        )
    return settings.hint()
