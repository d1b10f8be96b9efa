"""What the Python code behind a module can do: the names that it mentions, and whether it only reads the module."""

from __future__ import annotations

import contextlib
import dis
import functools
import math
import types
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._structure import ATOMIC, named_parts

__all__: list[str] = []

_MOST = 1000
"""So many functions are looked at; nothing is known of a module with more."""


def is_torchs(kind: type) -> bool:
    """Whether a class is one of torch's own modules."""
    return kind.__module__.startswith("torch.nn.modules.") or kind in (nn.Module, object)


def own_classes(module: nn.Module) -> set[type]:
    """The classes of a module's parts that are not torch's."""
    return {kind for _, part in named_parts(module) for kind in type(part).__mro__ if not is_torchs(kind)}


def only_reads(module: nn.Module) -> bool:
    """Whether no code of one's own in a module's forward can change the module, or see what stands in its slots.

    It binds nothing but local names, and calls nothing but torch's functions, its own methods, the parts of the
    module and what else only reads. What it may still do is write into a tensor, or hand out a part. Where code is
    not of this simple kind the answer is no: it may be harmless all the same.
    """
    methods: dict[str, list[Any]] = {}
    todo: list[Any] = []
    for kind in own_classes(module):
        if type(kind) is not type or not all(_is_plain_member(name, value) for name, value in vars(kind).items()):
            return False
        for name, value in vars(kind).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                methods.setdefault(name, []).append(value)
                if any(name in vars(base) for base in kind.__mro__ if is_torchs(base) and base is not nn.Module):
                    todo.append(value)  # torch's code may call it
    todo += methods.get("forward", ())
    seen = set[int]()
    while todo:
        function = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if len(seen) > _MOST or not isinstance(function, types.FunctionType):
            return False
        names = _names_read(function)
        if names is None:
            return False
        attributes, found = names
        for name in attributes:
            if name in methods:
                todo += methods[name]
            elif name.startswith("_") or name in _FORBIDDEN or _leads_elsewhere(name):
                return False
        for value in found:
            if isinstance(value, types.FunctionType) and not _is_torchs_function(value):
                todo.append(value)
            elif not _is_harmless(value):
                return False
    return True


def _is_plain_member(name: str, value: Any) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return name in _HARMLESS_DUNDERS
    if name.startswith("_") and hasattr(nn.Module, name):
        return False
    return isinstance(value, types.FunctionType) or is_inert(value)


def is_inert(value: Any) -> bool:
    """Whether a value is fixed, and nothing that can be called but an operation on tensors."""
    if isinstance(value, (list, tuple)):
        return all(map(is_inert, cast("Any", value)))
    return _is_torchs_function(value) or (isinstance(value, ATOMIC) and not isinstance(value, _LIVE))


_LIVE = (type, types.ModuleType, types.BuiltinFunctionType)
_HARMLESS_DUNDERS = frozenset(
    {"__init__", "__constants__", "__module__", "__doc__", "__dict__", "__weakref__"}
    | {"__annotations__", "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__"}
)


def _names_read(function: types.FunctionType) -> tuple[set[str], list[Any]] | None:
    """The names of attributes that a function mentions, and the globals; None where it does more than read."""
    if function.__code__.co_freevars not in ((), ("__class__",)) or function.__dict__:
        return None
    if not all(
        isinstance(v, ATOMIC) for v in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    ):
        return None
    attributes, found = set[str](), list[Any]()
    for step in dis.get_instructions(function):
        name = step.opname
        if name.startswith(_MORE) and not name.startswith(("STORE_FAST", "DELETE_FAST")):
            return None
        if name == "LOAD_GLOBAL":
            found.append(_global(function, step.argval))
        elif step.opcode in dis.hasname:
            attributes.add(step.argval)
    return attributes, found


_MORE = ("STORE_", "DELETE_", "MAKE_", "IMPORT_", "YIELD", "SEND", "RETURN_GENERATOR", "LOAD_CLOSURE", "LOAD_NAME")


def _global(function: types.FunctionType, name: str) -> Any:
    missing: Any = object()
    found = function.__globals__.get(name, missing)
    return getattr(_builtins, name, missing) if found is missing else found


