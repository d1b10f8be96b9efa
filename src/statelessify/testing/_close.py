"""`assert_trees_close`: two trees have one structure and, up to a tolerance, the same numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tree import first_difference, tree_flatten, tree_names
from .._words import listed
from ._paste import entry

__all__ = ["assert_trees_close"]

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex128: (1e-7, 1e-7),
}
"""Relative and absolute tolerance by dtype: those of `torch.testing.assert_close`; other dtypes are exact."""


class Worst(NamedTuple):
    """The entry of a leaf that is farthest outside its tolerance.

    Attributes:
        at: its index.
        outside: how many entries are.
    """

    at: tuple[int, ...]
    outside: int


def assert_trees_close(
    actual: Any,
    expected: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    equal_nan: bool = False,
    names: tuple[str, str] = ("actual", "expected"),
    note: str = "",
) -> None:
    """Assert that two trees agree: structure, shapes and dtypes exactly, numbers to ``atol + rtol * |expected|``.

    Args:
        actual: any tree of tensors and numbers.
        expected: the tree that it should be.
        rtol: relative tolerance. None: that of `torch.testing.assert_close` for the dtype (float64 1e-7, float32
            1.3e-6, integers 0).
        atol: absolute tolerance. None: likewise (float64 1e-7, float32 1e-5).
        equal_nan: whether NaN equals NaN.
        names: what the message calls the two trees.
        note: the last line of the message, such as code that reproduces it.

    Raises:
        AssertionError: they differ. It names the leaf, its worst entry and both values there, and the other leaves
            that differ.

    Example:
        >>> import torch
        >>> assert_trees_close({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 1.5])})
        Traceback (most recent call last):
        ...
        AssertionError: leaf `w`: 1 of 2 entries differ
          worst at [1]: actual 1, expected 1.5 (difference 0.5, allowed 1.2e-05)
    """
    ours, spec = tree_flatten(actual)
    theirs, other = tree_flatten(expected)
    if spec != other:
        raise AssertionError(_lines(f"the trees differ in structure: {first_difference(spec, other)}", note))
    wrong: dict[str, str] = {}
    for name, a, b in zip(tree_names(expected), ours, theirs, strict=True):
        complaint = _complaint(a, b, rtol, atol, equal_nan, names)
        if complaint:
            wrong[name] = f"leaf `{name}`: {complaint}" if name else complaint
    if wrong:
        first, *rest = wrong
        more = f"{len(rest)} more of {len(ours)} leaves differ: {listed(rest)}" if rest else ""
        raise AssertionError(_lines(wrong[first], more, note))


def _lines(*lines: str) -> str:
    return "\n  ".join(line for line in lines if line)


def _complaint(
    a: Any, b: Any, rtol: float | None, atol: float | None, equal_nan: bool, names: tuple[str, str]
) -> str | None:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        if type(a) is type(b) and not isinstance(a, (float, complex)):
            return None if a == b else f"{names[0]} {a!r}, {names[1]} {b!r}"
        if not all(isinstance(value, (int, float, complex)) for value in (a, b)):
            return f"{names[0]} {a!r}, {names[1]} {b!r}"
        dtype = torch.complex128 if isinstance(a, complex) or isinstance(b, complex) else torch.float64
        a, b = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return f"{names[0]} is of type {type(a).__name__}, {names[1]} of type {type(b).__name__}"
    for what in ("shape", "dtype", "device"):
        one, two = getattr(a, what), getattr(b, what)
        if one != two:
            return f"{names[0]} has {what} {_plain(one)}, {names[1]} {_plain(two)}"
    default = TOLERANCES.get(a.dtype, (0.0, 0.0))
    rtol, atol = default[0] if rtol is None else rtol, default[1] if atol is None else atol
    found = worst(a, b, rtol, atol, equal_nan)
    if found is None:
        return None
    left, right = entry(a.detach(), found.at), entry(b.detach(), found.at)
    difference = abs(_wide(a)[found.at] - _wide(b)[found.at]).item()
    allowed = atol + rtol * abs(_wide(b)[found.at]).item()
    where = f"at {list(found.at)}: " if found.at else ""
    return (
        f"{found.outside} of {a.numel()} entries differ\n"
        f"  worst {where}{names[0]} {left}, {names[1]} {right} (difference {difference:.2g}, allowed {allowed:.2g})"
    )


def _plain(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def worst(a: Tensor, b: Tensor, rtol: float, atol: float, equal_nan: bool = False) -> Worst | None:
    """The entry farthest outside ``atol + rtol * |b|``, and how many are outside; None if there is none."""
    if not a.is_floating_point() and not a.is_complex() and not rtol and not atol:
        excess = (a.detach() != b.detach()).to(torch.float64)  # integers beyond 2**53 have no float of their own
        equal = excess == 0
    else:
        x, y = _wide(a), _wide(b)
        equal = (x == y) | (x.isnan() & y.isnan() if equal_nan else torch.zeros_like(x, dtype=torch.bool))
        excess = (x - y).abs() - (atol + rtol * y.abs())
        # What is not finite is right only if it is equal, and worse than any number if not.
        excess = torch.where(x.isfinite() & y.isfinite(), excess, torch.inf)
        excess = torch.where(equal, -torch.inf, excess)
    outside = (excess > 0) & ~equal
    if not bool(outside.any()):
        return None
    position = int(excess.flatten().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), excess.shape)) if excess.ndim else ()
    return Worst(index, int(outside.sum()))
