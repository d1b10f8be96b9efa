"""A structural copy of a module: everything that its behaviour depends on, but its tensors."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__: list[str] = []


def is_uninitialized(tensor: Any) -> bool:
    """Whether a lazy module's tensor has no shape yet."""
    return torch.nn.parameter.is_lazy(tensor)


def named_parts(module: nn.Module, twice: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules()``; `twice` also gives the further paths to a module that has several."""
    yield from cast("Any", module.named_modules(remove_duplicate=not twice))


def placeholder(tensor: Tensor) -> Tensor:
    """What stands in a slot between calls: shape and dtype but no values, so that late use raises instead of lying."""
    empty = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def copy_structure(module: nn.Module, emptied: Iterable[Tensor] = ()) -> nn.Module:
    """Copy a module and all Python state that belongs to it.

    `emptied` are replaced by placeholders wherever they stand; other tensors get own storage.

    `copy.deepcopy` alone would copy the weights, fail on non-leaf tensors and generators, and leave lambdas, closures
    and hooks pointing at the original module: so the memo is filled beforehand with what must not be left to it.
    """
    memo: dict[int, Any] = {}
    keep: list[Any] = [memo]  # objects whose id stands in the memo must stay alive
    for tensor in emptied:
        memo[id(tensor)] = placeholder(tensor)
    found = list(_reachable(module))
    keep.append(found)
    modules = [item for item in found if isinstance(item, nn.Module)]
    for part in modules:
        memo[id(part)] = object.__new__(type(part))
    functions: list[tuple[types.FunctionType, types.FunctionType]] = []
    for item in found:
        if isinstance(item, Tensor):
            memo.setdefault(id(item), _own_tensor(item))
        elif isinstance(item, torch.Generator):
            memo[id(item)] = item.clone_state()
        elif isinstance(item, types.FunctionType):
            twin = _twin_function(item)
            memo[id(item)] = twin
            functions.append((item, twin))
    for part in modules:
        shell = memo[id(part)]
        for key, value in part.__dict__.items():
            shell.__dict__[key] = _copy_value(value, memo)
        for key, value in slot_values(part):
            object.__setattr__(shell, key, _copy_value(value, memo))
    for original, twin in functions:
        for cell, new_cell in zip(original.__closure__ or (), twin.__closure__ or (), strict=True):
            if cell is not new_cell:
                new_cell.cell_contents = _copy_value(cell.cell_contents, memo)
        if original.__defaults__:
            twin.__defaults__ = _copy_value(original.__defaults__, memo)
        if original.__kwdefaults__:
            twin.__kwdefaults__ = _copy_value(original.__kwdefaults__, memo)
    return cast("nn.Module", memo[id(module)])


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, files, process groups: things that exist once and are shared as they are
        return value


def _own_tensor(tensor: Tensor) -> Tensor:
    # One that needs a gradient is the user's own handle on it (a learned scale in a list): never a copy.
    return tensor if tensor.requires_grad else tensor.detach().clone()


def slot_values(item: object) -> Iterator[tuple[str, Any]]:
    """The values in ``__slots__``, which ``__dict__`` does not show."""
    for cls in type(item).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                yield name, getattr(item, name)


_PYTHON = (bool, int, float, complex, str, bytes, range, slice, type, type(None), weakref.ref)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
ATOMIC: tuple[type, ...] = (*_PYTHON, *_TORCH, types.ModuleType, types.BuiltinFunctionType)


def children(item: Any) -> Iterator[Any]:
    """The objects that `item` holds directly, as far as a module's behaviour can depend on them."""
    yield from _contents(item)
    if not isinstance(item, (Tensor, types.FunctionType)):
        yield from getattr(item, "__dict__", {}).values()
        yield from (value for _, value in slot_values(item))


def _contents(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from cast("dict[Any, Any]", item).keys()
        yield from cast("dict[Any, Any]", item).values()
    elif isinstance(item, (list, tuple, set, frozenset, deque)):
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
        yield from (item.__defaults__ or (), item.__kwdefaults__ or {})


def _reachable(module: nn.Module) -> Iterator[Any]:
    """Every module, tensor and generator that `module` holds, and the functions that close over one of them."""
    seen: dict[int, Any] = {}
    order: list[Any] = []

    def visit(root: Any) -> None:
        stack = [root]
        while stack:
            item = stack.pop()
            if isinstance(item, ATOMIC) or id(item) in seen:
                continue
            seen[id(item)] = item
            order.append(item)
            stack.extend(children(item))

    visit(module)
    targets = {id(item) for item in order if isinstance(item, (nn.Module, Tensor, torch.Generator))}
    for item in order:
        if id(item) in targets or (isinstance(item, types.FunctionType) and _closes_over(item, targets)):
            yield item


def _closes_over(function: types.FunctionType, targets: set[int]) -> bool:
    stack, seen = list(children(function)), set[int]()
    while stack:
        item = stack.pop()
        if id(item) in targets:
            return True
        if isinstance(item, ATOMIC) or id(item) in seen:
            continue
        seen.add(id(item))
        stack.extend(children(item))
    return False


def _twin_function(function: types.FunctionType) -> types.FunctionType:
    """A function with the same code and, where it closes over anything, cells of its own (filled later)."""
    closure = tuple(_twin_cell(cell) for cell in function.__closure__ or ())
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure or None
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
    return twin


def _twin_cell(cell: types.CellType) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:
        return cell
    return cell if isinstance(content, ATOMIC) else types.CellType()
