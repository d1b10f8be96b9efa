"""Trees as Python code, for the line of an error message that reproduces it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

__all__: list[str] = []

LONGEST = 400
"""Characters of code beyond which nobody would paste it."""


def paste(tree: Any, longest: int = LONGEST) -> str:
    """An expression that makes the tree again, exactly, where ``torch`` is imported; what is too long is outlined."""
    code = _code(tree)
    return code if len(code) <= longest else _outline(tree)


def _code(value: Any) -> str:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_code(item)}" for key, item in cast("dict[Any, Any]", value).items()) + "}"
    if isinstance(value, (list, tuple)):
        return _sequence(cast("list[Any]", value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, complex) and not _is_literal(value):
        return f"complex({_code(value.real)}, {_code(value.imag)})"
    return repr(value)


def _is_literal(value: complex) -> bool:
    """Whether the sum of two parts is the number itself, with the signs of its zeros."""
    return all(math.isfinite(part) and math.copysign(1, part) > 0 for part in (value.real, value.imag))


def _sequence(values: list[Any] | tuple[Any, ...]) -> str:
    inside = ", ".join(map(_code, values))
    if isinstance(values, list):
        return f"[{inside}]"
    if hasattr(values, "_fields"):
        return f"{type(values).__name__}({inside})"
    return f"({inside},)" if len(values) == 1 else f"({inside})"


def _tensor(tensor: Tensor) -> str:
    if tensor.numel() == 0:
        return f"torch.zeros({tuple(tensor.shape)}, dtype={tensor.dtype})"
    if tensor.numel() > LONGEST:
        return _outline(tensor) + " " * LONGEST  # too long, without the time that writing it takes
    return f"torch.tensor({_code(tensor.detach().resolve_conj().tolist())}, dtype={tensor.dtype})"


def _outline(value: Any) -> str:
    """The tree with a shape in place of each tensor."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"<{kind} tensor {tuple(value.shape)}>"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{key!r}: {_outline(item)}" for key, item in cast("dict[Any, Any]", value).items()) + "}"
        )
    if isinstance(value, (list, tuple)):
        items = cast("list[Any]", value)
        return f"{type(items).__name__}({', '.join(map(_outline, items))})"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def entry(tensor: Tensor, index: tuple[int, ...]) -> str:
    """One entry with all its digits."""
    value = tensor[index].item()
    single = tensor.is_floating_point() and tensor.dtype != torch.float64
    return f"{value:.9g}" if single else repr(value)
