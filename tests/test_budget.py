"""`chunk_size="auto"`: as many tasks at once as a memory budget lets."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from torch import Tensor

from statelessify import FirstOrder, Unroll, adapt_tasks, compiled, optim, over_tasks
from statelessify._memory import Measured
from statelessify.errors import CompileError, TaskError

pytestmark = pytest.mark.usefixtures("float64")
CPU = torch.device("cpu")
WIDTH = 2000
BYTES = 8 * WIDTH
"""of what a task of `wide` makes at a time, which are some"""


def wide(scale: Tensor, x: Tensor) -> Tensor:
    grown = torch.sin(scale * x.repeat(WIDTH))
    return (grown.exp() * grown.cos()).mean()


def losses(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    return wide(params["scale"], batch)


def peak(run: Any) -> tuple[int, Any]:
    with Measured(CPU) as seen:
        out = run()
    return seen.peak, out


class Sizes:
    """Says how many tasks each of its calls had: those inside vmap have one shape."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, scale: Tensor, x: Tensor) -> Tensor:
        inner = torch._C._functorch.get_unwrapped(x)
        self.seen.append(inner.shape[0])
        return wide(scale, x)


def test_measured_memory_is_that_of_tensors() -> None:
    with Measured(CPU) as outer:
        kept = torch.ones(1000)
        with Measured(CPU) as inner:
            torch.ones(5000)  # gone at once
            more = torch.ones(10)
        torch.ones(100)
    assert (inner.peak, inner.kept) == (40000, 128) or inner.peak in range(40000, 41000)
    assert 8000 + inner.peak <= outer.peak <= 8000 + inner.peak + 1000
    assert 8080 <= outer.kept <= 8400
    assert kept.numel() + more.numel() == 1010


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_a_budget_is_kept_where_nothing_is_recorded(share: float) -> None:
    x, scale = torch.rand(40, 1), torch.tensor(0.7)
    with torch.no_grad():
        most, expected = peak(lambda: over_tasks(wide)(scale, x))
        budget = int(share * most)
        found, out = peak(lambda: over_tasks(wide, chunk_size="auto", memory_budget=budget)(scale, x))
    assert_close(out, expected)
    assert found <= budget
    assert found >= 0.2 * budget  # it is used, too


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_budget_is_kept_by_gradients_inside(share: float) -> None:
    x, scale = torch.rand(40, 1), torch.tensor(0.7)
    grad = torch.func.grad(wide)
    most, expected = peak(lambda: over_tasks(grad)(scale, x))
    budget = int(share * most)
    found, out = peak(lambda: over_tasks(grad, chunk_size="auto", memory_budget=budget)(scale, x))
    assert_close(out, expected)
    assert found <= budget


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_budget_is_kept_by_an_inner_loop(share: float) -> None:
    params, x = {"scale": torch.tensor(0.7, requires_grad=True)}, torch.rand(40, 1)
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3, "gradient": FirstOrder()}
    most, expected = peak(lambda: adapt_tasks(losses, params, x, **options))
    budget = int(share * most)
    found, out = peak(lambda: adapt_tasks(losses, params, x, chunk_size="auto", memory_budget=budget, **options))
    assert_close(out.params, expected.params)
    assert found <= budget


def test_larger_budgets_have_larger_chunks() -> None:
    x, scale, largest = torch.rand(64, 1), torch.tensor(0.7), []
    for budget in (20 * BYTES, 60 * BYTES, 10_000 * BYTES):
        sizes = Sizes()
        with torch.no_grad():
            over_tasks(sizes, chunk_size="auto", memory_budget=budget)(scale, x)
        assert sizes.seen[0] == 1
        assert sum(sizes.seen) == 64  # each task once
        largest.append(max(sizes.seen))
    assert largest == sorted(set(largest))


