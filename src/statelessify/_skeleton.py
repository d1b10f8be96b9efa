"""The private skeleton: a module's structure without its tensors, on which every pure call runs."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._known import Conduct, conduct_of, may_meet_rules
from ._pristine import Pristine
from ._structure import copy_structure, is_uninitialized, named_parts
from ._vacant import vacancies
from .errors import LazyModuleError, ModuleError
from .rules._registry import RULES, When, install, rule_of_class

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


def check_supported(
    parts: Iterable[tuple[str, nn.Module]], first: str = "pass `example_args=(x,)`, or call the module once first"
) -> None:
    """Refuse, by name, parts of a module that have no pure form; `first` is what helps with a lazy one."""
    for path, part in parts:
        lazy = [name for own in (part._parameters, part._buffers) for name, t in own.items() if is_uninitialized(t)]
        compiled = "_orig_mod" in part._modules and type(part).__name__ == "OptimizedModule"
        if lazy or compiled or isinstance(cast("Any", part), _UNSUPPORTED):
            raise _unsupported(f"submodule `{path}`" if path else "`module`", part, lazy, first)


_UNSUPPORTED = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)


def _unsupported(where: str, part: nn.Module, lazy: list[str], first: str) -> ModuleError:
    kind = type(part).__name__
    if isinstance(part, torch.jit.ScriptModule):
        return ModuleError(f"{where} is a ScriptModule ({kind}), whose tensors are compiled in; pass the Python module")
    if isinstance(part, _UNSUPPORTED):
        return ModuleError(
            f"{where} is wrapped in {kind}, which copies and synchronises parameters; pass its `.module` instead"
        )
    if lazy:
        return LazyModuleError(
            f"{where} ({kind}) is a lazy module that has not seen an input yet: `{lazy[0]}` has no shape; {first}"
        )
    return ModuleError(
        f"{where} is already compiled ({kind}); pass its `._orig_mod`, and compile the function that calls `apply` "
        "instead"
    )


MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def register_parameter(part: nn.Module, name: str, param: Tensor | None) -> None:
    """As torch does, but it takes a parameter that is not a leaf: one that a call has been given may have a graph."""
    if param is None or param.grad_fn is None:
        type(part).register_parameter(part, name, cast("Any", param))
    else:
        part._parameters[name] = cast("Any", param)


class Skeleton(nn.Module):
    """One copy of a structure with what is needed to run it: tensors are put into its slots, and read from there.

    It is a module of its own so that `torch.func.functional_call` can do the same, which dynamo follows.
    """

    run: Callable[..., Any]

    def __init__(self, inner: nn.Module, paths: tuple[Slot, ...], traced: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.rules = len(RULES)  # one that comes later holds for another skeleton
        owners = dict(named_parts(inner))
        split = [slot.path.rpartition(".") for slot in paths]
        self._slots = [
            (owners[owner], name, slot.registered_buffer) for (owner, _, name), slot in zip(split, paths, strict=True)
        ]
        self._parts = [part for _, part in named_parts(inner)]
        for part in self._parts:
            part.__dict__["register_parameter"] = types.MethodType(register_parameter, part)
        self.conduct: Conduct = "unknown" if traced else conduct_of(inner)
        self.known = self.conduct != "unknown"
        self._vacant = self._read()
        self._names = [name for _, name, _ in self._slots]
        self._entries: list[dict[str, Any]] = [
            owner.__dict__ if self.known else owner._buffers if is_buffer else owner._parameters
            for owner, _, is_buffer in self._slots
        ]
        self.pristine = None if self.known else Pristine(inner)
        if self.known:
            self._show_attributes()
        self.__dict__["run"] = inner  # not by way of `nn.Module.__getattr__`
        self._holders: int | None = None
        self._python = [
            (part, name, value)
            for _, part in named_parts(inner)
            if not type(part).__module__.startswith("torch.nn.")
            for name, value in part.__dict__.items()
            if name not in MODULE_ATTRIBUTES and name not in ("forward", "register_parameter")
        ]

    def _show_attributes(self) -> None:
        """Put what an attribute leads to where Python looks first: `nn.Module.__getattr__` takes longer.

        An attribute that forward binds anew would keep its old value: only for known modules, which do not.
        """
        for part in self._parts:
            part.__dict__.update(cast("Any", part._modules))
            rule = rule_of_class(type(part))
            if rule is not None and rule.when == "always":
                part.__dict__["forward"] = types.MethodType(rule.call, part)
        self.vacate()

    def withdraw(self) -> bool:
        """End its use for calls: `_show_attributes` undone. Whether it is as it was before its last call."""
        if self.pristine is not None:
            return self.pristine.still()
        for entries, name in zip(self._entries, self._names, strict=True):
            entries.pop(name, None)
        for part in self._parts:
            for name in part._modules:
                part.__dict__.pop(name, None)
            if rule_of_class(type(part)) is not None:
                del part.__dict__["forward"]
        install(self.inner)
        return True

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
        for (owner, name, is_buffer), vacant in zip(self._slots, self._vacant, strict=True):
            if vacant is None:
                (owner._buffers if is_buffer else owner._parameters)[name] = None
        return out, values

    def is_held(self) -> bool:
        """Whether there are more references to its parts than when this was first asked: something has kept one."""
        holders = sum(map(sys.getrefcount, self._parts))
        if self._holders is None:
            self._holders = holders
        return holders != self._holders

    def read(self) -> list[Tensor | None]:
        """What stands in the slots, also in those that forward has bound anew."""
        if self.known:
            return [entries[name] for entries, name in zip(self._entries, self._names, strict=True)]
        return self._read()

    def _read(self) -> list[Tensor | None]:
        return [
            (owner._buffers if is_buffer else owner._parameters).get(name) for owner, name, is_buffer in self._slots
        ]

    def fill(self, tensors: Iterable[Tensor | None]) -> None:
        """Put a tensor into each slot."""
        for entries, name, tensor in zip(self._entries, self._names, tensors):  # noqa: B905
            entries[name] = tensor

    def vacate(self) -> None:
        """Leave the slots as they were: nothing holds a tensor of the call, and who comes late meets an error."""
        for entries, name, tensor in zip(self._entries, self._names, self._vacant):  # noqa: B905
            entries[name] = tensor


class Skeletons:
    """A pool of copies of one structure, checked out for one call at a time.

    Concurrent and re-entrant calls each get their own. A skeleton whose call raised, left a trace on it, or is still
    held by something is not used again; the template itself never runs.
    """

    def __init__(self, template: nn.Module, paths: tuple[Slot, ...]) -> None:
        self.template = template
        self.paths = paths
        self.traced = Skeleton(self.copy(traced=True), paths, True)  # dynamo traces one call at a time, and cannot copy
        self._idle: list[Skeleton] = []
        self._met: dict[When, tuple[int, bool]] = {}  # how many rules there were, and whether it may meet one

    def copy(self, traced: bool = False) -> nn.Module:
        """A structure of one's own, its slots vacant."""
        return install(copy_structure(self.template, vacancies(find_slots(self.template).tensors, traced)))

    def take(self) -> Skeleton:
        """A skeleton for one call."""
        try:
            skeleton = self._idle.pop()  # atomic: no lock is needed
            if skeleton.rules == len(RULES) and (skeleton.pristine is None or skeleton.pristine.unshared()):
                return skeleton
        except IndexError:
            pass
        skeleton = Skeleton(self.copy(), self.paths)
        skeleton.is_held()
        return skeleton

    def give_back(self, skeleton: Skeleton) -> bool:
        """Use a skeleton again, unless its call has left a trace on it; whether it will be."""
        still = skeleton.pristine is None or skeleton.pristine.still()
        if still:
            self._idle.append(skeleton)
        return still

    def has_idle(self) -> bool:
        """Whether a skeleton waits to be used again."""
        return bool(self._idle)

    def may_meet(self, when: When) -> bool:
        """Whether a call may reach a function with a rule that holds then."""
        count, may_meet = self._met.get(when, (-1, True))
        if count != len(RULES):
            may_meet = may_meet_rules(self.template, when)
            self._met[when] = len(RULES), may_meet
        return may_meet

    def __getstate__(self) -> dict[str, Any]:
        return {"template": self.template, "paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["template"], state["paths"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeletons:
        return Skeletons(self.template, self.paths)  # a template is never written to: sharing it is safe
