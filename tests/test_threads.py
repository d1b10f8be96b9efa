"""One `apply` from many threads, and from inside itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from zoo import fingerprint, total
from zoo_modules import Fails, Norms

from statelessify import stateless

pytestmark = pytest.mark.usefixtures("float64")

THREADS, CALLS = 8, 200


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


class Quiet(nn.Module):
    """As `Fails`, but a call leaves no Python state behind: its skeleton is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(2, 3))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.seen.add_(x.mean())
        out = self.linear(x) + self.seen.sum()
        if fail:
            raise KeyError("asked to fail")
        return out


@pytest.mark.parametrize("make", [Fails, Quiet])
def test_one_apply_from_many_threads(make: type[nn.Module]) -> None:
    """Each call has its own parameters and buffers; half of them raise inside forward."""
    module = make()
    apply, params, buffers = stateless(module)
    before, x, start = fingerprint(module), torch.randn(4, 3), threading.Barrier(THREADS)

    def values(thread: int, call: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scale = 1.0 + thread + call / CALLS
        return {k: v.detach() * scale for k, v in params.items()}, {k: v + scale for k, v in buffers.items()}

    def work(thread: int) -> tuple[int, int]:
        start.wait()
        wrong = raised = 0
        for call in range(CALLS):
            own, seen = values(thread, call)
            try:
                out, new = apply(own, seen, x, fail=call % 2 == 1)
            except KeyError:
                raised += 1
                continue
            expected_seen = seen["seen"] + x.mean()
            expected = x @ own["linear.weight"].T + own["linear.bias"] + expected_seen.sum()
            wrong += not (torch.allclose(out, expected) and torch.allclose(new["seen"], expected_seen))
        return wrong, raised

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS)))
    assert results == [(0, CALLS // 2)] * THREADS
    assert fingerprint(module) == before


def test_gradients_from_many_threads() -> None:
    """Under transforms in some threads and without in the others."""
    module = Norms()
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    before, xs = fingerprint(module), torch.randn(THREADS, 4, 3, 5)
    loss = lambda p, x: total(apply(p, buffers, x)[0].sin())
    expected = [torch.autograd.grad(loss(params, x), list(params.values())) for x in xs]
    given, start = fingerprint(buffers), threading.Barrier(THREADS)

    def work(thread: int) -> bool:
        start.wait()
        right = True
        for _ in range(10):
            if thread % 2:
                found = list(torch.func.grad(loss)(params, xs[thread]).values())
            else:
                found = torch.autograd.grad(loss(params, xs[thread]), list(params.values()))
            right &= all(torch.allclose(a, b) for a, b in zip(found, expected[thread], strict=True))
        return right

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
    assert (fingerprint(module), fingerprint(buffers)) == (before, given)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, inner: object = None) -> Tensor:
        self.calls += 1
        before = self.weight * x
        return before + (inner(x) if callable(inner) else 0) + self.weight * self.calls


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_inside_a_call(fails: bool) -> None:
    module = Calls()
    apply, params, buffers = stateless(module)
    before = fingerprint(module)

    def inner(x: Tensor) -> Tensor:
        out, new_buffers = apply({"weight": torch.tensor(5.0)}, buffers, x)
        assert new_buffers["calls"].item() == 1
        if fails:
            raise KeyError("inside")
        return out

    for _ in range(2):
        if fails:
            with pytest.raises(KeyError, match="inside"):
                apply(params, buffers, torch.tensor(3.0), inner)
        else:
            out, new_buffers = apply(params, buffers, torch.tensor(3.0), inner)
            assert (out.item(), new_buffers["calls"].item()) == (6 + (15 + 5) + 2, 1)
            (gradient,) = torch.autograd.grad(out, params["weight"])
            assert gradient.item() == 4
    assert fingerprint(module) == before
