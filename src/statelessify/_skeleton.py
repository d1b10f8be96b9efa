"""The private skeleton: a module's structure without its tensors, on which every pure call runs."""

from __future__ import annotations

import sys
import types
import weakref
from collections import OrderedDict, deque
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._structure import ATOMIC, children, copy_structure, is_uninitialized, named_parts, slot_values
from ._vacant import vacancies
from .errors import LazyModuleError, ModuleError
from .rules._registry import install

__all__: list[str] = []


class Slot(NamedTuple):
    """One place that holds a tensor: an entry of some submodule's ``_parameters`` or ``_buffers``."""

    path: str
    registered_buffer: bool


class Slots(NamedTuple):
    """Where a module's tensors live.

    `params` and `buffers` map each unique tensor's name to all of its slots (tied weights have several), in the
    order of ``named_parameters()`` and ``named_buffers()``; frozen parameters stand in `buffers`, before the
    registered ones. `empty` are the slots that hold None.
    """

    params: dict[str, tuple[Slot, ...]]
    buffers: dict[str, tuple[Slot, ...]]
    empty: dict[str, Slot]
    tensors: dict[str, Tensor]


def find_slots(module: nn.Module) -> Slots:
    """Walk a module once. A submodule that is reached by two paths is visited by the first of them only."""
    places: dict[int, list[Slot]] = {}
    first: dict[int, tuple[str, Tensor, bool]] = {}
    empty: dict[str, Slot] = {}
    for prefix, owner in named_parts(module):
        both: list[tuple[bool, dict[str, Any]]] = [(False, owner._parameters), (True, owner._buffers)]
        for is_buffer, entries in both:
            for attribute, tensor in entries.items():
                path = f"{prefix}.{attribute}" if prefix else attribute
                if tensor is None:
                    empty[path] = Slot(path, is_buffer)
                    continue
                first.setdefault(id(tensor), (path, tensor, is_buffer))
                places.setdefault(id(tensor), []).append(Slot(path, is_buffer))
    params: dict[str, tuple[Slot, ...]] = {}
    frozen: dict[str, tuple[Slot, ...]] = {}
    buffers: dict[str, tuple[Slot, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for key, (path, tensor, is_buffer) in first.items():
        group = buffers if is_buffer else params if tensor.requires_grad else frozen
        group[path] = tuple(places[key])
        tensors[path] = tensor
    return Slots(params, frozen | buffers, empty, tensors)


def check_is_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ModuleError(f"`module` is {type(module).__name__}, not a torch.nn.Module; pass the module itself")


def check_supported(module: nn.Module) -> None:
    """Refuse, by name, what has no pure form."""
    for path, part in named_parts(module):
        where = f"submodule `{path}`" if path else "`module`"
        kind = type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            raise ModuleError(
                f"{where} is a ScriptModule ({kind}), whose tensors are compiled in; pass the Python module"
            )
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ModuleError(
                f"{where} is wrapped in {kind}, which copies and synchronises parameters; pass its `.module` instead"
            )
        if "_orig_mod" in part._modules and kind == "OptimizedModule":
            raise ModuleError(
                f"{where} is already compiled ({kind}); pass its `._orig_mod`, and compile the function that calls "
                "`apply` instead"
            )
        slots = {**part._parameters, **part._buffers}
        lazy = [name for name, t in slots.items() if is_uninitialized(t)]
        if lazy:
            raise LazyModuleError(
                f"{where} ({kind}) is a lazy module that has not seen an input yet: `{lazy[0]}` has no shape; "
                "pass `example_args=(x,)`, or call the module once first"
            )


class Pristine:
    """What a skeleton looked like before its first call, to tell whether a call has left a trace on it.

    A skeleton is used again only if everything it holds is known to be unchanged: values by identity, plain tensors by
    their version, containers of plain values by what they print. Anything else is never used twice.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        self._parts = set(map(id, skeleton.modules()))
        self._known = True
        self._entries: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._empty: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
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
            self._tensors.append((value, value._version))
        elif self._is_plain(value):
            if isinstance(value, _CONTAINERS) and not len(cast("list[Any]", value)):
                self._empty.append(cast("Any", value))
            elif not _is_fixed(value):
                self._containers.append((cast("Any", value), _print(value)))
        else:
            self._known = False

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
        return all(tensor._version == version for tensor, version in self._tensors) and all(
            _print(now) == before for now, before in self._containers
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


def _print(value: Any) -> Any:
    """What a plain value holds, in a form that can be compared and holds nothing itself."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (nn.Module, weakref.ref)):
        return id(cast("Any", value))
    if type(value) in _CONTAINERS or isinstance(value, types.MethodType):
        return [_print(child) for child in children(value)]
    if isinstance(value, types.FunctionType):
        return [id(value), *map(_print, children(value))]
    return repr(value)


_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def register_parameter(part: nn.Module, name: str, param: Tensor | None) -> None:
    """As torch does, but it takes a parameter that is not a leaf: one that a call has been given may have a graph."""
    if param is None or param.grad_fn is None:
        type(part).register_parameter(part, name, cast("Any", param))
    else:
        part._parameters[name] = cast("Any", param)


class Skeleton(nn.Module):
    """One copy of a structure with what is needed to run it: it calls `inner`, then reads every slot.

    It is a module of its own so that `torch.func.functional_call` installs and removes the tensors, and the slots
    are read in between.
    """

    def __init__(self, inner: nn.Module, paths: tuple[Slot, ...]) -> None:
        super().__init__()
        self.inner = inner
        owners = dict(named_parts(inner))
        split = [slot.path.rpartition(".") for slot in paths]
        self._slots = [
            (owners[owner], name, slot.registered_buffer) for (owner, _, name), slot in zip(split, paths, strict=True)
        ]
        self._empty = [slot for slot, tensor in zip(self._slots, self.read(), strict=True) if tensor is None]
        self._parts = [part for _, part in named_parts(inner)]
        for part in self._parts:
            part.__dict__["register_parameter"] = types.MethodType(register_parameter, part)
        self.pristine = Pristine(inner)
        self._python = [
            (part, name, value)
            for _, part in named_parts(inner)
            if not type(part).__module__.startswith("torch.nn.")
            for name, value in part.__dict__.items()
            if name not in _MODULE_ATTRIBUTES and name not in ("forward", "register_parameter")
        ]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        if torch.compiler.is_compiling():
            return self._forward_traced(args, kwargs)
        out = self.inner(*args, **kwargs)
        return out, self.read()

    def _forward_traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor | None]]:
        """Dynamo has one skeleton for all calls: the Python state that a call has changed is put back."""
        for part, name, value in self._python:
            if isinstance(value, (list, dict, set)):
                setattr(part, name, value.copy())  # pyright: ignore[reportUnknownArgumentType]
        out = self.inner(*args, **kwargs)
        values = self.read()
        for part, name, value in self._python:
            setattr(part, name, value)
        for owner, name, is_buffer in self._empty:
            (owner._buffers if is_buffer else owner._parameters)[name] = None
        return out, values

    def holders(self) -> int:
        """How many references to its parts there are: more after a call than before, and something has kept one."""
        return sum(map(sys.getrefcount, self._parts))

    def read(self) -> list[Tensor | None]:
        return [
            (owner._buffers if is_buffer else owner._parameters).get(name) for owner, name, is_buffer in self._slots
        ]