_builtins: Any = __import__("builtins")
_SAFE = (abs, all, any, bool, dict, divmod, enumerate, float, int, isinstance, len, list, max, min, range)
_HARMLESS = {id(v) for v in (*_SAFE, reversed, round, sorted, sum, super, tuple, zip, torch, nn, F, math, Tensor)}
_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError)


def _is_harmless(value: Any) -> bool:
    if id(value) in _HARMLESS or (isinstance(value, type) and issubclass(value, (*_ERRORS, ValueError))):
        return True
    return is_inert(value)


def _is_torchs_function(value: Any) -> bool:
    """Whether it is an operation on tensors: in Python, or in C."""
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return False
    return any(getattr(place, value.__name__, None) is value for place in (F, torch))


def _leads_elsewhere(name: str) -> bool:
    """Whether it is the name of a part of torch that holds more than operations on tensors."""
    return any(isinstance(getattr(place, name, None), types.ModuleType) for place in (torch, nn)) and name not in (
        "nn",
        "functional",
        "special",
        "linalg",
        "fft",
    )


_CONTAINERS: tuple[type, ...] = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_FORBIDDEN = frozenset(
    {name for kind in (*_CONTAINERS, list, dict, set) for name in dir(kind)}
    - {"forward", "training", "items", "keys", "values", "get", "index", "count"}
    | {"Parameter", "Buffer", "compile", "vmap", "data", "numpy", "register_hook", "retain_grad", "grad", "grad_fn"}
    | {"register_post_accumulate_grad_hook", "untyped_storage", "storage", "backward", "set_", "f_globals"}
)
"""Names of attributes that change a module or a container, or see more of a tensor than its values."""


# Names -------------------------------------------------------------------------------------------------------------


def mentioned(module: nn.Module) -> set[str] | None:
    """All names that the code of one's own behind a module mentions, functions that it calls by name included.

    None where there is too much of it.
    """
    todo: list[Any] = [*own_classes(module)]
    for _, part in named_parts(module):
        todo += part.__dict__.values()
    names, seen = set[str](), dict[int, Any]()
    while todo:
        item = todo.pop()
        if isinstance(item, (str, int, float, Tensor, nn.Module, type(None))) or id(item) in seen:
            continue
        seen[id(item)] = item
        if len(seen) > 20 * _MOST:
            return None
        todo += _behind(item, names)
    return names


def _behind(item: Any, names: set[str]) -> Iterator[Any]:
    if isinstance(item, types.MethodType):
        yield item.__func__
    elif isinstance(item, types.FunctionType):
        if (item.__module__ or "").partition(".")[0] not in ("torch", __name__.partition(".")[0]):
            yield from (cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType())
            yield from (item.__defaults__, item.__kwdefaults__, *vars(item).values())
            yield from _behind_code(item.__code__, item.__globals__, names)
        else:
            names.add(item.__name__)
    elif isinstance(item, types.BuiltinFunctionType):
        names.add(item.__name__)
    elif isinstance(item, type):
        if not is_torchs(item) and item.__module__.partition(".")[0] not in ("torch", "builtins"):
            yield from item.__mro__[1:]
            yield from vars(item).values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from cast("Any", item)
    elif isinstance(item, dict):
        yield from cast("Any", item).values()
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, property):
        yield from (item.fget, item.fset)
    elif isinstance(item, (staticmethod, classmethod)):
        yield cast("Any", item).__func__
    elif not isinstance(item, (types.ModuleType, *ATOMIC)):
        yield type(item)
        with contextlib.suppress(AttributeError):
            yield object.__getattribute__(item, "__dict__")


def _behind_code(code: types.CodeType, globals_: dict[str, Any], names: set[str]) -> Iterator[Any]:
    names.update(code.co_names)
    places = [globals_[name] for name in code.co_names if name in globals_]
    yield from places
    for place in places:  # a function of another file, by the name of the file
        if isinstance(place, types.ModuleType) and place.__name__.partition(".")[0] != "torch":
            yield from (vars(place).get(name) for name in code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _behind_code(constant, globals_, names)
        elif isinstance(constant, str):
            names.add(constant)
