"""Hyperparameters: numbers, tensors, dicts by name, schedules, and one value per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._partition import glob_matches
from .._tree import tree_leaves
from .._words import listed, nearest
from ..errors import HyperparameterError, HyperparameterNameError, NamesError

__all__: list[str] = []


class PerTask:
    """A tree of tensors ``(tasks, ...)``; made by `per_task`, read by `adapt_tasks`."""

    __slots__ = ("tree",)

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __repr__(self) -> str:
        return f"per_task({self.tree!r})"


def per_task(tree: Any) -> Any:
    """Mark a hyperparameter as having one value per task; it is never guessed from a shape.

    Args:
        tree: a tensor ``(tasks,)``, or a dict from names or globs to tensors ``(tasks, ...)``, where ``...`` broadcasts
            to the parameter.

    Raises:
        HyperparameterError: a leaf is not a tensor with a task dimension.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.sgd(lr=optim.per_task(torch.tensor([0.1, 0.2])))
    """
    leaves = tree_leaves(tree)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise HyperparameterError(
                f"`per_task` takes tensors (tasks, ...), not {shape}; write a value that all tasks share without it"
            )
    if not leaves:
        raise HyperparameterError("`per_task` was given nothing; write `per_task(torch.tensor([...]))`")
    return PerTask(tree)


class Range(NamedTuple):
    """The values that a number may have, from `low` to `high`; `ends` says which of these belong to it."""

    low: float = 0.0
    high: float = math.inf
    ends: str = "[)"
    optional: bool = False

    def check(self, name: str, value: Any) -> None:
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise HyperparameterError(
                f"`{name}={value!r}` is {type(value).__name__}; write a number, a tensor, a dict from names or globs "
                "to these, a callable of the step, or `optim.per_task(...)`"
            )
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        if not (math.isfinite(value) and above and below):
            bounds = [
                *([f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"] if self.low > -math.inf else []),
                *([f"{'at most' if self.ends[1] == ']' else 'below'} {self.high}"] if self.high < math.inf else []),
            ]
            words = ", ".join(["finite", " and ".join(bounds)] if bounds else ["finite"])
            raise HyperparameterError(f"`{name}={value!r}` is out of range: it must be {words}")


Ranges = Range | tuple[Range, ...]
"""The range of a hyperparameter, or one for each number of a pair."""


BETAS = (Range(high=1.0), Range(high=1.0))


def is_on(switch: Any) -> bool:
    return switch is True


def is_nonzero(value: Any) -> bool:
    """Whether a value other than a container may be something else than zero."""
    return not isinstance(value, dict) and not (isinstance(value, (int, float)) and value == 0)


def refuse_unknown(kind: str, unknown: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse keyword arguments that the optimizer does not have."""
    for name in unknown:
        if name in ("foreach", "fused", "capturable", "differentiable"):
            raise HyperparameterNameError(
                f"`{kind}` has no `{name}`: it chooses an implementation in torch, and every step here is out of place "
                "and differentiable; leave it out"
            )
        raise HyperparameterNameError(f"`{kind}` has no `{name}`{nearest(name, known)}; it has {listed(known)}")


def is_schedule(spec: Any) -> bool:
    return not isinstance(spec, (int, float, Tensor, dict, tuple, PerTask)) and callable(spec)


def check_ranges(name: str, spec: Any, ranges: Ranges) -> None:
    """Check the plain numbers in a specification; tensors and schedules cannot be checked without waiting for them."""
    if is_schedule(spec):
        return
    if isinstance(spec, PerTask):
        if not isinstance(ranges, Range):
            check_ranges(name, spec.tree, ranges)
    elif isinstance(spec, dict):
        for key, value in cast("dict[str, Any]", spec).items():
            if has(value, _is_dict):
                raise HyperparameterError(f"`{name}[{key!r}]` is a dict in a dict; write one, of names or globs")
            check_ranges(f"{name}[{key!r}]", value, ranges)
    elif not isinstance(ranges, Range):
        if not isinstance(spec, tuple) or len(cast("tuple[Any, ...]", spec)) != len(ranges):
            shown = f"a tensor of shape {tuple(spec.shape)}" if isinstance(spec, Tensor) else repr(cast("Any", spec))
            raise HyperparameterError(f"`{name}` is {shown}, not {len(ranges)} numbers; write `{name}=(..., ...)`")
        for index, (value, range_) in enumerate(zip(cast("tuple[Any, ...]", spec), ranges, strict=True)):
            check_ranges(f"{name}[{index}]", value, range_)
    elif isinstance(spec, Tensor):
        if spec.is_complex():
            raise HyperparameterError(f"`{name}` is a complex tensor ({spec.dtype}); write a real one")
    else:
        ranges.check(name, spec)


def check_flag(name: str, flag: Any) -> None:
    """A switch is a truth value, or one for each parameter."""
    values = cast("dict[str, Any]", flag).values() if isinstance(flag, dict) else (flag,)
    for value in values:
        if not isinstance(value, bool):
            raise HyperparameterError(
                f"`{name}={value!r}` is {type(value).__name__}; write True or False, or a dict from names or globs "
                "to these"
            )


