"""The names and shapes of the tensors that a call has to give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._words import listed, nearest
from .errors import DtypeError, NamesError, ShapeError
from .typing import Buffers, Params

__all__: list[str] = []

_SHAPE = attrgetter("shape")
_ORDINARY = frozenset({Tensor, nn.Parameter})


class Expected:
    """What a module needs in its slots: a name may stand in `params` or in `buffers`, and each has its shape.

    A buffer that forward has been seen to give another shape may have any, one that it has emptied may be missing.
    """

    def __init__(self, module: str, shapes: Mapping[str, torch.Size], empty: Iterable[str]) -> None:
        self.module = module
        self.shapes = dict(shapes)
        self.empty = tuple(empty)
        self.resized: set[str] = set()
        self.emptied: set[str] = set()
        self._pick = _picker(tuple(self.shapes))
        self._in_order = list(self.shapes.values())
        self._none = (None,) * len(self.empty)

    def gather(self, params: Params, buffers: Buffers) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        """The tensors by name, and in the order of the slots' names; an error where they are not the right ones.

        What is right is seen in a few operations that run in C; only where they do not see it are names looked at one
        by one.
        """
        try:
            given: dict[str, Tensor] = {**params, **buffers}
            tensors = self._pick(given)
            if (
                len(given) == len(tensors) == len(params) + len(buffers)
                and _ORDINARY.issuperset(map(type, tensors))
                and [*map(_SHAPE, tensors)] == self._in_order
            ):
                return given, tensors + self._none
        except (KeyError, TypeError):
            pass
        self.check(params, buffers)
        given = {**params, **buffers}
        return given, tuple(given.get(name) for name in (*self.shapes, *self.empty))

    def check(self, params: Params, buffers: Buffers) -> None:
        """Every check with its error; says nothing where all is right."""
        for what, tree in (("params", params), ("buffers", buffers)):
            check_tensors(what, tree)
            for name, tensor in tree.items():
                shape = self.shapes.get(name)
                if shape is None and name not in self.empty:
                    raise NamesError(
                        f"`{what}` has the unknown name `{name}`{nearest(name, self.shapes)}; "
                        f"`{self.module}` has {listed(self.shapes)}"
                    )
                if shape is not None and tensor.shape != shape and name not in self.resized:
                    raise wrong_shape(what, name, tensor, shape)
        twice = [name for name in params if name in buffers]
        if twice:
            raise NamesError(f"{listed(twice)} stands in both `params` and `buffers`; give each name once")
        missing = [n for n in self.shapes if n not in params and n not in buffers and n not in self.emptied]
        if missing:
            raise NamesError(
                f"neither `params` nor `buffers` has {listed(missing)}; `{self.module}` needs every name in one of "
                "them (put partial dicts together with `combine`)"
            )

    def copy(self) -> Expected:
        """One of its own for another mode of the module."""
        new = Expected(self.module, self.shapes, self.empty)
        new.resized, new.emptied = set(self.resized), set(self.emptied)
        return new


def _picker(names: tuple[str, ...]) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]:
    """The values under some names as a tuple, which `itemgetter` gives from two names on."""
    return cast("Any", itemgetter(*names)) if len(names) > 1 else _Few(names)


class _Few:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(given[name] for name in self.names)


def check_tensors(what: str, tree: Any) -> None:
    """Refuse anything but a dict of tensors."""
    if not isinstance(tree, Mapping):
        raise DtypeError(f"`{what}` is {type(tree).__name__}, not a dict of tensors")
    for name, tensor in cast("Mapping[str, Any]", tree).items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"`{what}[{name!r}]` is {type(tensor).__name__}, not a tensor")


def wrong_shape(what: str, name: str, tensor: Tensor, shape: torch.Size) -> ShapeError:
    hint = "; map over tasks with `over_tasks` or torch.vmap" if tensor.shape[1:] == shape else ""
    return ShapeError(f"`{what}[{name!r}]` has shape {tuple(tensor.shape)}, but the module's is {tuple(shape)}{hint}")
