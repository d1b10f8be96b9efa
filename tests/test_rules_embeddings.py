"""The rules of embeddings, and of branches that all tasks take."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import Call, Make, check_as_torch, check_second_order, check_tasks, close, flags, ruled
from torch import Tensor
from torch.func import grad, vmap

from statelessify import _tasks, errors, over_tasks, stateless

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


class Case(NamedTuple):
    call: Call
    make: Make


@st.composite
def embeddings(draw: st.DrawFn) -> Case:
    rows, width, shape = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([(), (3,), (2, 3)]))
    padding, frequent = draw(st.sampled_from([None, 0, rows - 1, -1, -rows])), draw(st.booleans())
    low = draw(st.booleans())

    def make() -> tuple[Tensor, ...]:
        return torch.randn(rows, width), torch.randint(rows, shape)

    def call(w: Tensor, x: Tensor) -> Tensor:
        if low:
            return torch.embedding(w, x, -1 if padding is None else padding % rows, frequent)
        return F.embedding(x, w, padding, scale_grad_by_freq=frequent)

    return Case(call, make)


@given(embeddings(), flags(2))
def test_embedding(case: Case, mapped: list[bool]) -> None:
    check_as_torch(case.call, case.make())
    check_tasks(case.call, case.make, mapped)
    check_second_order(lambda w, x: case.call(w.sin(), x), case.make())


@st.composite
def bags(draw: st.DrawFn) -> Case:
    """Whose offsets lie as they may: bags of several entries, of none."""
    rows, mode = draw(st.integers(1, 4)), draw(st.sampled_from(["sum", "mean", "max"]))
    padding = draw(st.sampled_from([None, 0, -1]))
    weighted, last = mode == "sum" and draw(st.booleans()), draw(st.booleans())
    offsets = sorted(draw(st.lists(st.integers(0, 5), max_size=3)))
    flat = draw(st.booleans())
    options: dict[str, Any] = {"mode": mode, "padding_idx": padding, "include_last_offset": flat and last}
    starts = torch.tensor([0, *offsets, *([6] if last else [])]) if flat else None

    def make() -> tuple[Tensor, ...]:
        shape = (6,) if flat else (2, 3)
        return torch.randn(rows, 2), torch.randint(rows, shape), torch.rand(shape)

    def call(w: Tensor, x: Tensor, each: Tensor) -> Tensor:
        return F.embedding_bag(x, w, starts, per_sample_weights=each if weighted else None, **options)

    return Case(call, make)


@given(bags(), flags(3))
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_embedding_bag(case: Case, mapped: list[bool]) -> None:
    check_as_torch(case.call, case.make())
    check_tasks(case.call, case.make, mapped)


def test_the_largest_of_equal_entries_is_one() -> None:
    weight, x = torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[0, 1, 2], [1, 0, 0]])
    check_as_torch(lambda w: F.embedding_bag(x, w, mode="max"), [weight])


@given(st.sampled_from([(), (3,), (2, 0)]), st.sampled_from([3, 5]))
def test_one_hot(shape: tuple[int, ...], classes: int) -> None:
    x = torch.randint(3, (2, *shape))
    found = vmap(ruled(lambda x: F.one_hot(x, classes)))(x)
    assert found.dtype == torch.int64
    assert torch.equal(found, F.one_hot(x, classes))
    weights = torch.randn(2, *shape, classes)
    slopes = vmap(grad(ruled(lambda w, x: (F.one_hot(x, classes) * w).sum())))(weights, x)
    close(slopes, F.one_hot(x, classes).double())
    for wrong in (torch.full((2, 1), classes), torch.full((2, 1), -1)):
        with pytest.raises(RuntimeError):
            vmap(ruled(lambda x: F.one_hot(x, classes)))(wrong)


# ---------------------------------------------------------------- branches

COMPARISONS = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("counts", [(3, 3), (4, 4), (5, 5), (3, 5)])
def test_a_branch_on_a_count(compare: Any, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tasks agree they take it; where they differ, it is torch's own error, and a loop."""
    monkeypatch.setattr(_tasks, "_warned", set())
    x, lengths = torch.randn(2, 3), torch.tensor(counts)
    call = lambda _, x, n: x if compare(n, 4) else -x
    expected = torch.stack([call(None, *row) for row in zip(x, lengths, strict=True)])
    if len({bool(compare(n, 4)) for n in counts}) == 1:
        close(over_tasks(call, backend="vmap")(None, x, lengths), expected)
    else:
        with pytest.raises(errors.VmapError):
            over_tasks(call, backend="vmap")(None, x, lengths)
        with pytest.warns(UserWarning, match="cannot batch"):
            close(over_tasks(call)(None, x, lengths), expected)


@pytest.mark.parametrize("how", ["all", "any"])
def test_a_branch_on_values_is_none_that_tasks_share(how: str) -> None:
    """Two tasks may agree by chance, others not."""
    values = torch.tensor([1.0, 2.0])
    with pytest.raises(errors.VmapError):
        over_tasks(lambda _, x: x if x > 0 else -x, backend="vmap")(None, values)
    masks = torch.tensor([[True, True], [True, True]])
    found = over_tasks(lambda _, m: m.long() if getattr(m, how)() else m.long() - 1, backend="vmap")(None, masks)
    assert torch.equal(found, masks.long())


# ---------------------------------------------------------------- flags


class Guarded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight if self.weight.requires_grad else self.weight.detach())


def test_what_is_guarded_by_requires_grad() -> None:
    apply, params, buffers = stateless(Guarded())
    x = torch.randn(2, 3)
    total = lambda p: vmap(lambda x: apply(p, buffers, x)[0])(x).sum()
    close(grad(total)({"weight": torch.ones(3)})["weight"], x.sum(0))
    close(torch.autograd.grad(total(params), params["weight"])[0], x.sum(0))
