"""Drawn optimizers: every rule and setting, a step that is finite, printed as the call that makes them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from pasted import again, smallest
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import optim
from statelessify.testing import assert_trees_close, check_grads, optimizers, param_trees, tensors
from statelessify.testing.strategies._optimizers import NOT_SMOOTH, NUMBERS, SWITCHES

NO_RULES = {"OptState", "Optimizer", "clip_by_global_norm", "clip_by_value", "from_torch", "normalize", "per_task"}
NO_RULES |= {"schedule", "to_torch_"}
CHOICES = {"muon": {"dtype", "ns_steps", "adjust_lr_fn", "ns_coefficients"}}
MATRICES = {"body": {"w": torch.tensor([[1.0, -2.0]])}, "head": torch.tensor([[0.5], [0.25]])}


def twice(optimizer: optim.Optimizer, params: Any) -> Any:
    """Two steps."""
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.step(params, tree_map(lambda p: p * 0.5 + 1, params), state)
    return params


def test_every_rule_and_setting_is_there() -> None:
    assert set(NUMBERS) == set(optim.__all__) - NO_RULES
    for rule, numbers in NUMBERS.items():
        taken = set(inspect.signature(getattr(optim, rule)).parameters) - {"unknown", "maximize"}
        assert {*numbers, *SWITCHES.get(rule, ()), *CHOICES.get(rule, ())} == taken


@given(st.data(), param_trees(requires_grad=False))
def test_two_steps(data: Any, params: Any) -> None:
    optimizer = data.draw(optimizers(params=params))
    result = twice(optimizer, params)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(result))
    assert_trees_close(twice(again(optimizer), params), result, rtol=0, atol=0)


@pytest.mark.parametrize("rule", NUMBERS)
def test_each_rule(rule: str) -> None:
    @given(optimizers(rules=(rule,), params=MATRICES))
    @settings(max_examples=20)
    def check(optimizer: optim.Optimizer) -> None:
        result = twice(optimizer, MATRICES)
        assert all(leaf.isfinite().all() for leaf in tree_leaves(result))
        assert_trees_close(twice(again(optimizer), MATRICES), result, rtol=0, atol=0)

    check()


@given(optimizers(hyperparameters="tensors", params=MATRICES))
def test_learned_numbers(optimizer: optim.Optimizer) -> None:
    numbers = optimizer.init(MATRICES).hyperparameters
    rate = numbers["lr"]
    assert (rate.dtype, rate.shape, rate.requires_grad) == (torch.float64, (), True)
    total = sum(leaf.sum() for leaf in tree_leaves(twice(optimizer, MATRICES)))
    (grad,) = torch.autograd.grad(total, [rate])
    assert grad.isfinite()


def test_learned_momentum_is_looked_at_without_a_warning() -> None:
    torch.set_warn_always(True)  # torch says it once in a process
    try:
        smallest(optimizers(rules=("sgd",), hyperparameters="tensors"), lambda drawn: settings_of(drawn)["nesterov"])
    finally:
        torch.set_warn_always(False)


@given(optimizers(hyperparameters="dicts", params=MATRICES))
def test_numbers_by_name(optimizer: optim.Optimizer) -> None:
    assert optimizer.init(MATRICES).hyperparameters["lr"].keys() == {"body.w", "head"}


@given(optimizers(hyperparameters="numbers"))
def test_plain_numbers(optimizer: optim.Optimizer) -> None:
    assert isinstance(optimizer.init({}).hyperparameters["lr"], float)


@given(st.data(), optimizers(smooth=True))
@settings(max_examples=30)
def test_smooth_steps_have_derivatives(data: Any, optimizer: optim.Optimizer) -> None:
    params, first, second = (
        data.draw(tensors((2,), dtype=torch.float64, min_value=-2, max_value=2, away_from=away))
        for away in [(), (0.0,), (0.0,)]
    )

    def updated(tree: dict[str, Tensor]) -> Tensor:
        state = optimizer.init(tree["params"])
        now, state = optimizer.step(tree["params"], tree["first"], state)
        return optimizer.step(now, tree["second"], state)[0]

    check_grads(updated, {"params": params, "first": first, "second": second}, order=1)


@pytest.mark.parametrize(
    "condition",
    [
        lambda settings: settings.get("nesterov") is True,
        lambda settings: settings.get("amsgrad") is True,
        lambda settings: settings.get("centered") is True,
        lambda settings: settings.get("decoupled_weight_decay") is True,
        lambda settings: settings.get("maximize") is True,
        lambda settings: settings.get("weight_decay") == 0.25,
    ],
    ids=["nesterov", "amsgrad", "centered", "decoupled", "maximize", "weight decay"],
)
def test_the_smallest_with(condition: Any) -> None:
    rule = smallest(optimizers(), lambda optimizer: condition(settings_of(optimizer)))
    given_ = settings_of(rule)
    assert len([name for name, value in given_.items() if value != default(rule, name)]) <= 3


def settings_of(optimizer: optim.Optimizer) -> dict[str, Any]:
    rule: Any = optimizer.init.__self__
    return {**rule.hyperparameters, **rule.switches}


def default(optimizer: optim.Optimizer, name: str) -> Any:
    rule: Any = optimizer.init.__self__
    return inspect.signature(getattr(optim, rule.name)).parameters[name].default


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rules": ("adamm",)}, r"`rules` names `adamm`, which there is not \(did you mean `adam`"),
        ({"rules": "sgd"}, r"`rules='sgd'` is str; write a tuple of names, as in `rules=\('sgd',\)`"),
        ({"rules": ()}, "`rules` is empty"),
        ({"rules": NOT_SMOOTH, "smooth": True}, "leave no rule; smooth are all but"),
        ({"rules": ("muon",), "params": {"w": torch.ones(2)}}, "leave no rule; .* Muon is for matrices only"),
        ({"hyperparameters": "floats"}, "`hyperparameters='floats'`; write one of"),
        ({"hyperparameters": "dicts"}, "without `params`, whose names they have"),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        smallest(optimizers(**options))
