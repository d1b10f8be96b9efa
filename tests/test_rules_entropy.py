"""Cross-entropy with weights and smoothed labels: torch's own numbers, for one task and for many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import check_as_torch, check_second_order, check_tasks, flags
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Any]:
    classes, batch = draw(st.integers(1, 4)), draw(st.sampled_from([(), (3,), (2, 2)]))
    smoothing, reduction = draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from(["none", "mean", "sum"]))
    ignored, probabilities = draw(st.sampled_from([-100, 0, 1])), draw(st.booleans())
    shape = (batch[0], classes, *batch[1:]) if batch else (classes,)

    def make() -> tuple[Tensor, ...]:
        target = torch.rand(shape) if probabilities else torch.randint(classes, batch)
        if not probabilities and ignored >= 0:
            target.view(-1)[0] = classes - 1  # not all are ignored
        return torch.randn(shape), target

    options = {"label_smoothing": smoothing, "reduction": reduction}
    if not probabilities:
        options["ignore_index"] = ignored if ignored != classes - 1 else -100
    weight = torch.linspace(0.5, 1.5, classes)  # torch has no derivative by it
    return lambda x, y: F.cross_entropy(x, y, weight, **options), make


@given(cases(), flags(2))
def test_as_torch(case: Any, mapped: list[bool]) -> None:
    call, make = case
    check_as_torch(call, make())
    check_tasks(call, make, mapped)


@given(cases())
def test_second_order(case: Any) -> None:
    call, make = case
    check_second_order(call, make())
