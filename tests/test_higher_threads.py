"""Two threads, each with its own patched copies of one module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statelessify.compat import higher

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::statelessify.compat.higher.DifferenceWarning"),
]
LOOPS = 15
KINDS: dict[str, Any] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
    "convolution": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 1)),
    "lstm": lambda: nn.LSTM(4, 3),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0),
}


@pytest.fixture
def _switch_often() -> Iterator[None]:
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_switch_often")
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_patch_one_module(kind: str, fresh: bool) -> None:
    """Also where nothing is known of the module yet, so that both find it out at once."""
    net, x = KINDS[kind](), torch.randn(5, 1, 4)

    def loss(module: nn.Module) -> Tensor:
        out = module(x)
        return ((out[0] if isinstance(out, tuple) else out) - 1).square().mean()

    def work(thread: int, loops: int = LOOPS) -> list[list[Tensor]]:
        opt, found = torch.optim.Adam(net.parameters(), lr=0.1), []
        for _ in range(loops):
            with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
                for _ in range(2):
                    diffopt.step((1 + thread) * loss(fmodel))
                gradients = torch.autograd.grad(loss(fmodel), list(net.parameters()))
            found.append([*fmodel.buffers(), *(p.detach() for p in fmodel.parameters()), *gradients])
        return found

    expected = [] if fresh else [work(thread, 1) * LOOPS for thread in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, range(2)))
    torch.testing.assert_close(found, expected or [work(thread, 1) * LOOPS for thread in range(2)], rtol=0, atol=1e-12)
