"""A structural copy of a module: everything that its behaviour depends on, but its tensors."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ModuleError

__all__: list[str] = []


def is_uninitialized(tensor: Any) -> bool:
    """Whether a lazy module's tensor has no shape yet."""
    return torch.nn.parameter.is_lazy(tensor)


def named_parts(module: nn.Module, twice: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules()``; `twice` also gives the further paths to a module that has several."""
    seen = set[int]()
    stack: list[tuple[str, nn.Module | None]] = [("", module)]
    while stack:
        path, part = stack.pop()
        if part is None or (not twice and id(part) in seen):
            continue
        seen.add(id(part))
        yield path, part
        if part._modules:
            children = [(f"{path}.{name}" if path else name, child) for name, child in part._modules.items()]
            stack.extend(reversed(children))


def copy_structure(module: nn.Module, replaced: Mapping[int, Any] | None = None) -> nn.Module:
    """Copy a module and all Python state that belongs to it.

    `replaced` gives, by id, what stands for a tensor in the copy; other tensors get own storage.

    `copy.deepcopy` alone would copy the weights, fail on non-leaf tensors and generators, and leave lambdas, closures,
    weak references and hooks pointing at the original: so the memo is filled beforehand with what must not be left to
    it.
    """
    memo: dict[int, Any] = dict(replaced or {})
    found = list(reachable(module))  # keeps alive what the memo knows by id
    modules = [item for item in found if isinstance(item, nn.Module)]
    functions = [item for item in found if isinstance(item, types.FunctionType)]
    for part in modules:
        memo[id(part)] = object.__new__(type(part))
    for item in found:
        if id(item) in memo:
            continue
        if isinstance(item, Tensor):
            memo[id(item)] = _own_tensor(item)
        elif isinstance(item, torch.Generator):
            memo[id(item)] = item.clone_state()
        elif isinstance(item, types.FunctionType):
            memo[id(item)] = _twin_function(item)
        elif isinstance(item, weakref.ref):
            target, function = target_of(cast("weakref.ref[Any]", item))
            if id(target) in memo:
                new = memo[id(target)]
                memo[id(cast("Any", item))] = (
                    weakref.ref(new) if function is None else weakref.WeakMethod(types.MethodType(function, new))
                )
        else:
            memo[id(item)] = item  # a sentinel, which is compared by identity
    for part in modules:
        shell = memo[id(part)]
        for key, value in part.__dict__.items():
            shell.__dict__[key] = _copy_value(value, memo)
        for key, value in slot_values(part):
            object.__setattr__(shell, key, _copy_value(value, memo))
    for function in functions:
        twin = memo[id(function)]
        twin.__dict__.update({key: _copy_value(value, memo) for key, value in function.__dict__.items()})
        for cell, new_cell in zip(function.__closure__ or (), twin.__closure__ or (), strict=True):
            if cell is not new_cell:
                new_cell.cell_contents = _copy_value(cell.cell_contents, memo)
        twin.__defaults__ = _copy_value(function.__defaults__, memo)
        twin.__kwdefaults__ = _copy_value(function.__kwdefaults__, memo)
    return cast("nn.Module", memo[id(module)])


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, ATOMIC):
        return value
    size = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # it holds something that exists once: a lock, a file, a process group
        _forget(memo, size)
    for item in walk(value, lambda item: id(item) not in memo):
        if not any(True for _ in children(item)) and not _copies(item):
            memo[id(item)] = item  # shared, and it alone
    size = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        _forget(memo, size)
        return _rebuilt(value, memo)


def _rebuilt(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a dict or a list of the user's own kind, which `copy` cannot make; anything else is shared."""
    kind: Any = next((kind for kind in (dict, list) if issubclass(type(value), kind)), None)
    if kind is None:
        return value
    new: Any = kind.__new__(type(value))
    memo[id(value)] = new
    if kind is dict:
        kind.update(new, {key: _copy_value(item, memo) for key, item in value.items()})
    else:
        kind.extend(new, [_copy_value(item, memo) for item in value])
    for key, item in getattr(value, "__dict__", {}).items():
        vars(new)[key] = _copy_value(item, memo)
    return new


def _forget(memo: dict[int, Any], size: int) -> None:
    """Remove the halves of objects that a failed copy has left in its memo."""
    while len(memo) > size:
        memo.popitem()


def _copies(item: Any) -> bool:
    try:
        copy.deepcopy(item)
    except Exception:
        return False
    return True


def _own_tensor(tensor: Tensor) -> Tensor:
    # One that needs a gradient is the user's own handle on it (a learned scale in a list): never a copy. A meta tensor
    # has no values to copy.
    return tensor if tensor.requires_grad or tensor.is_meta else tensor.detach().clone()


def target_of(reference: weakref.ref[Any]) -> tuple[Any, Any]:
    """What a weak reference leads to; of a method, the object and the function."""
    target = reference()
    if isinstance(target, types.MethodType):
        return target.__self__, target.__func__
    return target, None


def leads_back(copied: nn.Module, original: nn.Module, parts: Set[int] | None = None) -> str | None:
    """The attribute of a copy, if there is one, through which it uses the original, or a state that is not its own.

    `parts`, the numbers of the original's parts, if only these are asked for.

    A dict with tensors as keys is one, because other tensors will stand in the slots; a generator cannot be copied.
    """
    own = parts or {id(item) for item in reachable(original) if isinstance(item, nn.Module)}
    for prefix, part in named_parts(copied):
        for name, value in (*part.__dict__.items(), *slot_values(part)):
            for item in walk(value, lambda item: not isinstance(item, nn.Module) or id(item) in own):
                target = target_of(cast("Any", item))[0] if isinstance(item, weakref.ref) else item
                keyed = isinstance(item, dict) and any(isinstance(key, Tensor) for key in cast("Any", item))
                if id(target) in own or (parts is None and (keyed or isinstance(item, types.GeneratorType))):
                    return f"{prefix}.{name}" if prefix else name
    return None


# What a module holds -----------------------------------------------------------------------------------------------

_PYTHON = (bool, int, float, complex, str, bytes, range, slice, type, type(None))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
ATOMIC: tuple[type, ...] = (*_PYTHON, *_TORCH, types.ModuleType, types.BuiltinFunctionType)
"""Types whose values never change, and hold nothing that does."""


_EMPTY: dict[Any, Any] = {}
_VIEWS: tuple[type, ...] = (type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items()))


