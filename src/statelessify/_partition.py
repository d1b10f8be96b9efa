"""`partition` and `combine`: dicts of tensors, split by name and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor

from ._words import listed, nearest
from .errors import NamesError, TreeError
from .typing import Tree

__all__ = ["combine", "partition"]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


# What `torch.compiler.assume_constant_result` sets, but without importing all of dynamo, which cannot trace `fnmatch`.
_matches._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def glob_matches(patterns: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The patterns that each name matches; a pattern that matches nothing is an error.

    An exact name is a pattern as well, also where it holds characters that mean something in a glob.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for pattern in patterns:
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NamesError(f"`{pattern!r}` is not a name or a glob; write a string such as 'head.*'")
        hits = [name for name in names if _matches(name, pattern)]
        if not hits:
            raise NamesError(f"`{pattern}` matches no name{nearest(pattern, names)}; the names are {listed(names)}")
        for name in hits:
            found[name].append(pattern)
    return found


def partition(
    params: Tree, select: str | Iterable[str] | Callable[[str, Tensor], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a dict of tensors in two by name: what an inner loop adapts, and what it does not.

    Args:
        params: a dict of tensors, or of dicts of tensors.
        select: globs over dotted names (``"head.*"``, or several of them), or a predicate ``(name, tensor)``.

    Returns:
        ``(selected, rest)``: two dicts with the same tensors, in their order; `combine` undoes it.

    Raises:
        NamesError: a glob matches nothing.
        TreeError: `params` nests something other than dicts.

    Example:
        >>> from statelessify import partition
        >>> head, body = partition({"body.w": torch.ones(1), "head.w": torch.ones(2)}, "head.*")
        >>> list(head), list(body)
        (['head.w'], ['body.w'])
    """
    flat = dict(_walk_dict(params, ""))
    if callable(select):
        chosen = {name for name, leaf in flat.items() if select(name, leaf)}
    else:
        patterns = [select] if isinstance(select, str) else list(select)
        chosen = {name for name, hits in glob_matches(patterns, list(flat)).items() if hits}
    return _filter_dict(params, "", chosen, True), _filter_dict(params, "", chosen, False)


def _walk_dict(node: Any, prefix: str) -> Iterable[tuple[str, Any]]:
    if not isinstance(node, dict):
        raise TreeError(f"`partition` and `combine` take dicts of tensors, not {type(node).__name__}")
    for key, value in cast("dict[Any, Any]", node).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from _walk_dict(value, f"{prefix}{key}.")


def _filter_dict(node: dict[Any, Any], prefix: str, chosen: set[str], keep: bool) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    for key, value in node.items():
        if isinstance(value, Tensor):
            if (f"{prefix}{key}" in chosen) is keep:
                kept[key] = value
        elif below := _filter_dict(value, f"{prefix}{key}.", chosen, keep):
            kept[key] = below
    return kept


def combine(*trees: Tree) -> dict[str, Any]:
    """Put dicts of tensors with different names together again: what `partition` has split.

    Raises:
        NamesError: two of them hold the same name.

    Example:
        >>> from statelessify import combine
        >>> sorted(combine({"a": torch.ones(1)}, {"b": torch.ones(1)}))
        ['a', 'b']
    """
    combined: dict[str, Any] = {}
    for tree in trees:
        list(_walk_dict(tree, ""))  # refuses anything but dicts of tensors
        _merge_into(combined, tree, "")
    return combined


def _merge_into(target: dict[Any, Any], source: dict[Any, Any], prefix: str) -> None:
    for key, value in source.items():
        if key not in target:
            target[key] = value if isinstance(value, Tensor) else dict(value)
        elif isinstance(value, Tensor) or isinstance(target[key], Tensor):
            raise NamesError(f"`{prefix}{key}` stands in more than one of the trees; give each name once")
        else:
            target[key] = dict(target[key])
            _merge_into(target[key], value, f"{prefix}{key}.")
