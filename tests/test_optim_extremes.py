"""Gradients of exactly zero, tiny and huge: derivatives are finite, and those that mpmath finds with 200 digits."""

from __future__ import annotations

import functools
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from optim_naive import SPECS, Values, make, number_names, plain, with_numbers
from problems import IGNORE_SCRIPT
from torch import Tensor

from statelessify import optim

TINY, HUGE = 2.0**-100, 2.0**33  # 8e-31 and 9e9, the same numbers in every dtype
NUMBERS: dict[str, Values] = {  # those of torch, or near them; the derivative is taken by each
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1},
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "nadam": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 4e-3, "weight_decay": 0.0},
    "radam": {"lr": 1e-3, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0},  # rectifies from the sixth step on
    "adamax": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adagrad": {"lr": 1e-2, "lr_decay": 0.1, "eps": 1e-10, "weight_decay": 0.0},
    "adadelta": {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0},
    "rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.0},
    "asgd": {"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75},
    "rprop": {"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "adafactor": {"lr": 1e-2, "beta2_decay": -0.8, "eps": (1e-7, 1e-3), "d": 1.1, "weight_decay": 0.0},
    "muon": {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "eps": 1e-7, "ns_coefficients": (1.5, -0.5, 0.1)},
}
OTHERS: Values = {"weight_decay": 0, "initial_accumulator_value": 0, "t0": 1e6, "dampening": 0}
CHOICES: dict[str, list[Values]] = {
    "sgd": [{}, {"nesterov": True}],
    "adam": [{}, {"amsgrad": True}],
    "rmsprop": [{}, {"centered": True}],
    "muon": [{"ns_steps": 2}, {"ns_steps": 2, "nesterov": True}],
}
CASES = {" ".join(map(str, [rule, *choice])): (rule, choice) for rule in SPECS for choice in CHOICES.get(rule, [{}])}
MATRICES = ("adafactor", "muon")  # rules in which entries meet
COPIES = pytest.mark.parametrize("copies", [1, 4], ids=["one leaf", "stacked"])
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)], ids=str)

SEEN = [  # by one entry from step to step, again and again; the entries lie side by side in one tensor
    [0.0],
    [TINY],
    [-TINY],
    [HUGE],
    [-HUGE],
    [2.0**-27, -(2.0**-28)],  # like `eps`
    [2.0**-50],
    [1.0, -2.0, 0.5],
    [HUGE, 0.0, 0.0],
    [0.0, HUGE, TINY],
    [TINY, 0.0, -1.0],
]
VECTORS = [np.array([seen[step % len(seen)] for seen in SEEN]) for step in range(8)]
GRIDS = {
    "mixture": [[0.0, TINY, HUGE], [-HUGE, 1.0, 0.0]],
    "zero": [[0.0] * 3] * 2,
    "a row of zeros": [[0.0] * 3, [1.0, 2.0, TINY]],
    "tiny": [[TINY, -TINY, TINY], [2 * TINY, TINY, 0.0]],
    "huge": [[HUGE, -HUGE, HUGE], [2 * HUGE, HUGE, -HUGE]],
    "one huge": [[0.0, 0.0, 0.0], [0.0, HUGE, 0.0]],
}


