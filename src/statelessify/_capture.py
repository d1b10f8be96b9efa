"""Tensors that a function reads past its arguments: found on a first run, and replaced on a later one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_level
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ._graph import nodes
from ._transforms import depth, levels
from ._vacant import Vacant
from .errors import DerivativeError

__all__: list[str] = []

# What looks at a tensor and takes no gradient to it: nothing of it is lost where only these meet it.
LOOKS: set[Any] = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "data", "requires_grad")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_leaf", "grad_fn", "_version")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "__len__")),
    *(getattr(Tensor, name) for name in ("detach", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")),
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.detach),
}
SET_REQUIRES_GRAD: Any = cast("Any", Tensor.requires_grad).__set__


class Captures(TorchFunctionMode):
    """Notes the tensors from outside that need a gradient, as functions meet them.

    From outside is what a graph had made, or a leaf, before the mode began. What a function under the mode has made
    is not, and neither is what belongs to a transform that began later.

    Attributes:
        found: the tensors, by their numbers.
        met_known: whether a tensor that was known from the beginning was met, too.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self.met_known = False
        self._known = {id(tensor) for tensor in known}
        self._start = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        self._depth = depth()
        self._made: dict[int, Tensor] = {}  # leaves, by a number that no other tensor gets while they are held

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._depth or func not in LOOKS:
            _each(self._note, args)
            if kwargs:
                _each(self._note, kwargs)
        out = func(*args, **kwargs) if kwargs else func(*args)
        _each(self._keep, args[0] if func == SET_REQUIRES_GRAD else out)
        return out

    def new_step(self, given: Iterable[Tensor] = ()) -> None:
        """Let go of what an earlier step has made; `given` is what the next one is called with."""
        self._made = {id(tensor): tensor for tensor in given}

    def _keep(self, tensor: Tensor) -> None:
        while True:
            leaf = tensor.requires_grad and tensor.is_leaf  # as is a view of what needs a gradient, under `no_grad`
            wrapped = is_functorch_wrapped_tensor(tensor)
            if (leaf or (self._depth and wrapped)) and id(tensor) not in self.found and id(tensor) not in self._known:
                self._made[id(tensor)] = tensor
            if not wrapped or maybe_get_level(tensor) <= self._depth:
                return
            tensor = get_unwrapped(tensor)

    def _note(self, tensor: Tensor) -> None:
        if not (tensor.requires_grad or is_functorch_wrapped_tensor(tensor)):  # first, for so are most
            return
        if isinstance(tensor, Vacant):  # a skeleton's slot, seen as its tensor goes in
            return
        below = tensor
        while is_functorch_wrapped_tensor(below) and maybe_get_level(below) > self._depth:
            below = get_unwrapped(below)
        key, direct = id(below), below is tensor
        if direct and key in self._known:
            self.met_known = True
            return
        if key in self._made or (direct and key in self.found):
            return
        # A transform around the loop may be over when its step runs again, and what it wraps with it.
        if not self._outside(below) and not (direct and is_functorch_wrapped_tensor(tensor)):
            return
        if not direct:
            raise DerivativeError(
                f"an inner step maps or differentiates with respect to a closed-over tensor of shape "
                f"{tuple(below.shape)} that needs a gradient: it would be lost; pass the tensor in `batch`, or write "
                "`gradient=Unroll()`"
            )
        self.found[key] = below

    def _outside(self, tensor: Tensor) -> bool:
        for seen in levels(tensor):
            node: Any = seen.grad_fn
            if seen.requires_grad and (node is None or node._sequence_nr() < self._start):
                return True
        return False


class Replaced(TorchFunctionMode):
    """Gives functions other tensors than those that they are called with."""

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self._made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [_swapped(self._tensors, arg) for arg in args]
        out = func(*given, **_swapped(self._tensors, kwargs)) if kwargs else func(*given)
        made: Any = args[0] if func == SET_REQUIRES_GRAD else out
        if isinstance(made, Tensor) and made.requires_grad and made.is_leaf:
            self._made[id(made)] = made
        return out

    def stray(self, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor | None:
        """A tensor in which the graph of `results` ends, and which is neither an input nor made under this mode."""
        own = {id(tensor) for tensor in inputs} | self._made.keys()
        leaves = (getattr(node, "variable", None) for node in nodes(results, inputs))
        return next((leaf for leaf in leaves if leaf is not None and id(leaf) not in own), None)

    def check(self, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """An error where there is one: its gradient would be lost."""
        leaf = self.stray(results, inputs)
        if leaf is not None:
            raise DerivativeError(
                f"an inner step reads a tensor of shape {tuple(leaf.shape)} that needs a gradient past torch's "
                "functions (an `autograd.Function` that is applied to a closed-over tensor, compiled code): its "
                "gradient cannot be recomputed; pass the tensor in `batch`, or write `gradient=Unroll()`"
            )


def following() -> bool:
    """Whether tensors are noted or replaced here, which then have to meet functions that are seen."""
    return any(isinstance(mode, (Captures, Replaced)) for mode in _get_current_function_mode_stack())


def followed(tensors: Mapping[str, Tensor]) -> Any:
    """The tensors under other names, which those modes have seen made; not `view_as`, that refuses sparse gradients."""
    if not isinstance(tensors, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        return tensors  # for an error that says what it is
    return {name: torch.ops.aten.alias(t) if _may_need(t) else t for name, t in tensors.items()}


def _may_need(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (tensor.requires_grad or is_functorch_wrapped_tensor(tensor))


def _each(call: Callable[[Tensor], None], arg: Any) -> None:
    if isinstance(arg, Tensor):
        call(arg)
    elif isinstance(arg, (list, tuple, dict)):
        for item in cast("Any", arg).values() if isinstance(arg, dict) else cast("Any", arg):
            if isinstance(item, (Tensor, list, tuple, dict)):  # before the call: most arguments are neither
                _each(call, item)


def _swapped(tensors: Mapping[int, Tensor], arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return tensors.get(id(arg), arg)
    if isinstance(arg, (list, tuple)):
        old: list[Any] = [*cast("tuple[Any, ...]", arg)]
        new = [_swapped(tensors, item) for item in old]
        if all(a is b for a, b in zip(new, old, strict=True)):
            return arg  # pyright: ignore[reportUnknownVariableType]
        kind = cast("Any", type(cast("Any", arg)))
        return kind(*new) if hasattr(kind, "_fields") else kind(new)
    if isinstance(arg, dict):
        return {key: _swapped(tensors, item) for key, item in cast("dict[Any, Any]", arg).items()}
    return arg
