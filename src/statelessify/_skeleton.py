"""The private skeleton: a module's structure without its tensors, on which every pure call runs."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._structure import ATOMIC, children, copy_structure, is_uninitialized, named_parts, slot_values
from .errors import LazyModuleError, ModuleError

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


def check_supported(module: nn.Module) -> None:
    """Refuse, by name, what has no pure form."""
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModuleError(f"`module` is {type(module).__name__}, not a torch.nn.Module; pass the module itself")
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


_INTERNAL = frozenset({"_parameters", "_buffers", "_modules"})


class Pristine:
    """What a skeleton looked like before its first call, to tell whether a call has left a trace on it.

    A skeleton is used again only if everything it holds is known to be unchanged: values by identity, plain
    tensors by their version, containers of plain values by equality. Anything else is never used twice.
    """

    def __init__(self, skeleton: nn.Module) -> None:
        self._known = True
        self._entries: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._containers: list[tuple[Any, Any]] = []
        for part in skeleton.modules():
            if any(True for _ in slot_values(part)):
                self._known = False
            self._entries.append((part.__dict__, tuple(part.__dict__.values())))
            self._entries.append((part._modules, tuple(part._modules.values())))
            self._entries.append((part._parameters, tuple(part._parameters.values())))
            self._entries.append((part._buffers, tuple(part._buffers.values())))
            for name, value in part.__dict__.items():
                if name not in _INTERNAL:
                    self._classify(value)

    def _classify(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensors.append((value, value._version))
        elif _is_plain(value):
            if not isinstance(value, (*ATOMIC, types.FunctionType, types.MethodType)):
                self._containers.append((value, copy.deepcopy(value)))
        elif not isinstance(value, nn.Module):
            self._known = False

    def still(self) -> bool:
        """Whether the skeleton is as it was."""
        if not self._known:
            return False
        for entries, values in self._entries:
            if len(entries) != len(values):
                return False
            for now, before in zip(entries.values(), values, strict=True):
                if now is not before:
                    return False
        return all(t._version == version for t, version in self._tensors) and all(
            now == before for now, before in self._containers
        )


def _is_plain(value: Any) -> bool:
    """Whether a value is built of immutable values only, so that equality says whether it has changed."""
    if isinstance(value, ATOMIC):
        return True
    if isinstance(value, types.FunctionType):
        return not value.__closure__ and not value.__dict__
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if type(value) in (list, tuple, set, frozenset, dict, deque) or type(value).__name__ == "OrderedDict":
        return all(_is_plain(child) for child in children(value))
    return False


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
        self.pristine = Pristine(inner)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor | None]]:
        out = self.inner(*args, **kwargs)
        return out, self.read()

    def read(self) -> list[Tensor | None]:
        return [
            (owner._buffers if is_buffer else owner._parameters).get(name) for owner, name, is_buffer in self._slots
        ]


class Skeletons:
    """A pool of copies of one structure, checked out for one call at a time.

    Concurrent and re-entrant calls each get their own. A skeleton whose call raised, or left a trace on it, is
    thrown away; the template itself never runs in eager code.
    """

    def __init__(self, template: nn.Module, paths: tuple[Slot, ...]) -> None:
        self.template = template
        self.paths = paths
        self.traced = Skeleton(template, paths)  # dynamo traces one call at a time, and cannot trace a copy
        self._idle: list[Skeleton] = []

    def copy(self) -> nn.Module:
        return copy_structure(self.template, find_slots(self.template).tensors.values())

    def run(self, call: Callable[[Skeleton], Any]) -> Any:
        try:
            skeleton = self._idle.pop()  # atomic: no lock is needed
        except IndexError:
            skeleton = Skeleton(self.copy(), self.paths)
        result = call(skeleton)
        if skeleton.pristine.still():
            self._idle.append(skeleton)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template, "paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["template"], state["paths"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeletons:
        return Skeletons(self.template, self.paths)  # a template is never written to: sharing it is safe
