"""Sees a derivative that foreign code loses, in the moment it does."""

from __future__ import annotations

import os
import traceback
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name  # pyright: ignore[reportUnknownVariableType]

from .._transforms import levels, mapping, transforming
from .._tree import tree_leaves
from ..errors import DerivativeError

__all__: list[str] = []

# Of a tensor they take the shape, dtype and device, not the values.
_NEW: set[Any] = {
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
    cast("Any", Tensor.grad).__get__,
}
# Of their second argument they take the shape or dtype.
_OF_THE_FIRST: set[Any] = {Tensor.view_as, Tensor.expand_as, Tensor.reshape_as, Tensor.type_as}
_REQUIRES_GRAD, _IS_LEAF = cast("Any", Tensor.requires_grad).__get__, cast("Any", Tensor.is_leaf).__get__
_HERE = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


def carries(value: Any) -> bool:
    """Whether a derivative may be asked for through a value, at any level of transforms."""
    return isinstance(value, Tensor) and any(level.requires_grad for level in levels(value))


class Watch(TorchFunctionMode):
    """Raises where a value that carries a derivative goes into one that does not.

    Substituted parameters say that they are leaves which require a gradient, as the real ones do.
    """

    def __init__(self, owner: str, params: list[Tensor], recording: bool) -> None:
        super().__init__()
        self._owner, self._params, self._recording = owner, params, recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (_REQUIRES_GRAD, _IS_LEAF) and any(args[0] is p for p in self._params):
            return True
        if not self._recording:
            return func(*args, **kwargs)
        read = args[:1] if func in _OF_THE_FIRST else (args, kwargs)
        carried = func not in _NEW and any(map(carries, tree_leaves(read)))
        if carried and transforming() and _is_in_place(func, kwargs):
            words = "writes in place, which torch.func does not follow through foreign code; use a plain backward"
            # What tasks are mapped with falls back to a loop over them.
            raise (RuntimeError if mapping() else DerivativeError)(f"the step of {self._owner} {words}")
        out = func(*args, **kwargs)
        if carried and (_writes_unseen(func, kwargs) or any(map(_is_cut, tree_leaves(out)))):
            raise self.lost(resolve_name(func) or getattr(func, "__name__", str(func)))
        return out

    def lost(self, operation: str) -> DerivativeError:
        return DerivativeError(
            f"the step of {self._owner} cuts the graph (`{operation}`{_where()}), so that a derivative through it "
            "would be wrong without an error; for values alone call it under `torch.no_grad()`, else use a rule of "
            "`statelessify.optim`, or write the update out of place as an `optim.Optimizer`"
        )


def _writes_unseen(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__set__":  # `p.data = ...`; `p.grad = ...` is no computation
        return getattr(func, "__self__", None) is Tensor.data
    return _is_in_place(func, kwargs) and not torch.is_grad_enabled()


def _is_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "copy_") or "out" in kwargs
    return in_place or name.startswith("__i")


def _is_cut(value: Any) -> bool:
    """Whether this is a number, or a tensor of real or complex numbers, without a graph."""
    if isinstance(value, Tensor):
        return (value.is_floating_point() or value.is_complex()) and not carries(value)
    return isinstance(value, (float, complex))


def _where() -> str:
    """The line of the innermost code that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_HERE) and "<" not in frame.filename:
            return f" at {os.path.basename(frame.filename)}:{frame.lineno}"
    return ""
