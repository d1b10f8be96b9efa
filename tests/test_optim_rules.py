"""Derivatives of every rule: by finite differences, in every mode of torch, and of a plain loop in a naive formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_naive import SPECS, Values, configs, make, number_names, plain, with_numbers
from problems import IGNORE_SCRIPT, assert_close
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statelessify import adapt

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(IGNORE_SCRIPT)]
FEW = settings(max_examples=max(settings().max_examples // 20, 3))
Shapes = dict[str, tuple[int, ...]]
FEW_LEAVES: Shapes = {"w": (2,), "v": ()}
STACKED: Shapes = {"a": (), "b": (), "c": (), "d": ()}
MATRICES: Shapes = {"w": (2, 3), "v": (2, 1)}
EACH_RULE = pytest.mark.parametrize("rule", SPECS)
EITHER = pytest.mark.parametrize("stacked", [False, True], ids=["each leaf", "stacked"])


def shapes_of(rule: str, stacked: bool) -> Shapes:
    return MATRICES if rule == "muon" or (rule == "adafactor" and stacked) else STACKED if stacked else FEW_LEAVES


def size_of(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def tree(shapes: Shapes, vector: Tensor) -> dict[str, Tensor]:
    parts = vector.split([torch.Size(shape).numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    """Couples all entries; its slopes, of either sign, are bounded whatever an optimizer does."""
    v = torch.cat([leaf.flatten() for leaf in params.values()])
    return ((1 + batch**2) * (v - batch).cos()).sum() + (v.sum() * batch.sum()).sin()


# Inputs: one vector, data, and each number of a rule -----------------------------------------------------------------


class Unrolled:
    """Some steps of a rule as a function of (parameters, data, each number); the result is parameters and state."""

    def __init__(self, rule: str, values: Values, shapes: Shapes, steps: int = 3) -> None:
        self.rule, self.values, self.shapes, self.steps = rule, values, shapes, steps
        if values.get("nesterov") and "dampening" in values:  # only the number zero is no dampening
            values = {name: value for name, value in values.items() if name != "dampening"}
        self.numbers = dict(number_names(values))
        self.names = ["params", "data", *self.numbers]

    def inputs(self) -> list[Tensor]:
        size = size_of(self.shapes)
        values = [torch.tensor(value) for value in self.numbers.values()]
        return [each.requires_grad_() for each in (torch.randn(size), 3 * torch.rand(self.steps, size) - 1.5, *values)]

    def __call__(self, params: Tensor, data: Tensor, *numbers: Tensor) -> Tensor:
        values = with_numbers(self.values, dict(zip(self.numbers, numbers, strict=True)))
        start, batches = tree(self.shapes, params), lambda step, params: data[step]
        found = adapt(loss, start, batches, optimizer=make(self.rule, values), steps=self.steps)
        return torch.cat([leaf.flatten() for leaf in tree_leaves([found.params, found.opt_state.slots])])

    def naive(self, params: Tensor, data: Tensor, *numbers: Tensor) -> Tensor:
        """The parameters only, by a loop in plain torch."""
        values = with_numbers(self.values, dict(zip(self.numbers, numbers, strict=True)))
        params = tree(self.shapes, params)
        slots: dict[str, Values] = {name: {} for name in params}
        for step, batch in enumerate(data):
            grads = torch.autograd.grad(loss(params, batch), list(params.values()), create_graph=True)
            params = {
                name: SPECS[self.rule].naive(params[name], grad, slots[name], values, step + 1)
                for name, grad in zip(params, grads, strict=True)
            }
        return torch.cat([leaf.flatten() for leaf in params.values()])


def unrolled(rule: str, stacked: bool = False, steps: int | None = None, **values: Any) -> Unrolled:
    steps = steps or (8 if rule == "radam" else 3)  # RAdam does not rectify before
    return Unrolled(rule, plain(rule, **values), shapes_of(rule, stacked), steps)


def gradients(value: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True, **options)


DRAWN: dict[str, Any] = {"data": st.data(), "seed": st.integers(0, 2**31 - 1)}


def generated(rule: str, data: st.DataObject, seed: int) -> Unrolled:
    torch.manual_seed(seed)
    values, stacked = data.draw(configs(rule)), data.draw(st.booleans())
    steps = data.draw(st.sampled_from([5, 8])) if rule == "radam" else 3
    return Unrolled(rule, values, shapes_of(rule, stacked), steps)


# Finite differences --------------------------------------------------------------------------------------------------


@EACH_RULE
@FEW
@given(**DRAWN)
def test_finite_differences(rule: str, data: st.DataObject, seed: int) -> None:
    fn = generated(rule, data, seed)
    assert torch.autograd.gradcheck(fn, fn.inputs(), atol=1e-6, rtol=1e-5, fast_mode=True)


@EACH_RULE
def test_finite_differences_of_second_order(rule: str) -> None:
    fn = unrolled(rule)
    assert torch.autograd.gradgradcheck(fn, fn.inputs(), atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("count", [1, 4], ids=["one leaf", "stacked"])
@pytest.mark.parametrize("rule", [rule for rule in SPECS if rule not in ("adafactor", "muon")])
def test_finite_differences_of_complex_parameters(rule: str, count: int) -> None:
    optimizer = make(rule, plain(rule))

    def after(params: Tensor, *gradients: Tensor) -> Tensor:
        leaves: Any = list(params.unbind())
        state = optimizer.init(leaves)
        for grads in gradients:
            leaves, state = optimizer.step(leaves, list(grads.unbind()), state)
        return torch.stack(leaves)

    steps = 7 if rule == "radam" else 3
    inputs = [torch.randn(count, 2, dtype=torch.complex128).requires_grad_() for _ in range(1 + steps)]
    assert torch.autograd.gradcheck(after, inputs, atol=1e-6, rtol=1e-5, fast_mode=True)


# What is reached -----------------------------------------------------------------------------------------------------

REACHED: dict[str, Values] = {  # where clamps hold, on either side
    "rprop": {"step_sizes": (0.06, 0.1)},
    "adafactor": {"eps": (1.0, 2.0)},
    "muon": {"eps": 2.0},
}


@EITHER
@EACH_RULE
def test_every_input_is_reached_save_what_only_has_a_sign(rule: str, stacked: bool) -> None:
    fn = unrolled(rule, stacked, steps=8, **REACHED.get(rule, {}))
    dead = SPECS[rule].dead
    assert set(dead) <= set(fn.names)
    inputs = fn.inputs()
    result = fn(*inputs)[: None if rule == "asgd" else size_of(fn.shapes)]  # `t0` is for ASGD's average
    found = dict(zip(fn.names, gradients((torch.randn_like(result) * result).sum(), inputs), strict=True))
    assert {name for name, value in found.items() if not value.any()} == set(dead)
    assert all(value.isfinite().all() for value in found.values())


# Modes of torch ------------------------------------------------------------------------------------------------------


@EACH_RULE
@FEW
@given(**DRAWN)
def test_forward_mode_and_functional_transforms_agree_with_backward(rule: str, data: st.DataObject, seed: int) -> None:
    fn = generated(rule, data, seed)
    inputs = fn.inputs()
    result = fn(*inputs)
    weights, tangents = torch.randn_like(result), tuple(map(torch.randn_like, inputs))
    expected = gradients((weights * result).sum(), inputs)
    constants = tuple(each.detach() for each in inputs)

    everything = tuple(range(len(inputs)))
    found = torch.func.grad(lambda *inputs: (weights * fn(*inputs)).sum(), everything)(*constants)
    assert_close(found, expected, 1e-11)

    primal, along = torch.func.jvp(fn, constants, tangents)
    assert_close(primal, result.detach(), 1e-12)
    directional = sum((slope * tangent).sum() for slope, tangent in zip(expected, tangents, strict=True))
    assert_close((weights * along).sum(), directional, 1e-10)


@EITHER
@EACH_RULE
def test_the_jacobians_of_both_directions_are_that_of_backward(rule: str, stacked: bool) -> None:
    fn = unrolled(rule, stacked)
    inputs = fn.inputs()
    constants, everything = tuple(each.detach() for each in inputs), tuple(range(len(inputs)))
    result = fn(*inputs)
    rows = [gradients(entry, inputs, retain_graph=True) for entry in result]
    expected = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    assert_close(torch.func.jacrev(fn, everything)(*constants), expected, 1e-11)
    assert_close(torch.func.jacfwd(fn, everything)(*constants), expected, 1e-11)


# A plain loop --------------------------------------------------------------------------------------------------------


@EACH_RULE
@FEW
@given(**DRAWN)
def test_a_plain_loop_with_a_naive_formula(rule: str, data: st.DataObject, seed: int) -> None:
    fn = generated(rule, data, seed)
    inputs = fn.inputs()
    expected = fn.naive(*inputs)
    found = fn(*inputs)[: len(expected)]
    assert_close(found, expected, 1e-11)
    weights = torch.randn_like(expected)
    slopes, naive = (gradients((weights * value).sum(), inputs, create_graph=True) for value in (found, expected))
    assert_close(slopes, naive, 1e-10)
    if all(value.grad_fn is not None for value in slopes[:2]):
        mixed = [sum((value**2).sum() for value in each) for each in (slopes, naive)]
        assert_close(*(gradients(value, inputs) for value in mixed), 1e-8)