class Exact:
    """The last parameters as a function of "p", each "g[step]" and each number; its derivatives by mpmath."""

    def __init__(self, rule: str, choice: Values, p: Any, grads: list[Any]) -> None:
        self.rule = rule
        refused = "dampening" if choice.get("nesterov") else ""
        self.numbers = {name: value for name, value in number_names(NUMBERS[rule]) if name != refused}
        usual = {name: OTHERS.get(name, value) for name, value in plain(rule, **choice).items()}
        self.values = usual | {name: value for name, value in NUMBERS[rule].items() if name != refused}
        self.arrays = {"p": np.asarray(p)} | {f"g[{step}]": np.asarray(g) for step, g in enumerate(grads)}
        self.steps = len(grads)

    def configured(self, numbers: Values) -> Values:
        return with_numbers(self.values, numbers)

    def _last(self, inputs: Values) -> Any:
        values = self.configured({name: inputs[name] for name in self.numbers})
        p, slots = inputs["p"], {}
        for step in range(self.steps):
            p = SPECS[self.rule].naive(p, inputs[f"g[{step}]"], slots, values, step + 1)
        return p

    @functools.cache  # noqa: B019
    def derivatives(self, each_entry: bool) -> dict[str, tuple[Any, Any]]:
        """By each input, with the size of what rounding is relative to.

        Of each entry by its own inputs, or of the sum of all entries.
        """
        exact = np.vectorize(mpmath.mpf, otypes=[object])
        with mpmath.workdps(200):
            inputs = {name: exact(array) for name, array in self.arrays.items()}
            inputs |= {name: mpmath.mpf(value) for name, value in self.numbers.items()}
            moved = abs(self._last(inputs) - inputs["p"])
            found = {}
            for name, x in inputs.items():
                slope = self._of_each_entry(inputs, name) if each_entry else self._of_the_sum(inputs, name)
                size = abs(slope) if each_entry else np.max(abs(slope))
                terms = self._that_cancel(name, x) * (moved if each_entry else moved.sum())
                found[name] = np.asarray(slope, dtype=float), np.asarray(size + terms, dtype=float)
            return found

    def _slope(self, inputs: Values, name: str, along: Any) -> Any:
        if name in self._dead():
            return 0 * inputs["p"]
        step = mpmath.mpf(10) ** -60
        up, down = (self._last(inputs | {name: inputs[name] + sign * step * along}) for sign in (1, -1))
        return (up - down) / (2 * step)

    def _dead(self) -> set[str]:
        dead = SPECS[self.rule].dead
        return {*dead, *(f"g[{step}]" for step in range(self.steps) if "data" in dead)}

    def _of_each_entry(self, inputs: Values, name: str) -> Any:
        return self._slope(inputs, name, 1)

    def _of_the_sum(self, inputs: Values, name: str) -> Any:
        shape = np.shape(inputs[name])
        units = np.eye(int(np.prod(shape)), dtype=int).reshape(-1, *shape)
        return np.array([self._slope(inputs, name, unit).sum() for unit in units], dtype=object).reshape(shape)

    def _that_cancel(self, name: str, x: Any) -> Any:
        """What a result moves by, over this, is as large as the terms of its derivative."""
        if name in self.arrays:
            return np.where(abs(x) >= 1, 1 / np.maximum(abs(x), 1), 0)
        return 1 / min(abs(x) or 1, abs(1 - x) or 1)


def found_by_torch(exact: Exact, dtype: torch.dtype, each_entry: bool, copies: int) -> dict[str, Tensor]:
    """The same derivatives, with several leaves that are all alike."""
    inputs = {name: torch.tensor(array, dtype=dtype) for name, array in exact.arrays.items()}
    for name, value in exact.numbers.items():  # for each entry one of its own, so that none hides another
        inputs[name] = torch.full(inputs["p"].shape if each_entry else (), value, dtype=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    numbers = {name: {"*": leaves[name]} if each_entry else leaves[name] for name in exact.numbers}
    optimizer = make(exact.rule, exact.configured(numbers))
    params: Any = dict.fromkeys("abcd"[:copies], leaves["p"])
    state = optimizer.init(params)
    for step in range(exact.steps):
        params, state = optimizer.step(params, dict.fromkeys(params, leaves[f"g[{step}]"]), state)
    total = sum(leaf.double().sum() for leaf in params.values()) / copies
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, slopes, strict=True))


def assert_exact(exact: Exact, dtype: torch.dtype, tolerance: float, each_entry: bool, copies: int) -> None:
    found = found_by_torch(exact, dtype, each_entry, copies)
    for name, (slope, size) in exact.derivatives(each_entry).items():
        error = abs(found[name].double().numpy() - slope)
        assert (error <= tolerance * size + 1e-37).all(), f"{name}: {found[name]}, not {slope}"


@functools.cache
def entries(case: str) -> Exact:
    return Exact(*CASES[case], np.linspace(-1, 2, len(SEEN)), VECTORS)


@functools.cache
def grid(case: str, name: str) -> Exact:
    return Exact(*CASES[case], np.linspace(-1, 2, 6).reshape(2, 3), [GRIDS[name]] * 2)


