"""Trees of parameters."""

from __future__ import annotations

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
        shape: of all leaves. None: any; two leaves may have the same.
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
    common = draw(shapes(max_dims=2)) if shape is None else shape
    either = [st.just(common), *([shapes(max_dims=2)] if shape is None else [])]
    options = st.tuples(st.one_of(either), st.booleans() if requires_grad is None else st.just(requires_grad))
    leaves = options.flatmap(lambda given: tensors(given[0], dtype=dtype, requires_grad=given[1]))
    return draw(st.recursive(leaves, _nested, max_leaves=max_leaves).filter(lambda tree: _leaves(tree) <= max_leaves))


def _nested(trees: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(trees, min_size=1, max_size=3)
    return st.one_of(
        st.dictionaries(st.sampled_from(_NAMES), trees, min_size=1, max_size=3),
        few,
        few.map(tuple),
        st.builds(Pair, trees, trees),
    )


def _leaves(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(map(_leaves, tree.values()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return sum(map(_leaves, tree)) if isinstance(tree, (list, tuple)) else 1  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
