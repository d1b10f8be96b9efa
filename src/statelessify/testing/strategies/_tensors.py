"""Tensors and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from hypothesis import strategies as st
from torch import Tensor

from . import _options
from . import _printing as _printing
from ._options import require

__all__ = ["shapes", "tensors"]

LARGEST = 10.0
"""The largest magnitude, unless options say otherwise."""

MARGIN = 0.125
"""How far entries keep from what they keep away from."""

DRAWN = 48
"""How many entries are drawn one by one; those of larger tensors come from a seed, save a few."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@st.composite
def shapes(
    draw: st.DrawFn, *, min_dims: int = 0, max_dims: int = 3, min_side: int = 1, max_side: int = 3
) -> tuple[int, ...]:
    """Shapes of tensors, as `hypothesis.extra.numpy.array_shapes` has them.

    Args:
        min_dims, max_dims: the number of dimensions.
        min_side, max_side: the size of each.

    Returns:
        A strategy of tuples.

    Raises:
        InvalidArgument: at draw time, if an option is no size.

    Example:
        >>> from hypothesis import find
        >>> find(shapes(min_dims=2), lambda shape: True)
        (1, 1)
    """
    for name, low, high in (("dims", min_dims, max_dims), ("side", min_side, max_side)):
        legal = isinstance(low, int) and isinstance(high, int) and 0 <= low <= high  # pyright: ignore[reportUnnecessaryIsInstance]
        require(legal, f"`min_{name}={low!r}, max_{name}={high!r}`; write two sizes, the first not above the second")
    return tuple(draw(st.lists(st.integers(min_side, max_side), min_size=min_dims, max_size=max_dims)))


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    min_value: float | None = None,
    max_value: float | None = None,
    away_from: tuple[float, ...] = (),
    special: bool = False,
    requires_grad: bool = False,
) -> Tensor:
    """Tensors of ordinary numbers.

    Args:
        shape: None: any of up to three dimensions and 27 entries.
        dtype: any of torch's, integers, truth values and complex numbers too. None: float32 or float64.
        min_value, max_value: bounds of the entries (of both parts, for complex ones). None: magnitudes up to 10; with
            `special`, any magnitude.
        away_from: numbers, such as the corners of a function, from which all entries are at least 1/8 away.
        special: whether there are also -0.0, subnormal and huge numbers, infinities and NaN; within bounds if there
            are any.
        requires_grad: of the tensor.

    Returns:
        A strategy of tensors; hypothesis prints them as code.

    Raises:
        InvalidArgument: at draw time, if the options leave no legal tensor.

    Example:
        >>> from hypothesis import find
        >>> find(tensors((2,), dtype=torch.float64, away_from=(0.0,)), lambda x: True)
        tensor([1., 1.], dtype=torch.float64)
    """
    _options.shape("shape", shape)
    if dtype is None:
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    elements = _elements(dtype, min_value, max_value, tuple(away_from), special)
    require(
        not requires_grad or dtype.is_floating_point or dtype.is_complex,
        f"`requires_grad=True` with `dtype={dtype}`; only floating-point and complex tensors have gradients",
    )
    if shape is None:
        shape = draw(shapes())
    size = math.prod(shape) * (2 if dtype.is_complex else 1)
    if size <= DRAWN:
        values = draw(st.lists(elements, min_size=size, max_size=size))
    else:
        pool = draw(st.lists(elements, min_size=1, max_size=DRAWN))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        picked = torch.randint(len(pool), (size,), generator=generator)
        values = [pool[index] for index in cast("list[int]", picked.tolist())]
    if dtype.is_complex:
        values = list(map(complex, values[::2], values[1::2]))
    return torch.tensor(values, dtype=dtype).reshape(shape).requires_grad_(requires_grad)


@cache
def _elements(
    dtype: torch.dtype, low: float | None, high: float | None, away_from: tuple[float, ...], special: bool
) -> st.SearchStrategy[Any]:
    require(
        isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q"),  # pyright: ignore[reportUnnecessaryIsInstance]
        f"`dtype={dtype!r}` is none that tensors are made of; write one as in `dtype=torch.float64`",
    )
    for name, value in (("min_value", low), ("max_value", high), *(("away_from", each) for each in away_from)):
        require(
            value is None or (isinstance(value, (int, float)) and math.isfinite(value)),  # pyright: ignore[reportUnnecessaryIsInstance]
            f"`{name}` is {value!r}; write a finite number",
        )
    wanted = f"`min_value={low!r}, max_value={high!r}`"
    require(low is None or high is None or low <= high, f"{wanted}; the first is above the second")
    require(
        not away_from or dtype.is_floating_point,
        f"`away_from={away_from!r}` with `dtype={dtype}`; it is for floating-point numbers, leave it out",
    )
    if dtype == torch.bool:
        require(low is None and high is None, f"{wanted} with `dtype=torch.bool`; truth values have no bounds")
        return st.booleans()
    if not dtype.is_floating_point and not dtype.is_complex:
        return _integers(dtype, low, high, special)
    return _floats(dtype, low, high, away_from, special)


