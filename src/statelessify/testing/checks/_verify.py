"""A derivative held against differences: along random lines, then entry by entry to name the worst one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import DtypeError, LossError
from .._close import assert_trees_close
from ._claims import FLOOR, RTOL, Claims, Problem, claims, gradient_of, needing_grad, of_user, spread, without_graph
from ._complaint import Settings, complaint
from ._differences import Line, size, sizes
from ._judge import judge, kinked, unit
from ._real import RealFunction, check_repeatable

__all__: list[str] = []


def verify(
    function: RealFunction,
    order: int,
    modes: Sequence[str],
    grads: Callable[[Any], Any] | None,
    settings: Settings,
) -> None:
    """What `check_grads` does, for functions of other names."""
    devices = {leaf.device.index for leaf in function.point() if leaf.is_cuda}
    with torch.random.fork_rng(devices=list(devices)), torch.inference_mode(False), torch.enable_grad():
        point = function.point()
        given = of_user(function, grads) if grads is not None else None
        values = check_repeatable(function, point)
        if any(p.dtype != torch.float64 for p in point):
            with suppress(Exception):  # such as a product with a float32 constant
                wide = function.point(wide=True)
                found = [value.detach() for value in function(needing_grad(wide))]
                if given is not None:
                    given(wide)
                values, point = found, wide
        _check_exact([*point, *values])
        _check_scalar(function, values, given)
        problem = Problem(
            function, function, list(function.outputs), point, values, [v.abs() for v in values], given, 1
        )
        for mode in modes if grads is None else ("reverse",):
            _check(problem, mode, settings)
        if order == 2:
            second = gradient_of(problem, settings.seed)
            if given is None and "reverse" in modes:
                _check_graph(problem, second, settings)
            for mode in modes:
                _check(second, mode, settings)


def _check_graph(problem: Problem, second: Problem, settings: Settings) -> None:
    """The gradient is the same whether it is to be differentiated again or not: code may branch on that."""
    plain = without_graph(problem, settings.seed)
    rtol, floor = RTOL[problem.dtype] if settings.rtol is None else settings.rtol, FLOOR[problem.dtype]
    for name, once, twice, rough in zip(second.outputs, plain, second.values, second.rough, strict=True):
        size = float(rough.max()) if once.numel() else 0.0  # a gradient may be all rounding
        try:
            assert_trees_close(
                {name: twice.to(once)},
                {name: once},
                rtol=rtol,
                atol=floor * size + settings.atol,
                names=("with `create_graph=True`", "without"),
                note=f"reproduce: {settings.reproduce}",
            )
        except AssertionError as error:
            raise AssertionError(
                f"the gradient is another one where it is to be differentiated again: {error}"
            ) from None


def _check(problem: Problem, mode: str, settings: Settings) -> None:
    claim = claims(problem, mode, settings.seed, settings.rtol, settings.atol)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    for leaf, x in enumerate(problem.point):
        for direction in _directions(x, settings.entries, generator):
            _check_line(problem, mode, claim, Line(problem.call, problem.point, leaf, direction), settings)


def _check_line(problem: Problem, mode: str, claim: Claims, line: Line, settings: Settings) -> None:
    verdict = judge(problem, claim, line)
    if not verdict.bad:
        return
    if settings.kinks == "skip" and kinked(problem, claim, line, verdict):
        count = line.direction.numel()
        if int(line.direction.count_nonzero()) > 1:
            for position in range(min(count, 256)):
                single = Line(problem.call, problem.point, line.leaf, unit(problem.point[line.leaf], position))
                _check_line(problem, mode, claim, single, settings)
        return
    raise AssertionError(complaint(problem, mode, claim, line, verdict, settings))


def _directions(x: Tensor, entries: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Directions for a whole leaf, by its size and by that of each entry; then single entries."""
    if x.numel() == 0:
        return
    count = x.numel()
    if count > entries:
        yield spread(x, generator) * size(x)
        yield spread(x, generator) * sizes(x, size(x))
        chosen = cast("list[int]", torch.randperm(count, generator=generator)[:entries].tolist())
    else:
        chosen = range(count)
    for position in chosen:
        yield unit(x, position)


def _check_exact(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.float64, torch.float32):
            raise DtypeError(
                f"the function computes in {str(tensor.dtype).removeprefix('torch.')}, whose rounding hides what "
                "differences would show; give it float32 or float64 parameters and inputs"
            )


def _check_scalar(function: RealFunction, values: Sequence[Tensor], given: Any) -> None:
    if given is not None and (len(values) != 1 or values[0].ndim != 0):
        raise LossError(
            f"`grads` goes with a function that returns one real number, and this returns {len(values)} tensors, the "
            f"first of shape {tuple(values[0].shape)}; sum them, or leave `grads` out"
        )
