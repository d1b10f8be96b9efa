"""`unmutated`: a module is after a block of code what it was before."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._structure import ATOMIC
from .._words import listed
from ..errors import ModuleError
from ._close import worst
from ._paste import entry

__all__ = ["unmutated"]

MISSING = object()
TABLES = {"_parameters", "_buffers", "_modules"}


class Seen(NamedTuple):
    """What a name of a module stood for.

    Attributes:
        value: the object, held so that no other can be taken for it.
        copy: of a tensor, its values; of a container or a plain value, what it prints.
        requires_grad: of a tensor.
    """

    value: Any
    copy: Any
    requires_grad: bool


class Watch:
    """What a module was, to compare with what it is: tensors by value and identity, modes, attributes, submodules."""

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(cast("Any", module), nn.Module):
            raise ModuleError(f"`unmutated` watches modules, and was given {type(module).__name__}")
        self.module = module
        self._before = {name: _seen(value) for name, value in _named(module)}

    def changes(self) -> list[str]:
        """One line for each name that stands for something else now."""
        now = dict(_named(self.module))
        lines = [f"`{name}` is gone" for name in _topmost(self._before.keys() - now.keys())]
        lines += [f"`{name}` is new: {_short(now[name])}" for name in _topmost(now.keys() - self._before.keys())]
        for name, before in self._before.items():
            change = _change(before, now.get(name, MISSING))
            if change:
                lines.append(f"`{name}` {change}")
        return sorted(lines)

    def check(self) -> None:
        """Raise an AssertionError that names what has changed."""
        changes = self.changes()
        if changes:
            more = f"\n  and {len(changes) - 8} more" if len(changes) > 8 else ""
            shown = "\n  ".join(changes[:8])
            raise AssertionError(f"the {type(self.module).__name__} was changed:\n  {shown}{more}")


@contextmanager
def unmutated(*modules: nn.Module) -> Generator[None]:
    """Assert that a block of code leaves modules as they are.

    Compared are the names, identities, values and ``requires_grad`` of parameters and buffers, the mode of each
    submodule, and all attributes. ``.grad`` may change.

    Args:
        modules: the modules to watch.

    Raises:
        AssertionError: one was changed. It names the tensor or attribute, and for values the worst entry.
        ModuleError: something that is not a module.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> with unmutated(model):
        ...     model.eval()
        Traceback (most recent call last):
        ...
        AssertionError: the Linear was changed:
          `training` was True, is False
    """
    watches = [Watch(module) for module in modules]
    yield
    for watch in watches:
        watch.check()


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """All that the parts of a module hold, by dotted name."""
    for path, part in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        prefix = f"{path}." if path else ""
        own = {name: value for name, value in vars(part).items() if name not in TABLES}
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, part._modules, own)
        yield from ((prefix + name, value) for table in tables for name, value in table.items())


def _topmost(names: Iterable[str]) -> list[str]:
    """Without what lies in a submodule that is itself among the names."""
    names = set(names)
    parents = {name: {name[:i] for i, letter in enumerate(name) if letter == "."} for name in names}
    return [name for name in names if not parents[name] & names]


def _seen(value: Any) -> Seen:
    if isinstance(value, Tensor):
        plain = not is_lazy(value)
        return Seen(value, value.detach().clone() if plain else None, value.requires_grad)
    return Seen(value, _print(value), False)


def _print(value: Any) -> Any:
    """What can be compared later of a value that may change in place."""
    if isinstance(value, Tensor):
        return (id(value), value.detach().clone())
    if isinstance(value, dict):
        return [(key, _print(item)) for key, item in cast("dict[Any, Any]", value).items()]
    if isinstance(value, (list, tuple)):
        return [_print(item) for item in cast("list[Any]", value)]
    return repr(value) if isinstance(value, (*ATOMIC, set, frozenset)) else id(value)


def _alike(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return _same_values(before, now)
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        ours, theirs = cast("list[Any]", before), cast("list[Any]", now)
        return len(ours) == len(theirs) and all(_alike(a, b) for a, b in zip(ours, theirs, strict=True))
    return type(cast("Any", before)) is type(now) and before == now


def _same_values(before: Tensor, now: Tensor) -> bool:
    if before.shape != now.shape or before.dtype != now.dtype:
        return False
    return torch.equal(torch.nan_to_num(before), torch.nan_to_num(now)) and torch.equal(before.isnan(), now.isnan())


def _change(before: Seen, now: Any) -> str | None:
    if now is MISSING:
        return None  # said already
    if isinstance(before.value, Tensor) and isinstance(now, Tensor):
        if before.copy is not None and now.shape != before.copy.shape:
            return f"had shape {tuple(before.copy.shape)}, has {tuple(now.shape)}"
        copy = cast("Tensor | None", before.copy)
        found = None if copy is None else worst(now, copy, 0.0, 0.0, equal_nan=True)
        if copy is not None and found is not None:
            was, is_now = entry(copy, found.at), entry(now.detach(), found.at)
            where = f"at {list(found.at)} " if found.at else ""
            return f"{where}was {was}, is {is_now} ({found.outside} of {now.numel()} entries changed)"
        if now.requires_grad != before.requires_grad:
            return f"had requires_grad={before.requires_grad}, has {now.requires_grad}"
        return None if now is before.value else "is another tensor with the same values"
    if isinstance(now, ATOMIC) and isinstance(before.value, ATOMIC):
        return (
            None
            if now is before.value or _alike(before.copy, _print(now))
            else (f"was {_short(before.value)}, is {_short(now)}")
        )
    if now is not before.value:
        return f"was {_short(before.value)}, is another: {_short(now)}"
    return None if _alike(before.copy, _print(now)) else f"was changed in place, is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with {listed(map(str, cast('dict[Any, Any]', value)))}"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} object"