@PRECISIONS
@COPIES
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in MATRICES])
def test_the_derivative_of_each_entry_is_exact(case: str, copies: int, dtype: torch.dtype, tolerance: float) -> None:
    assert_exact(entries(case), dtype, tolerance, True, copies)


@PRECISIONS
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] in MATRICES])
def test_the_derivative_of_a_matrix_is_exact(case: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    assert_exact(grid(case, name), dtype, tolerance, False, 1)


# What is only finite -------------------------------------------------------------------------------------------------

EACH_RULE = pytest.mark.parametrize("rule", SPECS)


def results(rule: str, gradient: Tensor, copies: int, order: int = 1, start: float = 1, **given: Any) -> list[Tensor]:
    """The last parameters, and derivatives by the gradient and the first parameters."""
    leaves = [gradient.clone().requires_grad_(), torch.full_like(gradient, start).requires_grad_()]
    optimizer = getattr(optim, rule)(**given)
    params: Any = dict.fromkeys("abcd"[:copies], leaves[1])
    state = optimizer.init(params)
    for _ in range(8):
        params, state = optimizer.step(params, dict.fromkeys(params, leaves[0]), state)
    found, slope = list(params.values()), sum(leaf.sum() for leaf in params.values())
    for _ in range(order):
        if slope.requires_grad:
            slopes = torch.autograd.grad(
                slope, leaves, create_graph=order > 1, allow_unused=True, materialize_grads=True
            )
            found, slope = [*found, *slopes], sum((slope.sum() for slope in slopes), torch.zeros(()))
    return found


@COPIES
@pytest.mark.parametrize("name", GRIDS)
@EACH_RULE
def test_bfloat16_is_finite(rule: str, name: str, copies: int) -> None:
    found = results(rule, torch.tensor(GRIDS[name], dtype=torch.bfloat16), copies)
    assert {(each.dtype, bool(each.isfinite().all())) for each in found} == {(torch.bfloat16, True)}


IN_FLOAT16: dict[str, Values] = {  # in which the usual `eps` is zero
    "muon": {"eps": 0.1},
    "adafactor": {},
    **{rule: {"eps": 1e-3} for rule in SPECS if rule not in ("sgd", "asgd", "rprop", "lion", "adafactor", "muon")},
}


@COPIES
@pytest.mark.parametrize("name", GRIDS)
@EACH_RULE
def test_float16_is_finite(rule: str, name: str, copies: int) -> None:
    most = 4 if rule == "adafactor" else 100  # of which the square is a number, there the square of the square
    gradient = torch.tensor(GRIDS[name]).clamp(-most, most)
    found = results(rule, gradient.to(torch.float16), copies, **IN_FLOAT16.get(rule, {}))
    assert {(each.dtype, bool(each.isfinite().all())) for each in found} == {(torch.float16, True)}


SIZES = [0.0, *(10.0**exponent for exponent in (-32, -28, -24, -20, -18, -16, -12, -8, -4, 0, 4, 8))]


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EACH_RULE
def test_second_derivatives_are_finite(rule: str, dtype: torch.dtype, start: float) -> None:
    gradient = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]], dtype=dtype)
    found = {size: results(rule, size * gradient, 1, 2, start) for size in SIZES}
    assert [size for size in SIZES if not all(each.isfinite().all() for each in found[size])] == []


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
@COPIES
@EACH_RULE
def test_forward_mode_agrees_with_backward(rule: str, copies: int) -> None:
    optimizer = make(rule, plain(rule) | NUMBERS[rule])

    def after(gradient: Tensor, start: Tensor) -> Tensor:
        params: Any = dict.fromkeys("abcd"[:copies], start)
        state = optimizer.init(params)
        for _ in range(3):
            params, state = optimizer.step(params, dict.fromkeys(params, gradient), state)
        return torch.stack(list(params.values())).sum()

    for grid in GRIDS.values():
        inputs = torch.tensor(grid, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
        tangents = torch.randn_like(inputs[0]), torch.randn_like(inputs[1])
        slopes = torch.func.grad(after, (0, 1))(*inputs)
        terms = torch.stack([slope * tangent for slope, tangent in zip(slopes, tangents, strict=True)])
        along = torch.func.jvp(after, inputs, tangents)[1]
        assert (along - terms.sum()).abs() <= 1e-10 * terms.abs().sum()
