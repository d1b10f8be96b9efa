"""Options of strategies, refused at draw time with a text that says what to write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from hypothesis.errors import InvalidArgument

from ..._words import listed, nearest

__all__: list[str] = []


def require(condition: bool, text: str) -> None:
    """Refuse an option.

    Raises:
        InvalidArgument: the condition does not hold.
    """
    if not condition:
        raise InvalidArgument(text)


def chosen(option: str, names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """The names that an option leaves, in the order of `known`; all of them for None."""
    all_names = list(known)
    if names is None:
        return all_names
    require(
        isinstance(cast("Any", names), (tuple, list, set, frozenset)),
        f"`{option}={names!r}` is {type(names).__name__}; write a tuple of names, as in `{option}=({all_names[0]!r},)`",
    )
    wanted = list(names)
    for name in wanted:
        require(
            name in all_names,
            f"`{option}` names `{name}`, which there is not{nearest(str(name), all_names)}; there are "
            f"{listed(all_names)}",
        )
    require(bool(wanted), f"`{option}` is empty, so that nothing can be drawn; there are {listed(all_names)}")
    return [name for name in all_names if name in wanted]


def one_of(option: str, value: Any, known: Iterable[str]) -> None:
    """Refuse what is neither None nor one of these words."""
    words = list(known)
    text = f"`{option}={value!r}`; write one of {', '.join(map(repr, words))}, or None for all of them"
    require(value is None or value in words, text)


def count(option: str, value: Any, least: int = 1) -> None:
    """Refuse what is neither None nor a number from `least` on."""
    legal = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
    require(legal, f"`{option}={value!r}`; write a whole number from {least} on, or None for any")


def shape(option: str, value: Any, least: int = 0) -> None:
    """Refuse what is neither None nor a tuple of sizes."""
    sizes = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (None,)
    legal = all(isinstance(size, int) and size >= least for size in sizes)
    require(
        value is None or legal,
        f"`{option}={value!r}` is no shape; write a tuple of sizes from {least} on, as in `{option}=(2, 3)`, or None",
    )


def floating(option: str, dtype: Any) -> None:
    """Refuse what is neither None nor a real floating-point dtype."""
    legal = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    require(legal, f"`{option}={dtype!r}`; write a floating-point dtype, as in `{option}=torch.float64`, or None")
