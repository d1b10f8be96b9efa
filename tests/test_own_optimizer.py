"""An optimizer of ones own: what its step returns is checked, and what it was given stays as it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from statelessify import adapt, adapt_tasks, optim
from statelessify.errors import DtypeError, MutationError, ShapeError, TreeError

pytestmark = pytest.mark.usefixtures("float64")


def loss(params: Any, batch: Tensor) -> Tensor:
    return ((params["w"] - batch) ** 2).sum() + (params["v"] * batch).sum()


def in_place(params: Any, grads: Any, state: Any) -> Any:
    with torch.no_grad():
        return {name: p.sub_(0.1 * grads[name]) for name, p in params.items()}, state


def in_place_on_gradients(params: Any, grads: Any, state: Any) -> Any:
    with torch.no_grad():
        return {name: p - grads[name].mul_(0.1) for name, p in params.items()}, state


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "state forgotten": (lambda p, g, s: {k: p[k] - g[k] for k in p}, TreeError, r"returned dict.*`\(params, state\)`"),
    "a list": (lambda p, g, s: [p, s], TreeError, "returned list"),
    "three": (lambda p, g, s: (p, s, s), TreeError, "not a pair"),
    "a parameter dropped": (lambda p, g, s: ({"w": p["w"]}, s), TreeError, "only the first has `v`"),
    "a parameter more": (lambda p, g, s: ({**p, "u": p["w"]}, s), TreeError, "only the second has `u`"),
    "another shape": (lambda p, g, s: ({**p, "w": p["w"].mean(0, keepdim=True)}, s), ShapeError, "`w`"),
    "no tensor": (lambda p, g, s: ({**p, "w": 0.1}, s), ShapeError, "float of parameter `w`"),
    "another dtype": (lambda p, g, s: ({**p, "v": p["v"].float()}, s), DtypeError, "`v`"),
    "in place": (in_place, MutationError, "in place"),
    "in place on gradients": (in_place_on_gradients, MutationError, "in place"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_a_wrong_step_is_named(wrong: Any, elementwise: bool, many: bool) -> None:
    step, error, words = wrong
    optimizer = optim.Optimizer(lambda p: optim.OptState(torch.tensor(0), {}, {}), step, elementwise)
    params = {"w": torch.randn(3), "v": torch.randn(3)}
    before = {name: p.clone() for name, p in params.items()}
    run: Any = partial(adapt_tasks, backend="loop") if many else adapt
    batch = torch.randn((2, 3) if many else 3)
    if many and elementwise and step is in_place:  # all tasks begin with one and the same tensor: torch refuses
        error, words = RuntimeError, "single memory location"
    with pytest.raises(error, match=words):
        run(loss, params, batch, optimizer=optimizer, steps=1)
    if step not in (in_place, in_place_on_gradients):
        assert all(torch.equal(params[name], before[name]) for name in params)


def test_a_right_step_is_left_alone() -> None:
    optimizer = optim.Optimizer(lambda p: (), lambda p, g, s: ({k: p[k] - 0.1 * g[k] for k in p}, s))
    params = {"w": torch.randn(3), "v": torch.randn(3)}
    batch = torch.randn(3)
    found = adapt(loss, params, batch, optimizer=optimizer, steps=3)
    expected = adapt(loss, params, batch, optimizer=optim.sgd(lr=0.1), steps=3)
    assert all(torch.allclose(found.params[name], expected.params[name], rtol=1e-14) for name in params)


def faster(params: Any, grads: Any, state: optim.OptState) -> Any:
    """Gradient descent whose rate depends on the gradient: its own for each task."""
    lr = state.hyperparameters["lr"]
    new = {name: p - lr * grads[name] for name, p in params.items()}
    rate = lr / (1 + sum(g.square().mean() for g in grads.values()))
    return new, state._replace(step=state.step + 1, hyperparameters={"lr": rate})


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_a_hyperparameter_that_a_step_changes_is_each_tasks_own(backend: Any) -> None:
    """Also where the optimizer says of itself that no entry depends on another."""
    begin = lambda p: optim.OptState(torch.tensor(0), {"lr": torch.tensor(0.1)}, {})
    optimizer = optim.Optimizer(begin, faster, elementwise=True)
    params, batches = {"w": torch.randn(3), "v": torch.randn(3)}, torch.randn(2, 3)
    found = adapt_tasks(loss, params, batches, optimizer=optimizer, steps=3, backend=backend)
    for index, batch in enumerate(batches):
        expected = adapt(loss, params, batch, optimizer=optimizer, steps=3)
        assert all(torch.allclose(found.params[name][index], expected.params[name], rtol=1e-12) for name in params)
        assert torch.allclose(found.opt_state.hyperparameters["lr"][index], expected.opt_state.hyperparameters["lr"])
