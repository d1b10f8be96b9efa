"""What the step of a user's own optimizer returns, checked against what it was given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor

from .._transforms import transforming
from .._tree import first_difference, tree_flatten, tree_leaves, tree_names
from ..errors import DtypeError, MutationError, ShapeError, TreeError
from ._optimizer import Optimizer
from ._rule import Rule

__all__: list[str] = []

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def checked(optimizer: Optimizer) -> Step:
    """The optimizer's step; one that is not ours is checked at each call."""
    return optimizer.step if is_rule(optimizer) else partial(_checked, optimizer.step)


def is_rule(optimizer: Optimizer) -> bool:
    """Whether the optimizer is one of our own rules, whose step keeps what the state is."""
    return isinstance(getattr(optimizer.step, "__self__", None), Rule)


def _checked(step: Step, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
    given = [leaf for leaf in tree_leaves((params, grads, state)) if isinstance(leaf, Tensor)]
    versions = None if transforming() else [leaf._version for leaf in given]
    out: Any = step(params, grads, state)
    if not isinstance(out, tuple) or len(cast("tuple[Any, ...]", out)) != 2:
        kind = type(cast("Any", out)).__name__
        raise TreeError(
            f"the step of the optimizer returned {kind}, not a pair; return `(params, state)`, also where the state "
            "stays what it was"
        )
    new = cast("tuple[Any, Any]", out)[0]
    (before, spec), (after, other) = tree_flatten(params), tree_flatten(new)
    if spec != other:
        raise TreeError(
            "the step of the optimizer returned parameters of another structure than it was given: "
            f"{first_difference(spec, other)}"
        )
    for name, old, leaf in zip(tree_names(params), before, after, strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape != old.shape:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ShapeError(
                f"the step of the optimizer made {shape} of parameter `{name}`, whose shape is {tuple(old.shape)}"
            )
        if leaf.dtype != old.dtype:
            raise DtypeError(
                f"the step of the optimizer made a {leaf.dtype} tensor of parameter `{name}`, which is {old.dtype}"
            )
    if versions is not None and versions != [leaf._version for leaf in given]:
        raise MutationError(
            "the step of the optimizer wrote in place into a tensor that it was given; compute new ones, `p - lr * g` "
            "for `p.sub_(lr * g)`"
        )
    return cast("tuple[Any, Any]", out)
