"""A skeleton that a call has left a trace on is not used again, whatever the trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from statelessify import stateless


class Remembers(nn.Module):
    """Adds what it has seen before, which it keeps outside its slots."""

    def __init__(self, how: Callable[[Remembers, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.sum, self.seen = torch.zeros(1), [torch.zeros(1)]
        self.calls = [lambda x: x]
        self.how = [how]

    def forward(self, x: Tensor) -> Tensor:
        return self.how[0](self, self.weight * x)


def _data(module: Remembers, x: Tensor) -> Tensor:
    module.sum.data.add_(x.detach())
    return x + module.sum


def _other_data(module: Remembers, x: Tensor) -> Tensor:
    module.sum.data = module.sum.data + x.detach()
    return x + module.sum


def _numpy(module: Remembers, x: Tensor) -> Tensor:
    module.sum.numpy()[...] += x.detach().numpy()
    return x + module.sum


def _in_place(module: Remembers, x: Tensor) -> Tensor:
    module.seen[0].add_(x.detach())
    return x + module.seen[0]


def _data_in_a_list(module: Remembers, x: Tensor) -> Tensor:
    module.seen[0].data.add_(x.detach())
    return x + module.seen[0]


def _cleared(module: Remembers, x: Tensor) -> Tensor:
    """The new tensor may get the old one's address."""
    y = x + module.seen[0]
    module.seen.clear()
    module.seen.append(y.detach())
    return y


def _popped(module: Remembers, x: Tensor) -> Tensor:
    y = x + module.seen.pop()
    module.seen.append(y.detach())
    return y


def _another_function(module: Remembers, x: Tensor) -> Tensor:
    y = module.calls.pop()(x)
    module.calls.append(lambda x: x + 1)
    return y


WAYS = [_data, _other_data, _numpy, _in_place, _data_in_a_list, _cleared, _popped, _another_function]


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.__name__)
def test_calls_know_nothing_of_each_other(how: Callable[[Remembers, Tensor], Tensor]) -> None:
    module, x = Remembers(how), torch.ones(1)
    apply, params, buffers = stateless(module)
    outs = [apply(params, buffers, x)[0].item() for _ in range(6)]
    assert outs == [outs[0]] * 6
    assert module.sum.item() == module.seen[0].item() == 0
