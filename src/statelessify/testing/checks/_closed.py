"""Tensors that a function reads past its arguments: found, and moved, as if they were arguments."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from ..._capture import LOOKS, SET_REQUIRES_GRAD
from ._probe import is_inexact

__all__: list[str] = []


class _Reads(TorchFunctionMode):
    """Notes the tensors that need a gradient, were there before, and meet a function which could pass one on."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._known = {id(tensor) for tensor in known}
        self._made: dict[int, Tensor] = {}  # held, so that no other tensor gets the number
        self._start = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in LOOKS and torch.is_grad_enabled():  # what is detached on purpose gets no gradient
            for tensor in _tensors((args, kwargs)):
                self._note(tensor)
        out = func(*args, **kwargs)
        for tensor in _tensors((out, args[:1] if func == SET_REQUIRES_GRAD else ())):
            if id(tensor) not in self.found and id(tensor) not in self._known and tensor.is_leaf:
                self._made[id(tensor)] = tensor
        return out

    def _note(self, tensor: Tensor) -> None:
        if id(tensor) in self._known or id(tensor) in self._made or not tensor.requires_grad:
            return
        node: Any = tensor.grad_fn
        if node is None or node._sequence_nr() < self._start:
            self.found[id(tensor)] = tensor


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments, below what transforms have wrapped around them."""
    if isinstance(tree, Tensor):
        while is_functorch_wrapped_tensor(tree):
            tree = get_unwrapped(tree)
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for item in cast("Any", tree).values() if isinstance(tree, dict) else cast("Any", tree):
            yield from _tensors(item)


def closed_over(call: Callable[[], Any], known: Iterable[Any]) -> dict[str, Tensor]:
    """The floating tensors from outside that need a gradient and are read in a call, by a number and a shape.

    Not those in whose memory lies another one: to move one of them would move both.
    """
    given = [leaf for leaf in known if isinstance(leaf, Tensor)]
    with _Reads(given) as reads:
        call()
    found = [t for t in reads.found.values() if is_inexact(t)]
    found = [t for t in found if t.layout == torch.strided and type(t) in (Tensor, torch.nn.Parameter)]
    memory = [t.untyped_storage().data_ptr() for t in (*given, *found)]
    alone = [t for t in found if memory.count(t.untyped_storage().data_ptr()) == 1]
    return {f"{index} of shape {tuple(t.shape)}": t for index, t in enumerate(alone)}


@contextmanager
def moved(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Generator[Sequence[Tensor]]:
    """The tensors with other values, until the block ends."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    _write(tensors, values)
    try:
        yield list(tensors.values())
    finally:
        _write(tensors, before)


def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch._C.DisableTorchFunction(), torch.no_grad():  # no mode of ours or of the user's sees it
        for name, tensor in tensors.items():
            tensor.data.copy_(values[name])  # its version stays, for graphs of the user's that hold it
