"""Branches on masks and counts, which vmap refuses even where every task takes the same one."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .._transforms import unwrapped
from ._registry import rule

__all__: list[str] = []


def _marking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the scalars that a function makes of integers and booleans alone."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if not torch.compiler.is_compiling() and isinstance(out, Tensor) and out.ndim == 0:
            out._of_integers = not any(  # pyright: ignore[reportAttributeAccessIssue]
                isinstance(arg, float) or (isinstance(arg, Tensor) and (arg.is_floating_point() or arg.is_complex()))
                for arg in args
            )
        return out

    return call


_REDUCTIONS: tuple[Any, ...] = (Tensor.all, Tensor.any, torch.all, torch.any)
_NAMES = ("eq", "ne", "lt", "le", "gt", "ge")
_COMPARISONS = [cast("Any", Tensor).__eq__, *(getattr(place, name) for name in _NAMES for place in (Tensor, torch))]
for _function in (*_REDUCTIONS, *_COMPARISONS):
    rule(
        _function,
        why="a branch on a mask or a count is refused by vmap, although its tasks may agree",
        upstream="https://docs.pytorch.org/docs/stable/func.ux_limitations.html",
    )(_marking(_function))


@rule(
    cast("Any", Tensor).__bool__,
    why="a branch on a mask or a count is refused by vmap, although its tasks may agree",
    upstream="https://docs.pytorch.org/docs/stable/func.ux_limitations.html",
)
def _truth(tensor: Tensor) -> bool:
    """What all tasks say; where they differ, or where it is about other values, torch's own error.

    A comparison of floating-point numbers is a real branch on data, on which tasks agree by chance.
    """
    ask: Any = cast("Any", Tensor).__bool__
    if torch.compiler.is_compiling() or not is_functorch_wrapped_tensor(tensor):
        return ask(tensor)
    if not getattr(tensor, "_of_integers", False):
        return ask(tensor)
    with torch._C._DisableFuncTorch():
        values = unwrapped(tensor)
        every, some = bool(values.all()), bool(values.any())
    return every if every == some else ask(tensor)
