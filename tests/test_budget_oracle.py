"""`chunk_size="auto"` where something else counts: storages that operations return, as long as they live."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks, stateless
from statelessify._budget import Chunks
from statelessify._memory import Measured

pytestmark = pytest.mark.usefixtures("float64")


class Living(TorchDispatchMode):
    """Counts the bytes of storages that were made within; what a kernel makes for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def most(run: Callable[[], Any]) -> tuple[int, Any]:
    with Living() as living:
        out = run()
    return living.most, out


def network() -> tuple[Any, dict[str, Tensor], Callable[[int], tuple[Tensor, Tensor]]]:
    """A convolution, whose memory for one task is another share than that for two."""
    apply, params, buffers = stateless(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(150, 3))
    )

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(apply(params, buffers, batch[0])[0], batch[1])

    return loss, params, lambda tasks: (torch.randn(tasks, 4, 2, 10, 10), torch.randint(3, (tasks, 4)))


def unrecorded(loss: Any, params: Any, batches: Any, **options: Any) -> Any:
    with torch.no_grad():
        return over_tasks(loss, **options)(params, batches)


def meta_gradients(loss: Any, params: Any, batches: Any, **options: Any) -> Any:
    def meta(params: Any, batch: Any) -> Tensor:
        return loss(adapt(loss, params, batch, optimizer=optim.sgd(lr=0.1), steps=2).params, batch)

    with torch.no_grad():
        return over_tasks(torch.func.grad(meta), **options)(params, batches)


def first_order(loss: Any, params: Any, batches: Any, **options: Any) -> Any:
    return adapt_tasks(loss, params, batches, optimizer=optim.sgd(lr=0.1), steps=3, gradient=FirstOrder(), **options)


def at_test_time(loss: Any, params: Any, batches: Any, **options: Any) -> Any:
    with torch.no_grad():
        return adapt_tasks(loss, params, batches, optimizer=optim.sgd(lr=0.1), steps=3, **options)


RUNS = [unrecorded, meta_gradients, first_order, at_test_time]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_budget_is_kept(run: Any, share: float) -> None:
    loss, params, draw = network()
    batches = draw(24)
    at_once, expected = most(lambda: run(loss, params, batches))
    budget = int(share * at_once)
    found, out = most(lambda: run(loss, params, batches, chunk_size="auto", memory_budget=budget))
    assert found <= budget < at_once
    assert_close(out, expected)


@pytest.mark.parametrize("run", [unrecorded, meta_gradients], ids=lambda run: run.__name__)
def test_the_profiler_sees_at_least_what_lives(run: Any) -> None:
    loss, params, draw = network()
    batches = draw(5)
    living, _ = most(lambda: run(loss, params, batches))
    with Measured(torch.device("cpu")) as seen:
        run(loss, params, batches)
    assert living <= seen.peak <= 2 * living


def test_what_is_known_without_a_graph_says_nothing_of_a_run_with_one() -> None:
    sizes: list[int] = []

    def work(here: slice) -> Tensor:
        sizes.append(here.stop - here.start)
        return torch.ones(sizes[-1], 1000 if torch.is_grad_enabled() else 1).sum(1)

    chunks = Chunks("auto", 10 * 8000)
    with torch.no_grad():
        chunks.run(work, 20, "error", [])
        chunks.run(work, 20, "error", [])
    assert sizes == [1, 7, 12, 20]
    with Measured(torch.device("cpu")) as seen:
        chunks.run(work, 20, "error", [])
    assert seen.peak <= 10 * 8000


def test_threads_measure_their_own() -> None:
    loss, params, draw = network()
    batches, found = draw(8), list[Any]()
    expected = unrecorded(loss, params, batches)

    def work() -> None:
        for _ in range(5):
            found.append(unrecorded(loss, params, batches, chunk_size="auto", memory_budget=2**20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for out in found:
        assert_close(out, expected)


@pytest.mark.parametrize("in_dims", [(None, 1), (0, 1), (None, (1, 0))], ids=str)
def test_tasks_in_other_dimensions(in_dims: Any) -> None:
    def fn(w: Tensor, x: Any) -> Tensor:
        parts = x if isinstance(x, tuple) else (x,)
        return torch.stack([(w.sum() * part.repeat(40).sin()).exp().mean() for part in parts]).sum()

    w = torch.rand(7, 2) if in_dims[0] == 0 else torch.rand(2)
    x = (torch.rand(3, 7), torch.rand(7, 3)) if isinstance(in_dims[1], tuple) else torch.rand(3, 7)
    expected = over_tasks(fn, in_dims=in_dims)(w, x)
    assert_close(over_tasks(fn, in_dims=in_dims, chunk_size="auto", memory_budget=30_000)(w, x), expected)


def test_the_loop_takes_each_task_once() -> None:
    calls: list[int] = []

    def loss(w: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return ((w - x) ** 2).sum()

    start, batches = torch.zeros(3, requires_grad=True), torch.randn(10, 3)
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2, "backend": "loop"}
    found = adapt_tasks(loss, start, batches, chunk_size="auto", memory_budget=2**20, **options)
    assert len(calls) == 20
    assert_close(found.params, adapt_tasks(loss, start, batches, **options).params)


def test_a_budget_inside_a_budget() -> None:
    loss, params, draw = network()
    batches = draw(6)
    inner = over_tasks(loss, in_dims=(None, 0), chunk_size="auto", memory_budget=2**20)

    def one(params: Any, batch: Any) -> Tensor:
        x, y = batch
        return inner(params, (x[:, None], y[:, None])).mean()

    expected = unrecorded(loss, params, batches)
    assert_close(unrecorded(one, params, batches, chunk_size="auto", memory_budget=2**21), expected)


@pytest.mark.parametrize("every", [None, 2])
def test_a_carry_and_its_gradients(every: int | None) -> None:
    def loss(w: Tensor, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(hidden + w * x)
        return (hidden.repeat(30) ** 2).mean(), hidden

    x = torch.randn(9, 3)

    def meta(**chunks: Any) -> Any:
        w, hidden = torch.full((3,), 0.5, requires_grad=True), torch.zeros(3, requires_grad=True)
        options: Any = {"optimizer": optim.sgd(lr=0.3), "steps": 4, "gradient": Unroll(checkpoint_every=every)}
        adapted = adapt_tasks(loss, w, x, carry=hidden, **options, **chunks)
        total = adapted.params.square().sum() + adapted.carry.sum()
        return adapted.carry, adapted.losses, torch.autograd.grad(total, (w, hidden))

    assert_close(meta(chunk_size="auto", memory_budget=60_000), meta())
