"""What a rule keeps from step to step never decides the numbers of another state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statelessify import optim

pytestmark = pytest.mark.usefixtures("float64")
Params = dict[str, Tensor]
PARAMS: Params = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor([[3.0]], dtype=torch.float64)}
GRADS: Params = {"a": torch.tensor([1.0, -1.0], dtype=torch.float64), "b": torch.tensor([[2.0]], dtype=torch.float64)}
OTHER: Params = {"c": torch.tensor([1.0, 2.0], dtype=torch.float64), "d": torch.tensor([[3.0]], dtype=torch.float64)}


def rates(new: Any, old: Params = PARAMS) -> list[float]:
    """How far each parameter has gone along its gradient."""
    pairs = zip(old.values(), new.values(), GRADS.values(), strict=True)
    return [round(((p - q) / g).mean().item(), 9) for p, q, g in pairs]


def with_rate(state: Any, rate: Any, how: str) -> Any:
    """The state with another rate, in each way that a user may write it."""
    if how == "plain dict":
        return state._replace(hyperparameters={**state.hyperparameters, "lr": rate})
    if how == "copy":
        state = state._replace(hyperparameters=copy.copy(state.hyperparameters))
    elif how == "deep copy":
        state = copy.deepcopy(state)
    state.hyperparameters["lr"] = rate
    return state


HOWS = ["in place", "copy", "deep copy", "plain dict"]
EDITS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(HOWS), st.sampled_from([0.1, 0.2, {"*": 0.3}, lambda step: 0.4])),
    max_size=8,
)


@given(EDITS)
def test_each_state_has_its_own_rates(edits: list[tuple[int, str, Any]]) -> None:
    optimizer = optim.sgd(lr=0.1)
    states, expected = [optimizer.init(PARAMS)], [0.1]
    for which, how, rate in edits:
        old = which % len(states)
        value = rate["*"] if isinstance(rate, dict) else rate(0) if callable(rate) else rate
        new = with_rate(states[old], rate, how)
        if how == "in place":
            expected[old] = value
        else:
            states.append(new)
            expected.append(value)
        for index, state in enumerate(states):
            for _ in range(2):
                stepped, after = optimizer.step(PARAMS, GRADS, state)
                assert rates(stepped) == [expected[index]] * 2
                assert rates(optimizer.step(PARAMS, GRADS, after)[0]) == [expected[index]] * 2


def test_a_dict_that_is_changed_inside() -> None:
    optimizer = optim.sgd(lr={"a": 0.1, "b": 0.2})
    state = optimizer.init(PARAMS)
    for first in (0.1, 0.3, 0.5):
        state.hyperparameters["lr"]["a"] = first
        for _ in range(2):
            assert rates(optimizer.step(PARAMS, GRADS, state)[0]) == [first, 0.2]


def test_parameters_of_other_names_and_the_same_shapes() -> None:
    optimizer = optim.sgd(lr=0.1, maximize={"[ad]": True, "[bc]": False})
    for params, signs in ((PARAMS, [-1, 1]), (OTHER, [1, -1]), (PARAMS, [-1, 1])):
        state = optimizer.init(params)
        grads = dict(zip(params, GRADS.values(), strict=True))
        for _ in range(2):
            stepped, state = optimizer.step(params, grads, state)
            assert rates(stepped, params) == [0.1 * sign for sign in signs]


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_leaves_of_mixed_kinds(momentum: float) -> None:
    """With a complex leaf, or one that needs no gradient, after steps without; the graph is that of each leaf."""
    optimizer = optim.sgd(lr=0.1, momentum=momentum)
    for dtype, needed in ((torch.float64, True), (torch.complex128, True), (torch.float64, False)):
        params = {"a": torch.ones(2, dtype=dtype), "b": torch.ones(1).requires_grad_(needed)}
        state = optimizer.init(params)
        for _ in range(3):
            grads = {name: torch.ones_like(value).detach() for name, value in params.items()}
            new, state = optimizer.step(params, grads, state)
            assert [leaf.requires_grad for leaf in new.values()] == [p.requires_grad for p in params.values()]
            params = new
        one = torch.ones(())
        buffer, value = torch.zeros(()), one
        for _ in range(3):
            buffer = momentum * buffer + 1
            value = value - 0.1 * buffer
        for leaf in params.values():
            torch.testing.assert_close(leaf.detach(), value.to(leaf.dtype).expand(leaf.shape))


def test_steps_are_counted() -> None:
    """The first buffer is the gradient itself: the number of the step is not what is kept."""
    optimizer = optim.sgd(lr=0.1, momentum=0.5, dampening=0.5)
    state = optimizer.init(PARAMS)
    for _ in range(2):
        params, after = optimizer.step(PARAMS, GRADS, state)
        for _ in range(2):
            old = params
            buffer = after.slots["momentum_buffer"]["a"] / GRADS["a"]
            params, after = optimizer.step(params, GRADS, after)
            new = after.slots["momentum_buffer"]["a"] / GRADS["a"]
            torch.testing.assert_close(new, 0.5 * buffer + 0.5)
            torch.testing.assert_close(old["a"] - params["a"], 0.1 * new * GRADS["a"])
        assert after.step == 3
