"""Whether a call has left a trace on the skeleton that it ran on."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._structure import ATOMIC, children, slot_values

__all__: list[str] = []


class Pristine:
    """What a skeleton looked like before its first call, to tell whether a call has left a trace on it.

    A skeleton is used again only if everything it holds is known to be unchanged: values by identity, plain tensors by
    their values (``.data`` and numpy write past the version), containers of plain values by what they print. Anything
    else is never used twice.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        self._parts = set(map(id, skeleton.modules()))
        self._known = True
        self._entries: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._empty: list[Any] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        for part in skeleton.modules():
            if any(True for _ in slot_values(part)):
                self._known = False
            for entries in (part.__dict__, part._modules, part._parameters, part._buffers):
                if entries:
                    self._entries.append((cast("Any", entries), list(entries), list(entries.values())))
                else:
                    self._empty.append(entries)
            for name, value in part.__dict__.items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    self._classify(value)

    def _classify(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._watch(value)
        elif self._is_plain(value):
            if isinstance(value, _CONTAINERS) and not len(cast("list[Any]", value)):
                self._empty.append(cast("Any", value))
            elif not _is_fixed(value):
                items = list(_items(value))
                self._containers.append((cast("Any", value), items))
                for item in items:
                    if isinstance(item, Tensor):
                        self._watch(item)
        else:
            self._known = False

    def _watch(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            self._known = False
        else:
            self._tensors.append((tensor, tensor._version, None if tensor.is_meta else tensor.detach().clone()))

    def _is_plain(self, value: Any, depth: int = 0) -> bool:
        """Whether a value is built of tensors, immutable values and the skeleton's own parts: its print tells all."""
        if isinstance(value, (*ATOMIC, weakref.ref, Tensor)) or id(value) in self._parts:
            return True
        inside = type(value) in _CONTAINERS or isinstance(value, (types.FunctionType, types.MethodType))
        if not inside or depth > 8 or (isinstance(value, types.FunctionType) and value.__dict__):
            return False
        return all(self._is_plain(child, depth + 1) for child in children(value))

    def still(self) -> bool:
        """Whether the skeleton is as it was."""
        return self._known and self.unshared() and all(_same(*entry) for entry in self._entries)

    def unshared(self) -> bool:
        """Whether nobody has written into what a call may have handed out."""
        if any(self._empty):
            return False
        return all(_untouched(*entry) for entry in self._tensors) and all(
            _alike(list(_items(now)), before) for now, before in self._containers
        )


_CONTAINERS = (list, tuple, set, frozenset, dict, deque, OrderedDict)


def _same(entries: dict[str, Any], names: list[str], values: list[Any]) -> bool:
    return list(entries) == names and [*map(id, entries.values())] == [*map(id, values)]


def _is_fixed(value: Any) -> bool:
    """Whether there is nothing in a plain value that could change."""
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, types.FunctionType):
        return not (value.__closure__ or value.__dict__ or value.__defaults__ or value.__kwdefaults__)
    return isinstance(value, (*ATOMIC, weakref.ref, nn.Module))


def _untouched(tensor: Tensor, version: int, values: Tensor | None) -> bool:
    if tensor._version != version or values is None:
        return tensor._version == version
    return tensor.shape == values.shape and tensor.dtype == values.dtype and torch.equal(tensor, values)


def _items(value: Any) -> Iterator[Any]:
    """What a plain value holds, flat: objects, which are compared by identity, and prints of the rest."""
    if isinstance(value, (Tensor, nn.Module, weakref.ref)):
        yield cast("Any", value)
        return
    if type(value) not in _CONTAINERS and not isinstance(value, (types.FunctionType, types.MethodType)):
        yield repr(value)
        return
    yield value if isinstance(value, types.FunctionType) else type(cast("Any", value)).__name__
    for child in children(value):
        yield from _items(child)
    yield "end"


def _alike(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(
        a is b or (isinstance(a, str) and isinstance(b, str) and a == b) for a, b in zip(now, before, strict=True)
    )
