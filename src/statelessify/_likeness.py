"""Tensors that a forward takes for parameters: whatever stands in the slots, ``isinstance(p, nn.Parameter)`` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__: list[str] = []

_MARK = "_is_param"  # torch takes a tensor with this attribute for a parameter


def as_parameter(tensor: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """Another name for a tensor, by which it is known as a parameter, with what hangs on the module's own."""
    if type(tensor) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return tensor
    named = tensor.as_subclass(Tensor)  # not `view_as`, whose backward refuses sparse gradients
    for key, value in {**attributes, _MARK: True}.items():
        setattr(named, key, value)
    return named


class Call:
    """One call's marks on the tensors that it was given: taken off when it ends, and never another call's."""

    def __init__(self) -> None:
        self._marked: list[Tensor] = []

    def mark(self, tensor: Tensor) -> Tensor:
        """The tensor, known as a parameter; another name for it where a call of another thread has marked it."""
        if type(tensor) is not Tensor:
            return tensor
        mark = _attributes(tensor).setdefault(_MARK, self)  # atomic: no lock is needed
        if mark is self:
            self._marked.append(tensor)
        elif isinstance(mark, Call):
            return as_parameter(tensor, {})
        return tensor

    def end(self) -> None:
        """Take the marks off."""
        for tensor in self._marked:
            _attributes(tensor).pop(_MARK, None)  # one tensor may stand under two names

    def __reduce__(self) -> Any:
        return bool, (True,)  # a copy that forward makes of a tensor stays a parameter


_attributes = cast("Callable[[Tensor], dict[str, Any]]", vars)
