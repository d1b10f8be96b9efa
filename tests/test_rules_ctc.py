"""The rule of the CTC loss: against torch's own, against all alignments written out, one task or many."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_checks import check_as_torch, check_second_order, check_tasks, close, flags, gradients, ruled
from torch import Tensor
from torch.func import grad

from statelessify import over_tasks

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

FEWER = settings(max_examples=max(settings().max_examples // 4, 10))  # each example runs frame by frame
INTEGERS = [torch.int64, torch.int32]


class Problem(NamedTuple):
    """Rows of scores, labels of which some may be blank-separated or repeated, lengths, and the other arguments."""

    frames: int
    classes: int
    lengths: list[int]
    label_lengths: list[int]
    concatenated: bool
    normalized: bool
    kind: Any
    blank: int
    reduction: str
    zero_infinity: bool

    def make(self) -> tuple[Tensor, ...]:
        """Log-probabilities, targets and both lengths, in an order of the rows drawn anew."""
        order = torch.randperm(len(self.lengths)).tolist()
        x = torch.randn(self.frames, len(order), self.classes)
        labels = [c for c in range(self.classes) if c != self.blank]
        longest = max(*self.label_lengths, 1)
        y = torch.tensor(labels)[torch.randint(len(labels), (len(order), longest))]
        lengths = [[column[row] for row in order] for column in (self.lengths, self.label_lengths)]
        if self.concatenated:
            y = torch.cat([row[:length] for row, length in zip(y, lengths[1], strict=True)])
        rest = tuple(torch.tensor(column, dtype=self.kind) for column in lengths)
        return x.log_softmax(-1) if self.normalized else x, y.to(self.kind), *rest

    def call(self, x: Tensor, y: Tensor, lengths: Any, label_lengths: Any) -> Tensor:
        return F.ctc_loss(x, y, lengths, label_lengths, self.blank, self.reduction, self.zero_infinity)


@st.composite
def problems(draw: st.DrawFn, possible: bool = True) -> Problem:
    """Enough frames for every alignment, unless `possible` is false."""
    rows = draw(st.integers(1, 3))
    labels = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    if possible:
        lengths = [max(2 * n, 1) + draw(st.integers(0, 2)) for n in labels]
    else:
        lengths = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    classes = draw(st.integers(2, 4))
    return Problem(
        max(*lengths, 1) + draw(st.integers(0, 1)),
        classes,
        lengths,
        labels,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(INTEGERS)),
        draw(st.integers(0, classes - 1)),
        draw(st.sampled_from(["none", "mean", "sum"])),
        draw(st.booleans()),
    )


@given(problems(), st.sampled_from([tuple, list, None]))
@FEWER
def test_ctc_loss(problem: Problem, as_numbers: Any) -> None:
    x, y, *lengths = problem.make()
    given_lengths = lengths if as_numbers is None else [as_numbers(column.tolist()) for column in lengths]
    check_as_torch(lambda x: problem.call(x, y, *given_lengths), [x])


@given(problems(), flags(4))
@FEWER
def test_ctc_loss_of_many_tasks(problem: Problem, mapped: list[bool]) -> None:
    mapped[2] = mapped[3]  # another's lengths may be too short for one's labels
    if problem.concatenated:
        mapped[1] = mapped[3]
    check_tasks(problem.call, problem.make, mapped)


@given(problems(possible=False))
def test_alignments_that_cannot_be(problem: Problem) -> None:
    """Too few frames, or none: infinite, or with `zero_infinity` zero, and then with no gradient."""
    x, *rest = problem.make()
    expected = gradients(lambda x: problem.call(x, *rest), [x])
    found = gradients(ruled(lambda x: problem.call(x, *rest)), [x])
    close(found[0], expected[0])
    if not expected[0].isinf().any():  # else torch's gradient is not a number
        close(found[1], expected[1])


@given(problems(), st.booleans())
def test_one_sequence_without_a_batch(problem: Problem, as_numbers: bool) -> None:
    x, y, lengths, label_lengths = (t[:, 0] if t.ndim == 3 else t for t in problem.make())
    first = (y if y.ndim == 1 else y[0])[: int(label_lengths[0])]
    given_lengths: list[Any] = [lengths[0], label_lengths[0]]
    if as_numbers:
        given_lengths = [(int(length),) for length in given_lengths]
    check_as_torch(lambda x: problem.call(x, first, *given_lengths), [x])


@given(problems())
def test_ctc_loss_sums_over_all_alignments(problem: Problem) -> None:
    """The definition, in a few frames: the probability of all sequences of frames that spell the labels."""
    x, y, _, _ = problem.make()
    x, frames = x[:4, 0], min(problem.frames, 4)
    labels = (y if y.ndim == 1 else y[0])[: min(problem.label_lengths[0], y.shape[-1])][:2].tolist()
    total = torch.tensor(-math.inf)
    for path in itertools.product(range(problem.classes), repeat=frames):
        spelt = [c for index, c in enumerate(path) if c != problem.blank and (not index or path[index - 1] != c)]
        if spelt == labels:
            total = torch.logaddexp(total, sum((x[t, c] for t, c in enumerate(path)), torch.zeros(())))
    targets = torch.tensor([labels], dtype=torch.int64)
    found = ruled(F.ctc_loss)(x.unsqueeze(1), targets, (frames,), (len(labels),), problem.blank, "sum")
    close(found, -total)


def test_classes_that_are_ruled_out() -> None:
    """A log-probability of minus infinity, as a masked softmax gives it; there torch's slope is not a number."""
    scores = torch.randn(6, 2, 4)
    scores[2:4, :, 3] = -math.inf
    y = torch.tensor([[1, 2], [3, 1]])
    found, expected = (
        gradients(lambda x, call=call: call(x, y, (6, 5), (2, 2)), [scores.log_softmax(-1)])
        for call in (ruled(F.ctc_loss), F.ctc_loss)
    )
    close(found, tuple(part.nan_to_num() for part in expected))


@given(problems())
@FEWER
def test_second_order_of_ctc_loss(problem: Problem) -> None:
    x, *rest = problem.make()
    check_second_order(lambda x: problem.call(x, *rest), [x])


def test_labels_that_are_all_but_impossible() -> None:
    """Losses of tens of thousands are numbers still."""
    x, y = (torch.randn(6, 2, 4) * 2e4).log_softmax(-1), torch.tensor([[1, 2], [3, 3]])
    found, expected = (
        gradients(lambda x, call=call: call(x, y, (6, 5), (2, 2)), [x]) for call in (ruled(F.ctc_loss), F.ctc_loss)
    )
    assert found[0] > 1000
    close(found, expected)


def test_ctc_loss_of_a_network_over_tasks() -> None:
    """As it is used: after a log-softmax, with lengths as lists, in float32."""
    weights, x = torch.randn(3, 4, dtype=torch.float32), torch.randn(5, 20, 2, 3, dtype=torch.float32)
    y = torch.randint(1, 4, (5, 2, 6))

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss((x @ w).log_softmax(-1), y, [20, 18], [6, 4])

    found = grad(lambda w: over_tasks(loss, backend="vmap")(w, x, y).sum())(weights)
    expected = gradients(lambda w: sum((loss(w, *each) for each in zip(x, y, strict=True)), torch.zeros(())), [weights])
    close(found, expected[1], 1e-4)
    assert found.dtype == torch.float32
