"""Hyperparameters: numbers, tensors, dicts by name, schedules, and one value per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
    """The values that a number may have: ``low <= value`` and, where `high` is finite, ``value < high``."""

    low: float = 0.0
    high: float = math.inf

    def check(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise HyperparameterError(
                f"`{name}={value!r}` is {type(value).__name__}; write a number, a tensor, a dict from names or globs "
                "to these, a callable of the step, or `optim.per_task(...)`"
            )
        if not (math.isfinite(value) and self.low <= value < self.high):
            upper = "" if math.isinf(self.high) else f" and below {self.high}"
            lower = "finite" if math.isinf(self.low) else f"finite, at least {self.low}"
            raise HyperparameterError(f"`{name}={value!r}` is out of range: it must be {lower}{upper}")


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


def check_ranges(name: str, spec: Any, range_: Range, pair: bool = False) -> None:
    """Check the plain numbers in a specification; tensors and schedules cannot be checked without waiting for them."""
    if is_schedule(spec):
        return
    if isinstance(spec, PerTask):
        if pair:
            check_ranges(name, spec.tree, range_, pair)
    elif isinstance(spec, dict):
        for key, value in cast("dict[str, Any]", spec).items():
            check_ranges(f"{name}[{key!r}]", value, range_, pair)
    elif pair:
        if not isinstance(spec, tuple) or len(cast("tuple[Any, ...]", spec)) != 2:
            shown = f"a tensor of shape {tuple(spec.shape)}" if isinstance(spec, Tensor) else repr(cast("Any", spec))
            raise HyperparameterError(f"`{name}` is {shown}, not a pair; write `{name}=(0.9, 0.999)`")
        for index, value in enumerate(cast("tuple[Any, ...]", spec)):
            check_ranges(f"{name}[{index}]", value, range_)
    elif not isinstance(spec, Tensor):
        range_.check(name, spec)


def check_fits(name: str, spec: Any, names: Sequence[str], shapes: Sequence[torch.Size], tasks: bool = False) -> None:
    """Check that a specification has exactly one value for each parameter, of a shape that broadcasts to it."""
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
            check_fits(f"{name}[{index}]", value, names, shapes, tasks)
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


def is_dict(spec: Any) -> bool:
    return isinstance(spec, dict)


def is_per_task(spec: Any) -> bool:
    return isinstance(spec, PerTask)


def per_leaf(
    hyperparameters: dict[str, Any], step: Tensor, names: Callable[[], list[str]], shapes: Sequence[torch.Size]
) -> Iterator[dict[str, Any]]:
    """The hyperparameters of each parameter at this step; one and the same dict where all parameters share them."""
    if any(has(spec, is_schedule) for spec in hyperparameters.values()):
        hyperparameters = {name: at_step(spec, step) for name, spec in hyperparameters.items()}
        for name, spec in hyperparameters.items():
            check_fits(name, spec, names(), shapes)
    if any(has(spec, is_per_task) for spec in hyperparameters.values()):
        raise HyperparameterError(
            "`optim.per_task` has a meaning for many tasks only; use `adapt_tasks`, or pass one value"
        )
    if not any(has(spec, is_dict) for spec in hyperparameters.values()):
        for _ in shapes:
            yield hyperparameters
        return
    keys = {id(spec): one_key_each(name, spec, names()) for name, spec in _dicts(hyperparameters)}
    for parameter in names():
        yield {name: _for_parameter(spec, parameter, keys) for name, spec in hyperparameters.items()}


def _dicts(hyperparameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, spec in hyperparameters.items():
        for each in cast("tuple[Any, ...]", spec) if isinstance(spec, tuple) else (spec,):
            if isinstance(each, dict):
                yield name, cast("dict[str, Any]", each)


def _for_parameter(spec: Any, parameter: str, keys: dict[int, dict[str, str]]) -> Any:
    if isinstance(spec, dict):
        return cast("dict[str, Any]", spec)[keys[id(cast("Any", spec))][parameter]]
    if isinstance(spec, tuple):
        return tuple(_for_parameter(value, parameter, keys) for value in cast("tuple[Any, ...]", spec))
    return spec
