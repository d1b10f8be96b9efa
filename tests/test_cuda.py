"""The same numbers on a GPU, where every tensor of a state stays beside its parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statelessify import adapt_tasks, optim, over_tasks, stateless, tree_copy

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("float64")]


@pytest.mark.parametrize("optimizer", [optim.sgd(lr=0.1, momentum=0.9), optim.adam(lr=0.1)], ids=["sgd", "adam"])
def test_a_meta_gradient_is_that_of_the_cpu(optimizer: optim.Optimizer) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    apply, params, buffers = stateless(net)
    data = torch.randn(5, 7, 3), torch.randn(5, 7, 1)

    def gradients(device: str) -> list[torch.Tensor]:
        own = tree_copy(params, "detach", device=device)
        batch = tree_copy(data, "detach", device=device)

        def loss(params: dict[str, torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return F.mse_loss(apply(params, buffers, batch[0])[0], batch[1])

        adapted = adapt_tasks(loss, own, batch, optimizer=optimizer, steps=3)
        assert adapted.opt_state.step.device.type == device
        value = over_tasks(loss, in_dims=0)(adapted.params, batch).mean()
        return [grad.cpu() for grad in torch.autograd.grad(value, list(own.values()))]

    torch.testing.assert_close(gradients("cuda"), gradients("cpu"), rtol=1e-8, atol=1e-10)