@given(tasks=st.integers(1, 12), budget=st.integers(1, 60), steps=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_numbers_are_those_of_all_at_once(tasks: int, budget: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    start, x = torch.rand(()), torch.rand(tasks, 1)

    def meta(chunk_size: Any, **more: Any) -> tuple[Tensor, ...]:
        rate, scale = torch.tensor(0.1, requires_grad=True), start.clone().requires_grad_()
        adapted = adapt_tasks(
            losses,
            {"scale": scale},
            x,
            optimizer=optim.sgd(lr=rate),
            steps=steps,
            chunk_size=chunk_size,
            gradient=Unroll(checkpoint_every=1 if seed % 2 else None),
            **more,
        )
        value = over_tasks(losses, in_dims=0, chunk_size=chunk_size, **more)(adapted.params, x).mean()
        return value, adapted.losses, *torch.autograd.grad(value, (rate, scale))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one task may take more than the smallest budgets
        assert_close(meta("auto", memory_budget=budget * BYTES), meta(None))


def test_the_same_masks_in_each_chunk() -> None:
    noisy = lambda p, x: (torch.nn.functional.dropout(p * x.repeat(50)) * torch.rand(50)).sum()
    x, p = torch.ones(9, 1), torch.ones(())
    out = over_tasks(noisy, chunk_size="auto", memory_budget=6000, randomness="same")(p, x)
    assert torch.equal(out, out[:1].expand(9))


def test_recomputed_steps_draw_what_they_drew() -> None:
    x = torch.rand(9, 1)

    def noisy(p: Tensor, batch: Tensor) -> Tensor:
        # Twice: one draw takes the same numbers in all chunks together as at once, two take turns.
        dropped = torch.nn.functional.dropout(p * batch.repeat(50))
        return (torch.nn.functional.dropout(dropped) ** 2).sum()

    found = []
    for every in (None, 1):
        torch.manual_seed(3)
        p = torch.tensor(0.5, requires_grad=True)
        options: Any = {"optimizer": optim.sgd(lr=0.01), "steps": 3, "gradient": Unroll(checkpoint_every=every)}
        adapted = adapt_tasks(noisy, p, x, chunk_size="auto", memory_budget=2**22, **options)
        found.append((adapted.params, *torch.autograd.grad(adapted.params.sum(), p)))
    assert_close(found[1], found[0])


def test_a_task_larger_than_the_budget_runs_alone_with_one_warning() -> None:
    x, scale, sizes = torch.rand(5, 1), torch.tensor(0.7), Sizes()
    with torch.no_grad(), pytest.warns(UserWarning, match=r"5 tasks of .* more than the budget of 100") as caught:
        out = over_tasks(sizes, chunk_size="auto", memory_budget=100)(scale, x)
    assert_close(out, over_tasks(wide)(scale, x).detach())
    assert len(caught) == 1
    assert sizes.seen == [1] * 5


def test_without_a_budget_half_of_what_is_free() -> None:
    x, scale, sizes = torch.rand(5, 1), torch.tensor(0.7), Sizes()
    over_tasks(sizes, chunk_size="auto")(scale, x)
    assert sizes.seen == [1, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": "aut"}, 'is not "auto"'),
        ({"chunk_size": 0}, "is not a number of tasks"),
        ({"chunk_size": True}, "is not a number of tasks"),
        ({"chunk_size": "auto", "memory_budget": 0}, "is not a number of bytes"),
        ({"chunk_size": "auto", "memory_budget": 1e9}, "is not a number of bytes"),
        ({"chunk_size": 3, "memory_budget": 10}, "is chosen already"),
        ({"memory_budget": 10}, "is chosen already"),
    ],
)
def test_refused(options: Any, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        over_tasks(wide, **options)
    calls: list[int] = []
    with pytest.raises(TaskError, match=words):
        adapt_tasks(
            lambda p, b: calls.append(1), torch.ones(2), torch.ones(3), optimizer=optim.sgd(), steps=1, **options
        )  # type: ignore[arg-type]
    assert not calls


def test_compiled_code_cannot_measure() -> None:
    with pytest.raises(CompileError, match="compiled"):
        over_tasks(compiled(losses, backend="eager"), chunk_size="auto")
    with torch.profiler.profile(profile_memory=True), pytest.raises(TaskError, match="profile"):
        over_tasks(wide, chunk_size="auto")(torch.tensor(0.7), torch.rand(3, 1))