def check_fits(
    name: str,
    spec: Any,
    names: Sequence[str],
    shapes: Sequence[torch.Size],
    whole: bool = False,
    tasks: bool = False,
) -> None:
    """Check that a specification has exactly one value for each parameter, of a shape that broadcasts to it.

    One number of the `whole` parameter it has to be where the rule does not use it entry by entry.
    """
    if whole:
        shapes = [torch.Size(())] * len(shapes)
    if isinstance(spec, PerTask):
        check_fits(name, spec.tree, names, shapes, tasks=True)
    elif isinstance(spec, dict):
        spec = cast("dict[str, Any]", spec)
        owners = one_key_each(name, spec, names)
        for key, value in spec.items():
            for parameter, shape in zip(names, shapes, strict=True):
                if owners[parameter] == key:
                    _check_value(f"{name}[{key!r}]", value, parameter, shape, tasks)
    elif isinstance(spec, tuple):
        for index, value in enumerate(cast("tuple[Any, ...]", spec)):
            check_fits(f"{name}[{index}]", value, names, shapes, tasks=tasks)
    elif isinstance(spec, Tensor) and spec.ndim - tasks != 0:
        raise HyperparameterError(
            f"`{name}` is a tensor of shape {tuple(spec.shape)}, but one value for all parameters is 0-dim; write a "
            'dict from names or globs to tensors (`{"*": ...}`), or `optim.per_task(...)` for one value per task'
        )


def _check_value(name: str, value: Any, parameter: str, shape: torch.Size, tasks: bool) -> None:
    if isinstance(value, PerTask):
        _check_value(name, value.tree, parameter, shape, True)
    elif isinstance(value, tuple):
        for each in cast("tuple[Any, ...]", value):
            _check_value(name, each, parameter, shape, tasks)
    elif isinstance(value, Tensor):
        own = value.shape[int(tasks) :]
        try:
            fits = cast("Any", torch.broadcast_shapes)(own, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise HyperparameterError(
                f"`{name}` has shape {tuple(own)}, which does not broadcast to parameter `{parameter}` of shape "
                f"{tuple(shape)}"
            )


def one_key_each(name: str, spec: dict[str, Any], names: Sequence[str]) -> dict[str, str]:
    """The one key of `spec` that stands for each parameter."""
    if spec.keys() == set(names):
        return {key: key for key in names}
    try:
        matches = glob_matches(spec, names)
    except NamesError as error:
        raise NamesError(f"in `{name}`: {error}") from None
    for parameter, keys in matches.items():
        if len(keys) != 1:
            what = f"is matched by {listed(keys)}" if keys else "is matched by no key"
            raise NamesError(
                f"in `{name}`: parameter `{parameter}` {what}; each parameter must be matched exactly once"
            )
    return {parameter: keys[0] for parameter, keys in matches.items()}


# Values at a step --------------------------------------------------------------------------------------------------


def has(spec: Any, kind: Callable[[Any], bool]) -> bool:
    """Whether a specification contains something of a kind."""
    if kind(spec):
        return True
    if isinstance(spec, dict):
        return any(has(value, kind) for value in cast("dict[str, Any]", spec).values())
    return isinstance(spec, tuple) and any(has(value, kind) for value in cast("tuple[Any, ...]", spec))


def at_step(spec: Any, step: Tensor) -> Any:
    """The specification with each callable replaced by what it returns at this step."""
    if is_schedule(spec):
        return at_step(spec(step), step)
    if isinstance(spec, dict):
        return {key: at_step(value, step) for key, value in cast("dict[str, Any]", spec).items()}
    if isinstance(spec, tuple):
        return tuple(at_step(value, step) for value in cast("tuple[Any, ...]", spec))
    return spec


def is_per_task(spec: Any) -> bool:
    return isinstance(spec, PerTask)


def by_parameter(specs: dict[str, Any], names: Callable[[], list[str]], count: int) -> list[dict[str, Any]]:
    """The values for each parameter; one and the same dict for those that share them."""
    if any(has(spec, is_per_task) for spec in specs.values()):
        raise HyperparameterError(
            "`optim.per_task` has a meaning for many tasks only; use `adapt_tasks`, or pass one value"
        )
    if not any(has(spec, _is_dict) for spec in specs.values()):
        return [specs] * count
    owners = {name: _owners(name, spec, names()) for name, spec in specs.items()}
    done: dict[str, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    for parameter in names():
        keys = str([_keys(owner, parameter) for owner in owners.values()])
        if keys not in done:
            done[keys] = {name: _pick(spec, owners[name], parameter) for name, spec in specs.items()}
        found.append(done[keys])
    return found


def _is_dict(spec: Any) -> bool:
    return isinstance(spec, dict)


def _owners(name: str, spec: Any, names: Sequence[str]) -> Any:
    """For each dict in a specification, the key that stands for each parameter."""
    if isinstance(spec, tuple):
        return tuple(_owners(name, value, names) for value in cast("tuple[Any, ...]", spec))
    return one_key_each(name, cast("dict[str, Any]", spec), names) if isinstance(spec, dict) else None


def _keys(owners: Any, parameter: str) -> Any:
    if isinstance(owners, tuple):
        return [_keys(each, parameter) for each in cast("tuple[Any, ...]", owners)]
    return None if owners is None else owners[parameter]


def _pick(spec: Any, owners: Any, parameter: str) -> Any:
    if isinstance(owners, tuple):
        return tuple(_pick(*pair, parameter) for pair in zip(spec, cast("tuple[Any, ...]", owners), strict=True))
    return spec if owners is None else spec[owners[parameter]]
