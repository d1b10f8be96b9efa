"""`check_optimizer`: right optimizers pass, of ours, of torch and learned ones; wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import VALUES, WHOLE, learned_numbers, make
from torch import Tensor

from statelessify import optim
from statelessify.errors import HyperparameterError
from statelessify.testing import check_optimizer

pytestmark = pytest.mark.usefixtures("float64")

TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adafactor": torch.optim.Adafactor,
}  # Muon's computes in bfloat16
MATRICES = {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}


@pytest.mark.parametrize("rule", VALUES)
def test_our_rules_are_right(rule: str) -> None:
    numbers = {name: value for name, value in learned_numbers(rule).items() if (rule, name) not in WHOLE}
    options: Any = {"params": MATRICES if rule == "muon" else None, "steps": 7 if rule == "radam" else 3, "entries": 1}
    check_optimizer(make(rule, **numbers), **options)


@pytest.mark.parametrize("rule", TORCH)
def test_our_rules_do_what_torchs_do(rule: str) -> None:
    reference = lambda params: TORCH[rule](params, **VALUES[rule])
    check_optimizer(getattr(optim, rule)(**VALUES[rule]), reference, steps=7 if rule == "radam" else 3, entries=0)


@given(
    st.sampled_from(["sgd", "adam", "rmsprop", "adagrad", "adamax"]),
    st.floats(0.01, 0.5),
    st.integers(2, 4),
    st.integers(0, 1000),
)
@settings(max_examples=30)
def test_a_right_optimizer_is_no_alarm(rule: str, lr: float, steps: int, seed: int) -> None:
    params = {"w": torch.randn(2, generator=torch.Generator().manual_seed(seed))}
    numbers = {**VALUES[rule], "lr": lr}
    reference = lambda params: TORCH[rule](params, **numbers)
    learned = getattr(optim, rule)(**{**numbers, "lr": torch.tensor(lr)})
    check_optimizer(learned, reference, params=params, steps=steps, entries=1, seed=seed)


def test_the_second_order_complex_parameters_and_groups() -> None:
    check_optimizer(optim.sgd(lr=torch.tensor(0.1), momentum=0.9), steps=2, order=2, params=torch.ones(2))
    check_optimizer(optim.adam(lr=0.1), params={"z": torch.randn(2, dtype=torch.complex128)}, steps=2)
    check_optimizer(optim.sgd(lr={"m*": torch.rand(2, 3), "[nv]*": torch.tensor(0.1)}), steps=2)


def test_a_rate_in_float32() -> None:
    rate = torch.tensor(0.1, dtype=torch.float32)
    check_optimizer(optim.sgd(lr=rate, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), entries=0)


class State(NamedTuple):
    memory: Any


def learned_optimizer(theta: Tensor, elementwise: bool = True) -> optim.Optimizer:
    def step(params: Any, grads: Any, state: State) -> Any:
        memory = {name: torch.tanh(theta[0] * m + theta[1] * grads[name]) for name, m in state.memory.items()}
        return {name: p - theta[2] * memory[name] for name, p in params.items()}, State(memory)

    return optim.Optimizer(lambda params: State({n: torch.zeros_like(p) for n, p in params.items()}), step, elementwise)


def test_a_learned_optimizer() -> None:
    theta = torch.tensor([0.5, 1.0, 0.1], requires_grad=True)
    check_optimizer(learned_optimizer(theta))
    assert theta.tolist() == [0.5, 1.0, 0.1]


# Of torch ------------------------------------------------------------------------------------------------------------


def test_an_optimizer_of_torch() -> None:
    check_optimizer(torch.optim.SGD, optim.sgd())
    rate = torch.tensor(0.1, requires_grad=True)
    check_optimizer(lambda p: torch.optim.SGD(p, lr=rate, differentiable=True), optim.sgd(lr=0.1))
    check_optimizer(lambda p: torch.optim.Adam(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1, foreach=False))


def test_the_first_momentum_buffer_of_torch_is_cut() -> None:
    with pytest.raises(AssertionError) as caught:
        check_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, differentiable=True))
    for word in ("leaf `grads.matrix`: the derivative by autograd is wrong", "`.detach()`", "check_optimizer("):
        assert word in str(caught.value)


def test_adam_of_torch_has_no_slope_at_zero() -> None:
    with pytest.raises(AssertionError, match="make the derivative by `grads` NaN or infinite"):
        check_optimizer(lambda p: torch.optim.Adam(p, lr=0.1, differentiable=True))


# Mistakes ------------------------------------------------------------------------------------------------------------


class Own:
    """Adam, with one mistake in it."""

    def __init__(self, mistake: str = "") -> None:
        self.mistake, self.calls = mistake, 0

    def init(self, params: Any) -> optim.OptState:
        zeros = {slot: {name: torch.zeros_like(p) for name, p in params.items()} for slot in ("m", "v")}
        counted = torch.float32 if self.mistake == "counter" else torch.int64
        return optim.OptState(
            torch.zeros((), dtype=counted), {"lr": torch.tensor(0.1), "beta": torch.tensor(0.9)}, zeros
        )

    def step(self, params: Any, grads: Any, state: optim.OptState) -> Any:
        self.calls += 1
        lr, beta = state.hyperparameters["lr"], state.hyperparameters["beta"]
        count = state.step + 1
        if self.mistake == "hidden":
            count = torch.tensor(self.calls)
        if self.mistake == "cut":
            beta = beta.detach()
        new: Any = {}
        slots: Any = {"m": {}, "v": {}}
        for name, p in params.items():
            g = -grads[name] if self.mistake == "maximize" else grads[name]
            before = state.slots["m"][name]
            m = beta * before + (1 - beta) * (g.detach() if self.mistake == "buffer" and state.step == 0 else g)
            v = 0.99 * state.slots["v"][name] + 0.01 * g * g
            if self.mistake == "whole":
                v = v.mean().expand_as(v).clone()
            if self.mistake == "in place":
                state.slots["v"][name].copy_(v)
            if self.mistake == "gradients":
                grads[name].data.mul_(0.5)
            m_hat = m / (1 - beta ** (count - 1 if self.mistake == "bias" and count > 1 else count))
            v_hat = v / (1 - 0.99**count)
            root = v_hat.sqrt() if self.mistake == "root" else (v_hat + 1e-30).sqrt()
            new[name] = p - lr * m_hat / (root + 0.1)
            slots["m"][name], slots["v"][name] = m, v
        if self.mistake == "narrow":
            new = {name: p.to(torch.float32) for name, p in new.items()}
        if self.mistake == "lost":
            slots["m"] = state.slots["m"]
        if self.mistake == "structure":
            slots["extra"] = slots["m"]
        return new, optim.OptState(state.step + 1, state.hyperparameters, slots)


def test_averages_that_go_down() -> None:
    reference = lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True)
    check_optimizer(optim.adam(lr=0.1, amsgrad=True), reference, steps=3, entries=0)
    with pytest.raises(AssertionError, match="after step 2 of 3"):
        check_optimizer(optim.adam(lr=0.1), reference, steps=3)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.1, betas=(0.9, 0.99), eps=0.1)


def own(mistake: str = "") -> optim.Optimizer:
    one = Own(mistake)
    return optim.Optimizer(one.init, one.step, elementwise=True)


MISTAKES: dict[str, tuple[Callable[..., Any] | None, list[str]]] = {
    "maximize": (adam, ["after step 1 of 5", "it moves in the opposite direction (`maximize`)", "leaf `matrix`"]),
    "bias": (adam, ["after step 2 of 5", "the optimizer", "the reference"]),
    "lost": (adam, ["after step 2 of 5"]),
    "counter": (None, ["goes on with 16777216", "float32", "int64"]),
    "cut": (None, ["leaf `hyperparameters.beta`", "is wrong", "`.detach()`"]),
    "buffer": (None, ["leaf `grads.matrix`", "`.detach()`"]),
    "in place": (None, ["`step` wrote into `state`, which it was given", "leaf `state.2.v.matrix`"]),
    "gradients": (None, ["`step` wrote into `grads`"]),
    "root": (None, ["gradients that are zero at all steps make the derivative by `grads` NaN"]),
    "whole": (None, ["it says `elementwise=True`, but task 0"]),
    "hidden": (None, ["2 and then 3 steps are not 5 steps"]),
    "narrow": (None, ["step 1 returns other parameters than it takes", "float32"]),
    "structure": (None, ["a state of another structure"]),
}


def test_without_a_mistake() -> None:
    check_optimizer(own(), adam)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_named(mistake: str) -> None:
    reference, words = MISTAKES[mistake]
    with pytest.raises(AssertionError) as caught:
        check_optimizer(own(mistake), reference)
    for word in (*words, "reproduce: check_optimizer("):
        assert word in str(caught.value)


def test_a_learned_number_that_is_cut() -> None:
    theta = torch.tensor([0.5, 1.0, 0.1], requires_grad=True)
    whole = learned_optimizer(theta)
    cut = lambda params, grads, state: learned_optimizer(theta + 0 * theta.detach()).step(params, grads, state)
    check_optimizer(whole._replace(step=cut))
    cut = lambda params, grads, state: learned_optimizer(0 * theta + theta.detach()).step(params, grads, state)
    with pytest.raises(AssertionError, match=r"leaf `closed.0 of shape \(3,\)`"):
        check_optimizer(whole._replace(step=cut))


def test_schedules_are_followed() -> None:
    """Only so far as there are steps: torch's know no shorter way to a late one."""
    learned = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    rate = optim.schedule(torch.optim.lr_scheduler.StepLR, learned, step_size=1, gamma=0.5)

    def reference(leaves: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(leaves, lr=0.25)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    check_optimizer(optim.sgd(lr=rate), reference, steps=2, entries=1)
    with pytest.raises(AssertionError, match="after step 2 of 2 the parameters are wrong"):
        check_optimizer(optim.sgd(lr=learned), reference, steps=2, entries=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": 3}, "is int"),
        ({"reference": 3}, "`reference` is int"),
        ({"steps": 1}, "too few"),
        ({"order": 3}, "is not 1 or 2"),
    ],
)
def test_misuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HyperparameterError, match=words):
        check_optimizer(**{"optimizer": optim.sgd(lr=0.1), **options})
