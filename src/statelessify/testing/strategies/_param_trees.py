"""Trees of parameters."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from . import _options
from ._printing import print_call
from ._tensors import shapes, tensors

__all__ = ["Pair", "param_trees"]

_NAMES = ("w", "b", "head", "0", "body.weight")


class Pair(NamedTuple):
    """The NamedTuple that stands in drawn trees.

    Attributes:
        left, right: trees.
    """

    left: Any
    right: Any

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        print_call(printer, "Pair", {"*left": self.left, "*right": self.right})


@st.composite
def param_trees(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    requires_grad: bool | None = None,
    max_leaves: int = 5,
) -> Any:
    """Nested dicts, lists, tuples and NamedTuples of floating-point tensors, as optimizers train them.

    Args:
        dtype: of all leaves. None: each is float32 or float64.
        shape: of all leaves. None: each its own, of up to two dimensions and four entries.
        requires_grad: of all leaves. None: of each its own.
        max_leaves: the most that there are; there is at least one.

    Returns:
        A strategy of trees.

    Raises:
        InvalidArgument: at draw time, for an option that no tree fits.

    Example:
        >>> from hypothesis import find
        >>> find(param_trees(dtype=torch.float64), lambda tree: isinstance(tree, dict))
        {'w': tensor(0., dtype=torch.float64)}
    """
    _options.floating("dtype", dtype)
    _options.shape("shape", shape)
    _options.count("max_leaves", max_leaves)
    return draw(_trees(dtype, shape, requires_grad, max_leaves))


@cache
def _trees(
    dtype: torch.dtype | None, shape: tuple[int, ...] | None, requires_grad: bool | None, max_leaves: int
) -> st.SearchStrategy[Any]:
    shape_ = shapes(max_dims=2, max_side=2) if shape is None else st.just(shape)
    learned = st.booleans() if requires_grad is None else st.just(requires_grad)
    trees = st.recursive(_parameters(shape_, learned, dtype), _nested, max_leaves=max_leaves)
    return trees.filter(lambda tree: _leaves(tree) <= max_leaves)


@st.composite
def _parameters(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]],
    requires_grad: st.SearchStrategy[bool],
    dtype: torch.dtype | None,
) -> torch.Tensor:
    return draw(tensors(draw(shape), dtype=dtype, requires_grad=draw(requires_grad)))


@st.composite  # not `dictionaries` and `map`, which hypothesis prints as calls, or by `repr`
def _nested(draw: st.DrawFn, trees: st.SearchStrategy[Any]) -> Any:
    kind = draw(st.sampled_from(["dict", "list", "tuple", "Pair"]))
    if kind == "Pair":
        return Pair(draw(trees), draw(trees))
    items = draw(st.lists(trees, min_size=1, max_size=3))
    if kind != "dict":
        return items if kind == "list" else tuple(items)
    size = len(items)
    names = draw(st.lists(st.sampled_from(_NAMES), unique=True, min_size=size, max_size=size))
    return dict(zip(names, items, strict=True))


def _leaves(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(map(_leaves, tree.values()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return sum(map(_leaves, tree)) if isinstance(tree, (list, tuple)) else 1  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
