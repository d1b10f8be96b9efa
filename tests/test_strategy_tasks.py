"""Drawn tasks and criteria."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from pasted import again, printed, smallest
from torch import nn

from statelessify.testing import assert_trees_close, check_grads, losses, tasks
from statelessify.testing.strategies import OnLogits

CRITERIA = [nn.MSELoss, nn.HuberLoss, nn.SmoothL1Loss, nn.L1Loss, nn.CrossEntropyLoss, OnLogits, nn.MultiMarginLoss]


@given(tasks())
def test_tasks(drawn: Any) -> None:
    (x, y), (query_x, query_y) = drawn
    assert x.shape[0] == y.shape[0] == query_x.shape[0] == query_y.shape[0] <= 3
    assert (x.shape[1], query_x.shape[1]) == (y.shape[1], query_y.shape[1])
    assert x.shape[2:] == query_x.shape[2:]
    assert y.shape[2:] == query_y.shape[2:]
    assert y.dtype in (x.dtype, torch.int64)
    assert_trees_close(again(drawn), drawn, rtol=0, atol=0)


@given(tasks(kind="classification", tasks=2, shots=3, features=(1, 2), classes=2, dtype=torch.float64))
def test_tasks_with_options(drawn: Any) -> None:
    for x, y in drawn:
        assert (x.shape, x.dtype) == ((2, 3, 1, 2), torch.float64)
        assert (y.shape, y.dtype) == ((2, 3), torch.int64)
        assert set(y.flatten().tolist()) <= {0, 1}


@given(tasks(kind="regression", outputs=(2, 1), dtype=torch.float32))
def test_regressions(drawn: Any) -> None:
    for x, y in drawn:
        assert y.shape == (*x.shape[:2], 2, 1)
        assert y.dtype == torch.float32
        assert y.abs().max() <= 2


def example(data: Any, kind: str) -> tuple[Any, Any, Any]:
    """A criterion, and a prediction and target that suit it."""
    classes = data.draw(st.integers(1, 3))
    criterion = data.draw(losses(kind=kind, classes=classes, dtype=torch.float64))
    shape = (classes,) if kind == "classification" else (2,)
    drawn = data.draw(tasks(kind=kind, tasks=1, features=shape, outputs=shape, classes=classes, dtype=torch.float64))
    ((prediction, target), _) = drawn
    return criterion, prediction[0], target[0]


@given(st.data(), st.sampled_from(["regression", "classification"]))
def test_criteria_are_finite_and_print_as_code(data: Any, kind: str) -> None:
    criterion, prediction, target = example(data, kind)
    value = criterion(prediction, target)
    assert value.shape == ()
    assert value.isfinite()
    assert torch.equal(again(criterion)(prediction, target), value)


@given(st.data(), st.sampled_from(["regression", "classification"]))
def test_smooth_criteria_have_two_derivatives(data: Any, kind: str) -> None:
    _, prediction, target = example(data, kind)
    criterion = data.draw(losses(kind=kind, smooth=True, dtype=torch.float64))
    check_grads(
        lambda tree: criterion(tree["prediction"], target), {"prediction": prediction}, order=2, modes=("reverse",)
    )


@pytest.mark.parametrize("kind", CRITERIA)
def test_each_criterion(kind: type) -> None:
    found = smallest(losses(classes=2), lambda criterion: type(criterion) is kind)
    assert "weight=" not in printed(found)


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MultiMarginLoss])
def test_weights_of_classes(kind: type) -> None:
    found = smallest(losses(classes=2), lambda criterion: type(criterion) is kind and criterion.weight is not None)
    assert printed(found).endswith("weight=torch.tensor([1.0, 1.0], dtype=torch.float32))")


@given(losses(kind="classification"))
def test_no_weights_without_classes(criterion: nn.Module) -> None:
    assert getattr(getattr(criterion, "criterion", criterion), "weight", None) is None


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (tasks(kind="ranking"), "`kind='ranking'`; write one of 'regression', 'classification', or None"),
        (tasks(tasks=0), "`tasks=0`; write a whole number from 1 on"),
        (tasks(features=3), "`features=3` is no shape"),
        (tasks(outputs=(0,)), r"`outputs=\(0,\)` is no shape; write a tuple of sizes from 1 on"),
        (tasks(dtype=torch.int64), "write a floating-point dtype"),
        (losses(kind="mse"), "`kind='mse'`; write one of"),
        (losses(classes=0), "`classes=0`; write a whole number from 1 on"),
    ],
)
def test_options_that_there_are_not(strategy: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        smallest(strategy)
