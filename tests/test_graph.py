"""Derivatives that torch would lose without an error, found in autograd's graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, errors, optim

pytestmark = pytest.mark.usefixtures("float64")


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class CubeOnce(Cube):
    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


@pytest.mark.parametrize("how", ["adapt", "adapt_tasks", "vmap", "grad"])
def test_a_second_derivative_that_torch_loses_is_an_error(how: str) -> None:
    """Under `@once_differentiable` torch's own answer is a meta-gradient without its second-order part."""

    def meta_loss(function: Any, gradient: Any, start: Tensor, how: str) -> Tensor:
        def loss(w: Tensor, x: Tensor) -> Tensor:
            return (function.apply(w) * x).sum()

        settings = {"optimizer": optim.sgd(0.1), "steps": 2, "gradient": gradient}
        if how == "adapt_tasks":
            return adapt_tasks(loss, start, torch.ones(2, 3), **settings).params.sum()
        if how == "vmap":
            return torch.vmap(lambda w: adapt(loss, w, torch.ones(3), **settings).params.sum())(start[None]).sum()
        return adapt(loss, start, torch.ones(3), **settings).params.sum()

    start = torch.tensor([0.5, 1.0, -0.3], requires_grad=True)
    for function, gradient in [(Cube, Unroll()), (CubeOnce, FirstOrder()), (CubeOnce, Unroll())]:

        def call(w: Tensor, function: Any = function, gradient: Any = gradient) -> Tensor:
            return meta_loss(function, gradient, w, how)

        refused = function is CubeOnce and isinstance(gradient, Unroll)
        with pytest.raises(errors.DerivativeError, match="once_differentiable") if refused else nullcontext():
            found = torch.func.grad(call)(start) if how == "grad" else torch.autograd.grad(call(start), start)[0]
            assert found.shape == (3,)
    with torch.no_grad():
        meta_loss(CubeOnce, Unroll(), start, how)


class Powers:
    """A loss that is a method, of an object that cannot be hashed."""

    def __init__(self, function: Any) -> None:
        self.function = function

    __hash__ = None

    def loss(self, w: Tensor, x: Tensor) -> Tensor:
        return (self.function.apply(w) * x).sum()


def test_each_object_whose_method_is_the_loss_is_looked_at() -> None:
    start, settings = torch.ones(3, requires_grad=True), {"optimizer": optim.sgd(0.1), "steps": 2}
    for _ in range(2):
        harmless = Powers(Cube)
        for _ in range(2):
            adapt(harmless.loss, start, torch.ones(3), **settings)
        with pytest.raises(errors.DerivativeError, match="once_differentiable"):
            adapt(Powers(CubeOnce).loss, start, torch.ones(3), **settings)
