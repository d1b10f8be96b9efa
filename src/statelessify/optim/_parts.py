"""What an optimizer of torch consists of: taken apart, copied, put together again."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._tree import same_static, tree_map
from ..errors import OptimizerError

__all__: list[str] = []

_UNKEYED = "(state)"  # entries of an optimizer's state that belong to no parameter
_COMMON = frozenset(
    {"state", "param_groups", "_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured", "_opt_called"}
)


class Options(NamedTuple):
    names: list[str]
    options: dict[str, Any]


class Parts(NamedTuple):
    """What an optimizer consists of: groups, states by parameter, and its other attributes."""

    groups: list[Options]
    states: dict[str, dict[str, Any]]
    rest: dict[str, Any]


@dataclass(frozen=True)
class Partition:
    """Which parameters stand in one group; no tree."""

    groups: tuple[tuple[str, ...], ...]


def assembled(
    cls: type[torch.optim.Optimizer],
    groups: list[Options],
    own: dict[str, Tensor],
    columns: dict[str, dict[str, Any]],
    attributes: dict[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer of these parts, made without its constructor."""
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for name, leaf in own.items():
        if entries := {slot: copied(column[name]) for slot, column in columns.items() if name in column}:
            state[leaf] = entries
    attributes = dict(attributes)
    cast("dict[Any, Any]", state).update(attributes.pop(_UNKEYED, {}))
    live = [{"params": [own[name] for name in group.names], **group.options} for group in groups]
    optimizer = cls.__new__(cls)
    torch.optim.Optimizer.__setstate__(optimizer, {**attributes, "state": state, "param_groups": live})
    return optimizer


def put_rest_(optimizer: torch.optim.Optimizer, attributes: dict[str, Any]) -> None:
    """Write what stands in an optimizer beside its groups and the states of its parameters."""
    cast("dict[Any, Any]", optimizer.state).update(attributes.pop(_UNKEYED, {}))
    vars(optimizer).update(attributes)


def taken_apart(optimizer: torch.optim.Optimizer, named: dict[int, str]) -> Parts:
    rest = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in _COMMON and not key.startswith("_optimizer_") and not hasattr(value, "_wrapped_by_lr_sched")
    }
    ids = {*named, id(optimizer)}
    for key, value in rest.items():
        if _leads_to(value, lambda each: isinstance(each, torch.optim.Optimizer) and each is not optimizer):
            raise OptimizerError(
                f"{type(optimizer).__name__} wraps another optimizer (`{key}`), whose parameters are not substituted; "
                "make a pure one of the inner optimizer, and an `optim.Optimizer` around it"
            )
        if _leads_to(value, lambda each: id(each) in ids or (type(each) is int and each in ids)):
            raise OptimizerError(
                f"{type(optimizer).__name__} leads to itself or to its parameters through its attribute `{key}`, which "
                "a copy would share with it; use a rule of `statelessify.optim`"
            )
    groups = [
        Options(
            [named[id(p)] for p in group["params"]],
            {key: value for key, value in group.items() if key not in ("params", "param_names")},
        )
        for group in optimizer.param_groups
    ]
    states = {named[id(p)]: dict(own) for p, own in optimizer.state.items() if id(p) in named}
    if unkeyed := {p: own for p, own in cast("Any", optimizer.state).items() if id(p) not in named}:
        rest[_UNKEYED] = unkeyed
    return Parts(groups, states, rest)


def _leads_to(value: Any, is_it: Callable[[Any], bool], depth: int = 4) -> bool:
    """Whether this is such an object, or a container, a bound method, a closure or an object that holds one."""
    if is_it(value):
        return True
    if depth == 0 or isinstance(value, (Tensor, type)):
        return False
    inside: list[Any] = []
    if isinstance(value, Mapping):
        inside = [each for pair in cast("Mapping[Any, Any]", value).items() for each in pair]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(cast("Iterable[Any]", value))
    elif callable(value):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        inside = [getattr(value, "__self__", None), *cells]
    elif hasattr(value, "__dict__"):
        inside = [*vars(value).values()]  # pyright: ignore[reportUnknownArgumentType]
    return any(_leads_to(each, is_it, depth - 1) for each in inside)


def columns_of(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Slots by name, from states by parameter."""
    columns: dict[str, dict[str, Any]] = {}
    for name, own in states.items():
        for slot, value in own.items():
            columns.setdefault(slot, {})[name] = value
    return columns


def joined(groups: list[Options], params: dict[str, Tensor]) -> dict[str, Any]:
    """The options of all groups: one value where they agree, else one for each parameter."""
    columns: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(key for group in groups for key in group.options):
        boxed = [(group.names, _boxed(group.options.get(key, _ABSENT))) for group in groups]
        columns[key] = {name: value for names, value in boxed for name in names if name in params}
    found: dict[str, Any] = {}
    for key, column in columns.items():
        first = next(iter(column.values()), None)
        agree = all(same_static(value, first) for value in column.values())
        found[key] = first if agree and len(column) == len(params) else column
    return found


_ABSENT = "(absent)"  # an option that some groups do not have


@dataclass
class _Box:
    """A dict that an optimizer keeps in a group; a dict alone is one value for each parameter."""

    value: dict[Any, Any]


def _boxed(value: Any) -> Any:
    return _Box(cast("dict[Any, Any]", value)) if isinstance(value, dict) else value


def unboxed(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as its optimizer keeps them."""
    found = {key: value.value if isinstance(value, _Box) else value for key, value in options.items()}
    return {key: value for key, value in found.items() if not (isinstance(value, str) and value == _ABSENT)}


def alike(names: Iterable[str], values: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The parameters of a group by their hyperparameters: each kind is a group of its own."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(id(values[name]), []).append(name)
    return list(found.values())


def copied(tree: Any) -> Any:
    """Containers, tensors and other objects anew."""
    return tree_map(_own_copy, tree)


def _own_copy(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    try:
        return copy.deepcopy(leaf)
    except (RuntimeError, TypeError) as error:  # a tensor inside has a graph, or the object has no copy
        raise OptimizerError(
            f"the optimizer keeps a {type(leaf).__name__} that has no copy, so that steps would share it: {error}"
        ) from error


def changed_options(after: Options, before: Options, original: dict[str, Any]) -> Options:
    """The group with the options only that its optimizer has changed, which may have written into the copies."""
    original = unboxed(original)

    def untouched(key: str, value: Any) -> bool:
        if isinstance(value, Tensor):
            return value is before.options.get(key) and value._version == 0
        return key in original and same_static(value, original[key])

    return Options(after.names, {key: value for key, value in after.options.items() if not untouched(key, value)})