def _integers(dtype: torch.dtype, low: float | None, high: float | None, special: bool) -> st.SearchStrategy[int]:
    kind = torch.iinfo(dtype)
    ends = (kind.min, kind.max) if special else (max(kind.min, -int(LARGEST)), int(LARGEST))
    ends = _bounds(low, high, ends, (kind.min, kind.max))
    least, most = math.ceil(ends[0]), math.floor(ends[1])
    require(least <= most, f"`min_value={low!r}, max_value={high!r}` leave no number of `dtype={dtype}`")
    return st.integers(least, most)


def _floats(
    dtype: torch.dtype, low: float | None, high: float | None, away_from: tuple[float, ...], special: bool
) -> st.SearchStrategy[float]:
    part = dtype.to_real() if dtype.is_complex else dtype
    kind = torch.finfo(part)
    ends = _bounds(low, high, (kind.min, kind.max) if special else (-LARGEST, LARGEST), (kind.min, kind.max))
    pieces = [ends]
    for point in away_from:
        cut = [((a, min(b, point - MARGIN)), (max(a, point + MARGIN), b)) for a, b in pieces]
        pieces = [(a, b) for pair in cut for a, b in pair if a <= b]
    pieces = [(_inward(a, part, up=True), _inward(b, part, up=False)) for a, b in pieces]
    pieces = [(a, b) for a, b in pieces if a <= b]
    require(
        bool(pieces),
        f"`min_value={low!r}, max_value={high!r}, away_from={away_from!r}` leave no number of `dtype={dtype}`: entries "
        f"keep {MARGIN} away; widen the bounds",
    )
    pieces.sort(key=lambda piece: (min(map(abs, piece)) if piece[0] * piece[1] > 0 else 0, piece[1] <= 0))
    width = {2: 16, 4: 32}.get(part.itemsize, 64) if part != torch.bfloat16 else 32
    options: dict[str, Any] = {"width": width, "allow_nan": False, "allow_infinity": False}
    ordinary = [st.floats(a, b, **options, allow_subnormal=_subnormal(a, b, kind, special)) for a, b in pieces]
    return st.one_of(*ordinary, *_special(kind, low, high, pieces) if special else ())


def _subnormal(low: float, high: float, kind: torch.finfo, special: bool) -> bool:
    """Whether subnormal numbers are drawn: where they are wanted, or a bound is one."""
    tiny = kind.smallest_normal
    return low < tiny and high > -tiny and (special or 0 < abs(low) < tiny or 0 < abs(high) < tiny)


def _special(
    kind: torch.finfo, low: float | None, high: float | None, pieces: list[tuple[float, float]]
) -> list[st.SearchStrategy[float]]:
    values = [-0.0, kind.smallest_normal / 2, -kind.smallest_normal / 2, kind.max, kind.min, math.inf, -math.inf]
    first, last = min(pieces)[0], max(pieces)[1]
    inside = [value for value in values if any(a <= value <= b for a, b in pieces)]
    inside += [math.inf] if high is None and last == kind.max else []
    inside += [-math.inf] if low is None and first == kind.min else []
    inside += [math.nan] if low is None and high is None else []
    return [st.sampled_from(inside)] if inside else []


def _bounds(
    low: float | None, high: float | None, usual: tuple[float, float], legal: tuple[float, float]
) -> tuple[float, float]:
    """Both bounds; one that is not given makes room for the other."""
    least = min(usual[0], high) if low is None and high is not None else usual[0] if low is None else low
    most = max(usual[1], low) if high is None and low is not None else usual[1] if high is None else high
    if low is None and high is not None and high <= usual[0]:
        least = high - 2 * LARGEST
    if high is None and low is not None and low >= usual[1]:
        most = low + 2 * LARGEST
    return max(least, legal[0]), min(most, legal[1])


def _inward(value: float, dtype: torch.dtype, up: bool) -> float:
    """The nearest number of a dtype that is not below (above) a bound."""
    found = torch.tensor(value, dtype=torch.float64).to(dtype)
    beyond: Callable[[float], bool] = (lambda x: x < value) if up else (lambda x: x > value)
    while beyond(float(found)):
        if float(found) == 0:
            return math.copysign(torch.finfo(dtype).smallest_normal, value)
        outward = (float(found) > 0) == up
        bits = found.view(_BITS[dtype.itemsize])
        found = (bits + (1 if outward else -1)).view(dtype)
    return float(found)
