"""Meta-gradients in eager code through what torch itself cannot differentiate twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statelessify import optim, stateless
from statelessify.testing import check_meta_grads

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = {
    "multi margin": lambda out: F.multi_margin_loss(out, torch.tensor([0, 1, 2, 0]), p=2),
    "multilabel margin": lambda out: F.multilabel_margin_loss(
        out.tanh(), torch.tensor([[0, -1, 0], [1, 2, -1], [2, 0, -1], [0, -1, 2]])
    ),
    "ctc": lambda out: F.ctc_loss(
        out.log_softmax(-1).unsqueeze(1), torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    apply, params, buffers = stateless(nn.Linear(2, 3), params="detach")

    def loss(params: Any, x: Tensor) -> Tensor:
        return LOSSES[name](apply(params, buffers, x)[0])

    check_meta_grads(loss, params, torch.randn(4, 2), optimizer=optim.sgd(lr=torch.tensor(0.1)), steps=2)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str) -> None:
    apply, params, buffers = stateless(nn.EmbeddingBag(5, 3, mode=mode, padding_idx=1), params="detach")

    def loss(params: Any, bags: Tensor) -> Tensor:
        return apply(params, buffers, bags)[0].sin().sum()

    bags = torch.tensor([[0, 1, 3], [2, 2, 4]])
    check_meta_grads(loss, params, bags, optimizer=optim.sgd(lr=torch.tensor(0.1)), steps=2)
