"""`optim.sgd`, `optim.adam`: torch.optim as oracle, hyperparameters by name and step, derivatives, extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers import run
from problems import assert_close
from torch import Tensor

from statelessify import adapt, optim

pytestmark = pytest.mark.usefixtures("float64")
SHAPES = {"body.w": (2, 3), "body.b": (3,), "head.w": ()}


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}


# torch.optim -------------------------------------------------------------------------------------------------------

POSITIVE = st.floats(1e-4, 0.3)  # larger rates make the iteration itself unstable, and rounding grows with it
FRACTION = st.one_of(st.just(0.0), st.floats(0.01, 0.99))
DECAY = st.one_of(st.just(0.0), POSITIVE)


def against_torch(ours: optim.Optimizer, theirs: Callable[[Any], Any], seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    params = tensors(dtype)
    gradients = [tensors(dtype) for _ in range(10)]
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    reference = theirs(list(leaves.values()))
    for grads in gradients:
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        reference.step()
    found, state = run(ours, params, gradients)
    assert_close(found, {name: leaf.detach() for name, leaf in leaves.items()}, 1e-12)
    assert int(state.step) == 10
    for slot, tree in state.slots.items():
        assert_close(tree, {name: reference.state[leaf][slot] for name, leaf in leaves.items()}, 1e-12)


@given(
    seed=st.integers(0, 2**31 - 1),
    lr=POSITIVE,
    momentum=FRACTION,
    dampening=st.floats(-0.5, 1.0),
    weight_decay=DECAY,
    nesterov=st.booleans(),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_sgd_is_torch_sgd(seed: int, dampening: float, dtype: torch.dtype, **config: Any) -> None:
    config["nesterov"] = config["nesterov"] and config["momentum"] > 0
    config["dampening"] = 0.0 if config["nesterov"] else dampening
    against_torch(optim.sgd(**config), lambda leaves: torch.optim.SGD(leaves, **config), seed, dtype)


@given(
    seed=st.integers(0, 2**31 - 1),
    lr=POSITIVE,
    betas=st.tuples(FRACTION, FRACTION),
    eps=st.floats(1e-8, 0.1),
    weight_decay=DECAY,
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_adam_is_torch_adam(seed: int, dtype: torch.dtype, **config: Any) -> None:
    against_torch(optim.adam(**config), lambda leaves: torch.optim.Adam(leaves, **config), seed, dtype)


# Hyperparameters ---------------------------------------------------------------------------------------------------


def test_different_values_for_different_parameters_and_steps() -> None:
    params, grads = tensors(), tensors()
    rates = {"body.w": torch.rand(2, 3), "body.b": torch.rand(3), "head.w": torch.rand(())}
    found, _ = optim.sgd(lr=rates).step(params, grads, optim.sgd(lr=rates).init(params))
    assert_close(found, {name: params[name] - rates[name] * grads[name] for name in params})
    seen: list[Tensor] = []

    def schedule(step: Tensor) -> float:
        seen.append(step)
        return [0.1, 0.2][int(step)]

    found, _ = run(optim.sgd(lr=schedule), params, [grads, grads])
    assert_close(found, {name: params[name] - (0.1 + 0.2) * grads[name] for name in params})
    assert [int(step) for step in seen] == [0, 1]
    assert {(step.dtype, step.ndim) for step in seen} == {(torch.int64, 0)}
    pair = optim.adam(betas=lambda step: (0.9, 0.99))
    assert_close(run(pair, params, [grads])[0], run(optim.adam(betas=(0.9, 0.99)), params, [grads])[0])
    by_name = optim.adam(betas={"body.*": (0.5, 0.6), "head.*": (0.9, 0.99)})
    assert_close(run(by_name, params, [grads] * 2)[0]["head.w"], run(pair, params, [grads] * 2)[0]["head.w"])


def test_the_state() -> None:
    params = {"a": [torch.randn(2), torch.randn(())]}
    state = optim.adam(amsgrad=True).init(params)
    assert isinstance(state, optim.OptState)
    assert state.step.shape == ()
    assert state.step.dtype == torch.int64
    assert set(state.slots) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert_close(state.slots["exp_avg"], {"a": [torch.zeros(2), torch.zeros(())]})
    assert state.hyperparameters == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    assert optim.sgd().init(params).slots == {}
    frozen = [leaf.clone() for leaf in params["a"]]
    before = state.step.clone(), state.slots["exp_avg"]["a"][0].clone()
    optim.adam(amsgrad=True).step(params, params, state)
    assert_close(params["a"], frozen)
    assert_close((state.step, state.slots["exp_avg"]["a"][0]), before)


# Derivatives -------------------------------------------------------------------------------------------------------

DIFFERENTIATED: dict[str, Any] = {
    "sgd": lambda lr, a, b, c: optim.sgd(lr, momentum=a, dampening=b, weight_decay=c),
    "sgd, nesterov": lambda lr, a, b, c: optim.sgd(lr, momentum=a, weight_decay={"w": b + c}, nesterov=True),
    "adam": lambda lr, a, b, c: optim.adam(lr, betas=(a, b), eps=c, weight_decay=c),
    "adam, by name": lambda lr, a, b, c: optim.adam({"w": lr}, betas=({"*": a}, lambda step: b), eps=c, amsgrad=True),
}


@pytest.mark.parametrize("optimizer", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_finite_differences_by_start_and_every_hyperparameter(optimizer: Any) -> None:
    grads = torch.randn(3, 2)

    def after(w: Tensor, grads: Tensor, *numbers: Tensor) -> Tensor:
        params, _ = run(optimizer(*numbers), {"w": w}, [{"w": g} for g in grads])
        return params["w"]

    inputs = [torch.randn(2), grads, torch.rand(2) if "name" in str(optimizer) else torch.tensor(0.1)]
    inputs += [torch.tensor(0.7), torch.tensor(0.6), torch.tensor(0.1)]
    leaves = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(after, leaves)
    assert torch.autograd.gradgradcheck(after, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-4, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_adams_first_step_and_its_derivative_at_any_gradient(sign: float, size: float, dtype: torch.dtype) -> None:
    """From a fresh state ``p - lr * g / (|g| + eps)``, whose derivative is ``-lr * eps / (|g| + eps)^2``."""
    lr, eps = 0.1, 1e-8
    g = torch.tensor(sign * size, dtype=dtype, requires_grad=True)
    optimizer = optim.adam(lr=lr, eps=eps)
    start = torch.zeros((), dtype=dtype)
    found, _ = optimizer.step(start, g, optimizer.init(start))
    slope = torch.autograd.grad(found, g, create_graph=True)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert math.isclose(found.item(), -lr * sign * size / (size + eps), rel_tol=tolerance, abs_tol=1e-35)
    assert abs(slope.item() + lr * eps / (size + eps) ** 2) <= tolerance * lr / (size + eps)
    second = torch.autograd.grad(slope, g)[0]
    assert second.isfinite()
    if dtype == torch.float64 and 0 < size < 1:
        assert math.isclose(second.item(), 2 * lr * eps * sign / (size + eps) ** 3, rel_tol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adams_meta_gradient_at_a_gradient_of_zero(dtype: torch.dtype, amsgrad: bool) -> None:
    lr, eps = 0.1, 0.01
    curvature = torch.tensor([1.0, 2.0], dtype=dtype)
    optimizer = optim.adam(lr=lr, eps=eps, amsgrad=amsgrad)

    def one(w: Tensor) -> Tensor:
        return adapt(lambda w, c: 0.5 * (c * w**2).sum(), w, curvature, optimizer=optimizer, steps=1).params

    w = torch.zeros(2, dtype=dtype, requires_grad=True)
    expected = torch.diag(1 - lr * curvature / eps)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert_close(torch.autograd.functional.jacobian(one, w), expected, tolerance)
    assert_close(torch.func.jacrev(one)(w.detach()), expected, tolerance)
    many = lambda w: adapt(lambda w, c: (c * w**2).sum(), w, curvature, optimizer=optimizer, steps=3).params.sum()
    assert torch.autograd.grad(many(w), w)[0].isfinite().all()
    assert torch.autograd.functional.hessian(many, w).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}])
def test_sgd_keeps_apart_what_needs_no_gradient(options: dict[str, Any]) -> None:
    """An operation on a list of tensors makes all of its results require gradients where one of them does."""
    params = {"fixed": torch.ones(2), "learned": torch.ones(3, requires_grad=True)}
    grads = {name: torch.ones_like(p.detach()) for name, p in params.items()}
    optimizer = optim.sgd(lr=0.1, **options)
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.step(params, grads, state)
    assert not params["fixed"].requires_grad
    assert params["learned"].requires_grad
