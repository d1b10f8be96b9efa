"""Support and query sets of several tasks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from . import _options
from ._tensors import tensors

__all__ = ["tasks"]

Batch = tuple[Tensor, Tensor]

KINDS = ("regression", "classification")


@st.composite
def tasks(
    draw: st.DrawFn,
    *,
    kind: str | None = None,
    tasks: int | None = None,
    shots: int | None = None,
    features: tuple[int, ...] | None = None,
    outputs: tuple[int, ...] | None = None,
    classes: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Batch, Batch]:
    """Tasks: trees ``(supports, queries)``, each ``(x, y)`` with the leading dimensions ``(tasks, shots, ...)``.

    Args:
        kind: ``"regression"``: `y` has floating-point numbers; ``"classification"``: `y` has the numbers of classes,
            int64. None: either.
        tasks: how many. None: 1 to 3.
        shots: examples in each set. None: 1 to 3, in both sets its own.
        features: the shape of one `x`. None: ``(1,)`` to ``(3,)``.
        outputs: the shape of one `y` of a regression. None: ``(1,)`` or ``(2,)``.
        classes: how many there are in a classification. None: 1 to 3.
        dtype: of `x` and of the `y` of a regression. None: float32 or float64.

    Returns:
        A strategy of pairs of pairs of tensors, numbers between -2 and 2.

    Raises:
        InvalidArgument: at draw time, for an option that no task fits.

    Example:
        >>> from hypothesis import find
        >>> supports, queries = find(tasks(kind="classification", dtype=torch.float64), lambda tasks: True)
        >>> supports
        (tensor([[[0.]]], dtype=torch.float64), tensor([[0]]))
    """
    _options.one_of("kind", kind, KINDS)
    for option, number in (("tasks", tasks), ("shots", shots), ("classes", classes)):
        _options.count(option, number)
    _options.shape("features", features, 1)
    _options.shape("outputs", outputs, 1)
    _options.floating("dtype", dtype)
    kind = kind or draw(st.sampled_from(KINDS))
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    count = tasks or draw(_size(3))
    features = draw(st.tuples(_size(3))) if features is None else features
    if kind == "classification":
        shape, classes = (), classes or draw(_size(3))
    else:
        shape, classes = draw(st.tuples(_size(2))) if outputs is None else outputs, None

    def batch() -> Batch:
        leading = (count, shots or draw(_size(3)))
        x = draw(_entries((*leading, *features), dtype, None))
        return x, draw(_entries((*leading, *shape), dtype, classes))

    return batch(), batch()


@cache
def _size(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


@cache
def _entries(shape: tuple[int, ...], dtype: torch.dtype, below: int | None) -> st.SearchStrategy[Any]:
    if below is None:
        return tensors(shape, dtype=dtype, min_value=-2, max_value=2)
    return tensors(shape, dtype=torch.int64, min_value=0, max_value=below - 1)