def slot_values(item: object) -> Iterator[tuple[str, Any]]:
    """The values in ``__slots__``, which ``__dict__`` does not show."""
    for cls in type(item).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                yield name, getattr(item, name)


def children(item: Any) -> Iterator[Any]:
    """The objects that `item` holds directly, as far as a module's behaviour can depend on them."""
    yield from _contents(item)
    if not isinstance(item, (Tensor, types.FunctionType)):
        yield from getattr(item, "__dict__", {}).values()
        yield from (value for _, value in slot_values(item))


def _contents(item: Any) -> Iterator[Any]:
    if isinstance(item, (dict, types.MappingProxyType)):
        yield from cast("dict[Any, Any]", item).keys()
        yield from cast("dict[Any, Any]", item).values()
    elif isinstance(item, (list, tuple, set, frozenset, deque, *_VIEWS)):
        yield from cast("list[Any]", item)
    elif isinstance(item, functools.partial):
        part = cast("functools.partial[Any]", item)
        yield from (part.func, part.args, part.keywords)
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, types.FunctionType):
        for cell in item.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a cell that is still empty
                continue
        yield from (item.__defaults__ or (), item.__kwdefaults__ or {}, *item.__dict__.values())


def walk(root: Any, enter: Callable[[Any], bool]) -> Iterator[Any]:
    """Everything that `root` holds, itself first, each object once; what `enter` refuses is left out."""
    stack, seen = [root], dict[int, Any]()
    while stack:
        item = stack.pop()
        if type(item) in weakref.ProxyTypes:
            raise ModuleError(
                "the module holds a `weakref.proxy`, which cannot be copied; hold a `weakref.ref` instead"
            )
        if isinstance(item, ATOMIC) or id(item) in seen or not enter(item):
            continue
        seen[id(item)] = item
        yield item
        stack.extend(children(item))


def reachable(module: nn.Module) -> Iterator[Any]:
    """Every module, tensor, generator, weak reference and sentinel in `module`, and functions that close over one."""
    order = list(walk(module, lambda item: True))
    kinds: Any = (nn.Module, Tensor, torch.Generator, weakref.ref)
    targets = {id(item) for item in order if isinstance(item, kinds)}
    for item in order:
        if (
            id(item) in targets
            or type(item) is object
            or (isinstance(item, types.FunctionType) and _closes_over(item, targets))
        ):
            yield item


def _closes_over(function: types.FunctionType, targets: set[int]) -> bool:
    return any(id(item) in targets for item in walk(function, lambda item: True))


def _twin_function(function: types.FunctionType) -> types.FunctionType:
    """A function with the same code and, where it closes over anything, cells of its own (filled later)."""
    closure = tuple(_twin_cell(cell) for cell in function.__closure__ or ())
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure or None)
    twin.__dict__.update(function.__dict__)
    twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return twin


def _twin_cell(cell: types.CellType) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:
        return cell
    return cell if isinstance(content, ATOMIC) else types.CellType()
