"""Weight normalization, whose second derivative is wrong in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from statelessify import adapt, optim, stateless
from statelessify.testing import check_grads, check_meta_grads

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_second_derivatives_are_those_that_differences_say(dim: int | None) -> None:
    apply, params, _ = stateless(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=dim), params="detach")
    x = torch.randn(4, 3)
    check_grads(lambda p: apply(p, {}, x)[0].tanh(), params, order=2, modes=("reverse",))


def test_meta_gradients() -> None:
    apply, params, _ = stateless(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), params="detach")

    def loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (apply(params, {}, batch)[0].tanh() ** 2).sum()

    check_meta_grads(loss, params, torch.randn(4, 3), torch.randn(4, 3), optimizer=optim.adam(eps=0.1), steps=2)


def test_values_are_those_of_the_module() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    apply, params, _ = stateless(module)
    x = torch.randn(2, 2, 4)
    torch.testing.assert_close(apply(params, {}, x)[0], module(x))
    batch = adapt(lambda p, x: apply(p, {}, x)[0].sum(), params, x, optimizer=optim.sgd(lr=0.0), steps=1)
    torch.testing.assert_close(batch.params, dict(params))
