"""`adapt_tasks` with every optimizer: one hyperparameter per task, rules of ones own, gradient transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_close, fresh, gradients, mlp, one_by_one, regression, regression_batch
from torch import Tensor

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks, tree_stack, tree_unstack

pytestmark = pytest.mark.usefixtures("float64")
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "vmap", "loop"])


def per_task_forms(rates: Tensor, shaped: Tensor) -> dict[str, tuple[Any, Any]]:
    """A hyperparameter for all tasks, and what task `t` has of it."""
    return {
        "tensor": (optim.per_task(rates), lambda t: rates[t]),
        "dict": (
            optim.per_task({"*.weight": rates, "*.bias": shaped}),
            lambda t: {"*.weight": rates[t], "*.bias": shaped[t]},
        ),
        "inside a dict": (
            {"first.bias": optim.per_task(shaped), "*.weight": 0.1},
            lambda t: {"first.bias": shaped[t], "*.weight": 0.1},
        ),
        "one for all": (rates[0], lambda t: rates[0]),
        "dict of tensors": ({"*": rates[0]}, lambda t: {"*": rates[0]}),
        "broadcast": ({"*.bias": shaped[0], "*.weight": 0.1}, lambda t: {"*.bias": shaped[0], "*.weight": 0.1}),
    }


@pytest.mark.parametrize("form", per_task_forms(torch.ones(3), torch.ones(3, 3)))
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_one_hyperparameter_per_task(rule: str, form: str) -> None:
    learned = [torch.rand(3, requires_grad=True), torch.rand(3, 3, requires_grad=True)]
    value, of_task = per_task_forms(*learned)[form]
    make = getattr(optim, rule)
    params, batches = mlp(), regression_batch(3)
    each = [
        adapt(regression, params, batch, optimizer=make(lr=of_task(t), weight_decay=0.1), steps=2).params
        for t, batch in enumerate(tree_unstack(batches))
    ]
    expected = tree_stack(each)
    unused: Any = {"allow_unused": True, "materialize_grads": True}
    meta = torch.autograd.grad(over_tasks(regression, in_dims=0)(expected, batches).sum(), learned, **unused)
    for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}):
        found = adapt_tasks(regression, params, batches, optimizer=make(lr=value, weight_decay=0.1), steps=2, **choices)
        assert_close(found.params, expected)
        outer = over_tasks(regression, in_dims=0)(found.params, batches).sum()
        assert_close(torch.autograd.grad(outer, learned, **unused), meta)


def normalized() -> optim.Optimizer:
    """Not elementwise: divides by the norm of all gradients of the task; the state is any tree."""

    def init(params: Any) -> Any:
        return [torch.zeros(()), ("kept", torch.tensor(0))]

    def step(params: Any, grads: Any, state: Any) -> Any:
        norm = torch.stack([(grad**2).sum() for grad in grads.values()]).sum().sqrt()
        seen, (word, count) = state
        seen = 0.5 * seen + norm
        new = {name: value - 0.1 * grads[name] / (seen + 1) for name, value in params.items()}
        return new, [seen, (word, count + 1)]

    return optim.Optimizer(init, step)


def normalized_momentum() -> optim.Optimizer:
    """Not elementwise either, in a state that looks like that of an elementwise rule."""
    sgd = optim.sgd(lr=0.1, momentum=0.5)

    def step(params: Any, grads: Any, state: Any) -> Any:
        norm = torch.stack([(grad**2).sum() for grad in grads.values()]).sum().sqrt()
        return sgd.step(params, {name: grad / (norm + 1) for name, grad in grads.items()}, state)

    return optim.Optimizer(sgd.init, step)


def elementwise() -> optim.Optimizer:
    return optim.Optimizer(lambda p: (), lambda p, g, s: ({k: p[k] - 0.1 * g[k].tanh() for k in p}, s), True)


def on_slots() -> optim.Optimizer:
    """Elementwise with `OptState`, and a slot that is not like the parameters."""

    def init(params: Any) -> Any:
        return optim.OptState(torch.tensor(0), {"lr": 0.1}, {"total": torch.zeros(()), "m": params})

    def step(params: Any, grads: Any, state: Any) -> Any:
        m = {name: 0.5 * state.slots["m"][name] + grad for name, grad in grads.items()}
        total = state.slots["total"] + torch.stack([value.sum() for value in m.values()]).sum()
        new = {name: value - state.hyperparameters["lr"] * m[name] for name, value in params.items()}
        return new, optim.OptState(state.step + 1, state.hyperparameters, {"total": total, "m": m})

    return optim.Optimizer(init, step, elementwise=True)


@MODES
@pytest.mark.parametrize("make", [normalized, normalized_momentum, elementwise, on_slots])
def test_an_optimizer_of_ones_own(make: Any, gradient: Any) -> None:
    params, batches = fresh(mlp()), regression_batch(3)
    options: Any = {"optimizer": make(), "steps": 3, "gradient": gradient}
    expected = one_by_one(regression, params, batches, **options)
    meta = gradients(expected.params["first.weight"].sum(), params)
    for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}):
        found = adapt_tasks(regression, params, batches, **options, **choices)
        assert_close(found, expected)
        assert_close(gradients(found.params["first.weight"].sum(), params), meta)
        once = adapt_tasks(regression, params, batches, **(options | {"steps": 1}), **choices)
        again = adapt_tasks(
            regression, once.params, batches, opt_state=once.opt_state, in_dims=0, **(options | {"steps": 2}), **choices
        )
        assert_close(again.params, expected.params)


@MODES
@BACKENDS
def test_gradients_are_transformed_task_by_task(backend: Any, gradient: Any) -> None:
    def clip(grads: Any) -> Any:
        norm = torch.stack([(grad**2).sum() for grad in grads.values()]).sum().sqrt()
        return {name: grad / (1 + norm) for name, grad in grads.items()}

    params, batches = fresh(mlp()), regression_batch(3)
    options: Any = {"optimizer": optim.adam(lr=0.1), "steps": 2, "grad_transform": clip, "gradient": gradient}
    expected = one_by_one(regression, params, batches, **options)
    found = adapt_tasks(regression, params, batches, backend=backend, chunk_size=2, **options)
    assert_close(found, expected)
    assert_close(
        gradients(found.params["first.bias"].sum(), params), gradients(expected.params["first.bias"].sum(), params)
    )


def test_complex_parameters() -> None:
    params, batches = {"w": torch.randn(3, dtype=torch.complex128)}, torch.randn(4, 3, dtype=torch.complex128)
    loss = lambda p, b: (p["w"] - b).abs().pow(2).sum() + (p["w"].conj() * b).real.sum()
    for optimizer in (optim.adam(lr={"w": torch.tensor([0.1, 0.2, 0.3])}), optim.sgd(lr=0.1, momentum=0.5)):
        expected = one_by_one(loss, params, batches, optimizer=optimizer, steps=2)
        for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 3}):
            found = adapt_tasks(loss, params, batches, optimizer=optimizer, steps=2, **choices)
            assert_close(found, expected)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("backend", ["auto", "vmap", "loop"])
def test_a_step_that_changes_its_hyperparameters_is_heard(elementwise: bool, scheduled: bool, backend: Any) -> None:
    """A rate that decays in the state itself, beside a number that may follow a schedule."""
    scale: Any = (lambda step: 0.5) if scheduled else 0.5

    def init(params: Tensor) -> optim.OptState:
        return optim.OptState(torch.tensor(0), {"lr": torch.tensor(0.4), "scale": scale}, {})

    def step(params: Tensor, grads: Tensor, state: optim.OptState) -> tuple[Tensor, optim.OptState]:
        values = state.hyperparameters
        factor = values["scale"](state.step) if callable(values["scale"]) else values["scale"]
        later = {**values, "lr": values["lr"] * 0.5}
        return params - factor * values["lr"] * grads, optim.OptState(state.step + 1, later, {})

    optimizer = optim.Optimizer(init, step, elementwise=elementwise)
    loss = lambda w, b: ((w - b) ** 2).sum()
    w, b = torch.zeros(2), torch.randn(4, 2)
    options: Any = {"optimizer": optimizer, "steps": 3}
    found = adapt_tasks(loss, w, b, backend=backend, **options)
    expected = [adapt(loss, w, each, **options) for each in b]
    torch.testing.assert_close(found.params, torch.stack([each.params for each in expected]))
    torch.testing.assert_close(found.opt_state.hyperparameters["lr"], torch.full((4,), 0.05))
    assert found.opt_state.hyperparameters["scale"] is scale


def test_a_rate_per_task_beside_a_schedule() -> None:
    rates = torch.tensor([0.1, 0.2, 0.3])
    decay = lambda step: 0.1 * (step + 1)
    loss = lambda w, b: ((w - b) ** 2).sum()
    w, b = torch.ones(2), torch.randn(3, 2)
    both = optim.sgd(lr=optim.per_task(rates), weight_decay=decay)
    found = adapt_tasks(loss, w, b, optimizer=both, steps=3).params
    each = [
        adapt(loss, w, one, optimizer=optim.sgd(lr=rate, weight_decay=decay), steps=3).params
        for one, rate in zip(b, rates, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(each))
