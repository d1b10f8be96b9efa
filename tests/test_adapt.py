"""`adapt`: closed forms, finite differences, oracles, what goes from step to step, trees, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    assert_close,
    fresh,
    gradients,
    mlp,
    pull,
    recurrent,
    regression,
    regression_batch,
)
from torch import Tensor, nn

from statelessify import FirstOrder, Unroll, adapt, optim, stateless

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.FirstOrder:UserWarning"),  # tested in test_gradient.py
]
SEEDS = st.integers(0, 2**31 - 1)
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
OPTIMIZERS = {
    "sgd": lambda lr: optim.sgd(lr=lr),
    "momentum": lambda lr: optim.sgd(lr=lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda lr: optim.adam(lr=lr, eps=0.1),
}
RULES = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# Closed forms and finite differences -------------------------------------------------------------------------------


@given(seed=SEEDS, size=st.integers(1, 4), steps=st.integers(1, 5))
def test_a_quadratic_contracts_by_a_power_of_one_minus_lr_h(seed: int, size: int, steps: int) -> None:
    torch.manual_seed(seed)
    root = torch.randn(size, size)
    hessian = root @ root.T / size
    start, lr = torch.randn(size, requires_grad=True), torch.tensor(0.1, requires_grad=True)

    def run(start: Tensor, lr: Tensor) -> Any:
        return adapt(lambda w, h: 0.5 * w @ h @ w, start, hessian, optimizer=optim.sgd(lr=lr), steps=steps)

    contraction = torch.eye(size) - lr.detach() * hessian
    power = [torch.linalg.matrix_power(contraction, k) for k in range(steps + 1)]
    adapted = run(start, lr)
    points = [p @ start.detach() for p in power]
    assert_close(adapted.params.detach(), points[-1])
    assert_close(adapted.losses.detach(), torch.stack([0.5 * w @ hessian @ w for w in points[:-1]]))
    by_start, by_lr = torch.autograd.functional.jacobian(lambda w, r: run(w, r).params, (start, lr))
    assert_close(by_start, power[-1])
    assert_close(by_lr, -steps * hessian @ points[-2])
    assert_close(torch.func.jacrev(lambda w: run(w, lr.detach()).params)(start.detach()), power[-1])


@RULES
@pytest.mark.parametrize("carried", [False, True])
def test_finite_differences_of_the_meta_loss_to_second_order(make: Any, carried: bool) -> None:
    names, start = zip(*mlp().items(), strict=True)
    inputs = [*start, *regression_batch(shots=3), torch.tensor(0.1), torch.randn(())]

    def loss(params: Any, offset: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        value = regression(params, batch)
        return value + offset * params["first.bias"].sum(), torch.tanh(offset + value)

    def meta_loss(*inputs: Tensor) -> Tensor:
        params, batch, (lr, offset) = dict(zip(names, inputs[:3], strict=True)), inputs[3:5], inputs[5:]
        if not carried:
            offset = offset * 0
        adapted = adapt(loss, params, batch, optimizer=make(lr), steps=2, carry=offset)
        return regression(adapted.params, batch) + adapted.losses.sum() + adapted.carry * carried

    leaves = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(meta_loss, leaves)
    assert torch.autograd.gradgradcheck(meta_loss, leaves)


def test_second_derivatives_of_the_meta_loss_through_a_norm() -> None:
    """The third derivative of the fused kernels is wrong in plain torch."""
    x, c = torch.randn(2, 4), torch.randn(4)

    def loss(w: Tensor, batch: Tensor) -> Tensor:
        return (F.layer_norm(w * batch, (4,)) @ c).sum() ** 2

    def meta_loss(w: Tensor) -> Tensor:
        return loss(adapt(loss, w, x[0], optimizer=optim.sgd(lr=0.1), steps=1).params, x[1])

    assert torch.autograd.gradgradcheck(meta_loss, torch.randn(4, requires_grad=True))


# Oracles -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, steps=st.integers(1, 4))
def test_sgd_is_the_plain_loop_with_torch_optim(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    params, batch = fresh(mlp()), regression_batch()
    adapted = adapt(regression, params, batch, optimizer=optim.sgd(lr=0.1, weight_decay=0.1), steps=steps)
    plain = {name: value.clone() for name, value in params.items()}
    outer = torch.optim.SGD(plain.values(), lr=0.1, weight_decay=0.1, differentiable=True)
    losses = []
    for _ in range(steps):
        here = {name: value.clone() for name, value in plain.items()}  # the step writes in place
        losses.append(regression(here, batch))
        for value, grad in zip(plain.values(), gradients(losses[-1], here, create_graph=True).values(), strict=True):
            value.grad = grad
        outer.step()
    assert_close(adapted.params, plain)
    assert_close(adapted.losses, torch.stack(losses))
    query = regression_batch()
    assert_close(gradients(regression(adapted.params, query), params), gradients(regression(plain, query), params))


def test_adam_reaches_what_torch_adam_reaches() -> None:
    params, batch = mlp(), regression_batch()
    plain = fresh(params)
    outer = torch.optim.Adam(plain.values(), lr=0.1)
    for _ in range(10):
        outer.zero_grad()
        regression(plain, batch).backward()
        outer.step()
    adapted = adapt(regression, params, batch, optimizer=optim.adam(lr=0.1), steps=10)
    assert_close({name: value.detach() for name, value in adapted.params.items()}, plain)


# What goes from step to step ---------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("momentum", [0.1, None])
def test_carried_buffers_are_what_plain_training_leaves(gradient: Any, momentum: float | None) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 1))
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    x, y = regression_batch(shots=5)

    def loss(params: Any, buffers: Any, batch: Any) -> Any:
        out, buffers = apply(params, buffers, x)
        return F.mse_loss(out, y), buffers

    optimizer = optim.sgd(lr=0.1)
    adapted = adapt(loss, params, None, optimizer=optimizer, steps=3, carry=buffers, gradient=gradient)
    outer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        outer.zero_grad()
        F.mse_loss(module(x), y).backward()
        outer.step()
    assert_close(adapted.carry, dict(module.named_buffers()))
    assert_close(adapted.params, dict(module.named_parameters()))


@given(seed=SEEDS, steps=st.integers(1, 4), first_order=st.booleans())
def test_a_hidden_state_carries_its_gradient(seed: int, steps: int, first_order: bool) -> None:
    torch.manual_seed(seed)
    start, hidden, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(3)
    gradient = FirstOrder() if first_order else Unroll()

    def run(w: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        params = {"w": w}
        adapted = adapt(recurrent, params, x, optimizer=optim.sgd(lr=0.1), steps=steps, carry=hidden, gradient=gradient)
        return adapted.params["w"], adapted.carry

    w, h = start, hidden
    for _ in range(steps):
        value, following = recurrent({"w": (copy := w.clone())}, h, x)
        grad = torch.autograd.grad(value, copy, create_graph=True)[0]
        # the carry of the oracle must hang on `w` itself, which `copy` does
        w, h = w - 0.1 * (grad.detach() if first_order else grad), following
    assert_close(run(start, hidden), (w, h))
    weights = torch.randn(2, 3)

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return (weights[0] * w + weights[1] * h).sum()

    expected = torch.autograd.grad(outer(w, h), (start, hidden))
    assert_close(torch.autograd.grad(outer(*run(start, hidden)), (start, hidden)), expected)
    functional = torch.func.grad(lambda w, h: outer(*run(w, h)), argnums=(0, 1))
    assert_close(functional(start.detach(), hidden.detach()), expected)


@MODES
@RULES
def test_twice_k_steps_are_two_k_steps(make: Any, gradient: Any) -> None:
    params, batch = fresh(mlp()), regression_batch()
    lr = torch.tensor(0.1, requires_grad=True)
    leaves = {**params, "lr": lr}
    options: Any = {"optimizer": make(lr), "gradient": gradient}
    once = adapt(regression, params, batch, steps=6, **options)
    half = adapt(regression, params, batch, steps=3, **options)
    again = adapt(regression, half.params, batch, steps=3, opt_state=half.opt_state, **options)
    assert_close(again._replace(losses=torch.cat([half.losses, again.losses])), once)
    assert int(once.opt_state.step) == 6
    results = [gradients(regression(each.params, batch), leaves) for each in (once, again)]
    assert_close(*results)


def test_a_schedule_goes_on_where_it_stopped() -> None:
    params = {"w": torch.zeros(2)}
    optimizer = optim.sgd(lr=lambda step: [0.1, 0.01, 0.02, 0.03][int(step)])
    once = adapt(pull, params, torch.ones(2), optimizer=optimizer, steps=4)
    half = adapt(pull, params, torch.ones(2), optimizer=optimizer, steps=2)
    again = adapt(pull, half.params, torch.ones(2), optimizer=optimizer, steps=2, opt_state=half.opt_state)
    assert_close(again.params, once.params)


@MODES
def test_a_callable_batch_is_called_once_a_step_in_order(gradient: Any) -> None:
    params, data = fresh(mlp()), [regression_batch() for _ in range(3)]
    x = torch.randn(4, 2, requires_grad=True)
    seen: list[int] = []

    def batch_at(step: int, current: Any) -> Any:
        seen.append(step)
        assert current.keys() == params.keys()
        assert not any(value.requires_grad for value in current.values())
        if step == 0:
            assert_close(current, {name: value.detach() for name, value in params.items()})
        return x, data[step][1]

    adapted = adapt(regression, params, batch_at, optimizer=optim.sgd(lr=0.1), steps=3, gradient=gradient)
    assert seen == [0, 1, 2]
    current: Any = params
    for _, y in data:
        current = adapt(regression, current, (x, y), optimizer=optim.sgd(lr=0.1), steps=1, gradient=gradient).params
    assert_close(adapted.params, current)
    regression(adapted.params, data[0]).backward()
    assert seen == [0, 1, 2]
    assert (x.grad is not None) == (gradient == Unroll())


def test_gradients_are_transformed_before_each_update() -> None:
    params, target = {"w": torch.randn(3, requires_grad=True)}, torch.randn(3)

    def clip(grads: Any) -> Any:
        return {name: grad / (1 + grad.norm()) for name, grad in grads.items()}

    adapted = adapt(pull, params, target, optimizer=optim.sgd(lr=0.1), steps=3, grad_transform=clip)
    w = params["w"]
    for _ in range(3):
        w = w - 0.1 * (g := 4 * (w - target) ** 3) / (1 + g.norm())
    assert_close(adapted.params, {"w": w})
    assert_close(gradients(pull(adapted.params, target + 1), params), gradients(pull({"w": w}, target + 1), params))


@MODES
def test_no_steps_give_back_what_went_in(gradient: Any) -> None:
    params, carry = {"w": torch.randn(3, requires_grad=True)}, {"h": torch.randn(2)}
    calls: list[int] = []
    batch = lambda step, params: calls.append(step)
    adapted = adapt(pull, params, batch, optimizer=optim.adam(), steps=0, carry=carry, gradient=gradient)
    assert calls == []
    assert_close(adapted.params, params)
    assert_close(adapted.carry, carry)
    assert adapted.losses.shape == (0,)
    assert adapted.losses.dtype == torch.float64
    assert_close(adapted.opt_state, optim.adam().init(params))
    assert_close(gradients(pull(adapted.params, torch.ones(3)), params), gradients(pull(params, torch.ones(3)), params))