class Skeletons:
    """A pool of copies of one structure, checked out for one call at a time.

    Concurrent and re-entrant calls each get their own. A skeleton whose call raised, left a trace on it, or is still
    held by something is not used again; the template itself never runs.
    """

    def __init__(self, template: nn.Module, paths: tuple[Slot, ...]) -> None:
        self.template = template
        self.paths = paths
        self.traced = Skeleton(self.copy(traced=True), paths)  # dynamo traces one call at a time, and cannot copy
        self._idle: list[Skeleton] = []

    def copy(self, traced: bool = False) -> nn.Module:
        """A structure of one's own, its slots vacant."""
        return install(copy_structure(self.template, vacancies(find_slots(self.template).tensors, traced)))

    def take(self) -> Skeleton:
        """A skeleton for one call."""
        try:
            skeleton = self._idle.pop()  # atomic: no lock is needed
            if skeleton.pristine.unshared():
                return skeleton
        except IndexError:
            pass
        return Skeleton(self.copy(), self.paths)

    def give_back(self, skeleton: Skeleton) -> bool:
        """Use a skeleton again, unless its call has left a trace on it; whether it will be."""
        still = skeleton.pristine.still()
        if still:
            self._idle.append(skeleton)
        return still

    def has_idle(self) -> bool:
        """Whether a skeleton waits to be used again."""
        return bool(self._idle)

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template, "paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["template"], state["paths"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeletons:
        return Skeletons(self.template, self.paths)  # a template is never written to: sharing it is safe
