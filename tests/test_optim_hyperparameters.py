"""Hyperparameters of every rule: each form of a number, different ones by name and step, switches by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    EACH_NUMBER,
    EACH_RULE,
    EACH_SWITCH,
    NUMBERS,
    REAL,
    VALUES,
    WHOLE,
    dtypes_of,
    gradients_of,
    make,
    run,
    shapes_of,
    steps_of,
    tensors_of,
    with_each,
)
from problems import assert_close
from torch import Tensor
from torch.utils._pytree import tree_leaves

from statelessify import optim

pytestmark = pytest.mark.usefixtures("float64")
FLAT = {("lion", "betas"): [0]}  # felt by a sign only
PER_PARAMETER = ("mu_product", "eta")  # slots of one number, or of as many as the hyperparameters have


def forms(rule: str, value: Any) -> dict[str, Any]:
    """One value, a number or a tensor, written in every way."""
    tensor = torch.as_tensor(value)
    short = {"body.w": tensor.expand(2, 1), "body.b": tensor.expand(1), "head.*": tensor, "tail.*": tensor.expand(2)}
    return {
        "tensor": tensor,
        "names": dict.fromkeys(shapes_of(rule), value),
        "globs": {"body.*": tensor, "head.w": value, "tail.*": value},
        "everything": {"*": tensor},
        "schedule": lambda step: value,
        "schedule of a tensor": lambda step: tensor + 0 * step,
        "schedule of schedules": lambda step: {"body.*": lambda step: tensor, "[!b]*": value},
        "dict of schedules": {"body.*": lambda step: tensor, "head.*": value, "tail.*": lambda step: value},
        "broadcast": short,
        "full": {name: tensor.expand(shape) for name, shape in shapes_of(rule).items()},
        "schedule of a dict": lambda step: short,
    }


SHAPED = ("broadcast", "full", "schedule of a dict")
FORMS = list(forms("sgd", 0.0))


def forms_of(rule: str, name: str) -> list[str]:
    return [form for form in FORMS if form not in SHAPED or (rule, name) not in WHOLE]


def assert_same_run(found: Any, expected: Any, tolerance: float = 1e-13) -> None:
    assert_close(found[0], expected[0], tolerance)
    assert found[1].slots.keys() == expected[1].slots.keys()
    for slot, tree in expected[1].slots.items():
        own = found[1].slots[slot]
        if slot in PER_PARAMETER:
            tree = {name: value.expand_as(own[name]) for name, value in tree.items()}
        assert_close(own, tree, tolerance)


@EACH_NUMBER
def test_every_form_of_a_number(rule: str, name: str) -> None:
    for dtype in dtypes_of(rule):
        params, gradients = tensors_of(rule, dtype=dtype), gradients_of(rule, dtype=dtype)
        expected = run(make(rule), params, gradients)
        for form in forms_of(rule, name)[-4 if dtype.is_complex else 0 :]:
            spec = with_each(VALUES[rule][name], lambda value, form=form: forms(rule, value)[form])
            found = run(make(rule, **{name: spec}), params, gradients)
            assert_same_run(found, expected)
            assert found[1].hyperparameters[name] is spec or found[1].hyperparameters[name] == spec


@EACH_RULE
def test_a_state_brings_its_hyperparameters_to_an_optimizer_that_has_seen_others(rule: str) -> None:
    """Plain numbers are checked once: what another state has is no less its own."""
    params, gradients = tensors_of(rule), gradients_of(rule)
    optimizer, by_name = make(rule), {"body.*": 0.1, "head.*": 0.02, "tail.*": torch.tensor(0.03)}
    run(optimizer, params, gradients)
    for lr in (by_name, 0.05, lambda step: by_name):
        other = make(rule, lr=lr)
        assert_same_run(run(optimizer, params, gradients, other.init(params)), run(other, params, gradients))


def entries(tensor: Tensor) -> dict[str, Tensor]:
    """The entries of a tensor that broadcasts to ``(2, 3)``, each under a name of its own."""
    return {f"entry.{index}": value for index, value in enumerate(tensor.expand(2, 3).flatten())}


@pytest.mark.parametrize(("rule", "name"), [pair for pair in NUMBERS if pair[0] not in REAL])
def test_a_value_per_entry_is_a_parameter_per_entry(rule: str, name: str) -> None:
    """Each entry is updated by its own number, real or complex, as if it were a parameter of its own."""
    for dtype in dtypes_of(rule):
        w, gradients = torch.randn(2, 3, dtype=dtype), [torch.randn(2, 3, dtype=dtype) for _ in range(steps_of(rule))]
        for shape in ((2, 3), (3,)):
            given = with_each(VALUES[rule][name], lambda value, shape=shape: value * (0.9 + 0.2 * torch.rand(shape)))
            spec = with_each(given, lambda values: {"w": values})
            found = run(make(rule, **{name: spec}), {"w": w}, [{"w": g} for g in gradients])[0]["w"]
            own = with_each(given, lambda values: {entry: value.item() for entry, value in entries(values).items()})
            expected = run(make(rule, **{name: own}), entries(w), map(entries, gradients))[0]
            assert_close(found.flatten(), torch.stack(list(expected.values())), 1e-13)


def slopes(learned: list[Tensor], optimizer: optim.Optimizer, data: Any) -> list[Tensor]:
    """The derivative of a number made of all that a run ends with."""
    params, state = run(optimizer, *data)
    leaves = [leaf for leaf in tree_leaves((params, state.slots)) if leaf.numel()]
    outcome = torch.stack([((leaf + 0.1) ** 3).mean() for leaf in leaves]).sum()
    return list(torch.autograd.grad(outcome, learned, allow_unused=True, materialize_grads=True))


@EACH_NUMBER
def test_the_gradient_is_one_in_every_form(rule: str, name: str) -> None:
    learned = [torch.tensor(value, requires_grad=True) for value in _numbers(VALUES[rule][name])]
    plain = tuple(learned) if isinstance(VALUES[rule][name], tuple) else learned[0]
    data = tensors_of(rule), gradients_of(rule)
    expected = slopes(learned, make(rule, **{name: plain}), data)
    assert [place for place, slope in enumerate(expected) if slope == 0] == FLAT.get((rule, name), [])
    for form in forms_of(rule, name):
        spec = with_each(plain, lambda value, form=form: forms(rule, value)[form])
        assert_close(slopes(learned, make(rule, **{name: spec}), data), expected, 1e-11)


def _numbers(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


PAIRS = pytest.mark.parametrize(
    ("rule", "name"),
    [(rule, name) for rule in VALUES for name in VALUES[rule] if isinstance(VALUES[rule][name], tuple)],
)


@PAIRS
@pytest.mark.parametrize("shift", [1, 4])
def test_the_numbers_of_a_pair_in_different_forms(rule: str, name: str, shift: int) -> None:
    params, gradients = tensors_of(rule), gradients_of(rule)
    expected = run(make(rule), params, gradients)
    known = forms_of(rule, name)
    for index in range(len(known)):
        rotated = [known[(index + shift * place) % len(known)] for place in range(len(VALUES[rule][name]))]
        pair = tuple(forms(rule, value)[form] for value, form in zip(VALUES[rule][name], rotated, strict=True))
        assert_same_run(run(make(rule, **{name: pair}), params, gradients), expected)


@PAIRS
def test_a_pair_by_name_and_step(rule: str, name: str) -> None:
    params, gradients = tensors_of(rule), gradients_of(rule)
    expected = run(make(rule), params, gradients)
    pair = VALUES[rule][name]
    tensors = tuple(map(torch.tensor, pair))
    scheduled = tuple((lambda step, value=value: value) for value in pair)
    specs: list[Any] = [
        {"body.*": pair, "[!b]*": tensors},
        {"body.*": scheduled, "[!b]*": lambda step: (*tensors[:1], *pair[1:])},
        lambda step: pair,
        lambda step: scheduled,
        lambda step: {"*": tensors},
    ]
    for spec in specs:
        assert_same_run(run(make(rule, **{name: spec}), params, gradients), expected)


def test_no_first_epsilon_is_that_of_each_dtype() -> None:
    params, gradients = tensors_of("adafactor"), gradients_of("adafactor")
    expected = run(make("adafactor", eps=(torch.finfo(torch.float64).eps, 0.1)), params, gradients)
    for eps in (
        (None, 0.1),
        (lambda step: None, {"*": 0.1}),
        {"*": (None, torch.tensor(0.1))},
        lambda step: (None, 0.1),
    ):
        assert_same_run(run(make("adafactor", eps=eps), params, gradients), expected)


# By name and by step -----------------------------------------------------------------------------------------------


def other(rule: str, name: str) -> Any:
    """Another legal value."""
    return with_each(VALUES[rule][name], lambda value: 0.95 * value)


def assert_groups_are_as_alone(rule: str, grouped: dict[str, Any], alone: Callable[[Any], dict[str, Any]]) -> None:
    """With one value per group of parameters each goes the way that it goes in an optimizer of its own."""
    params, gradients = tensors_of(rule), gradients_of(rule)
    found, state = run(make(rule, **grouped), params, gradients)
    groups = [("body.w", "body.b", "tail.0", "tail.3"), ("head.w", "tail.1", "tail.2", "tail.4")]
    for index, names in enumerate(groups):
        of = lambda tree, names=names: {name: tree[name] for name in names}
        expected, its = run(make(rule, **alone(index)), of(params), map(of, gradients))
        assert_close(of(found), expected, 1e-13)
        for slot, tree in its.slots.items():
            assert_close(of(state.slots[slot]), tree, 1e-13)


def by_name(first: Any, second: Any) -> dict[str, Any]:
    return {"body.*": first, "tail.[03]": first, "head.w": second, "tail.[!03]": second}


@EACH_NUMBER
def test_a_number_for_each_group(rule: str, name: str) -> None:
    values = VALUES[rule][name], other(rule, name)
    assert_groups_are_as_alone(rule, {name: by_name(*values)}, lambda index: {name: values[index]})
    if isinstance(values[0], tuple):
        for place in range(len(values[0])):
            pair = list(values[0])
            pair[place] = by_name(values[0][place], values[1][place])
            assert_groups_are_as_alone(
                rule,
                {name: tuple(pair)},
                lambda index, place=place: {name: (*values[0][:place], values[index][place], *values[0][place + 1 :])},
            )


@EACH_SWITCH
def test_a_switch_for_each_group(rule: str, switch: str) -> None:
    given = {"dampening": 0} if switch == "nesterov" and rule == "sgd" else {}
    assert_groups_are_as_alone(rule, given | {switch: by_name(True, False)}, lambda index: given | {switch: not index})


@EACH_RULE
def test_everything_by_name_at_once(rule: str) -> None:
    both = [VALUES[rule], {name: other(rule, name) for name in VALUES[rule]}]
    assert_groups_are_as_alone(
        rule,
        {name: by_name(both[0][name], both[1][name]) for name in VALUES[rule]} | {"maximize": by_name(True, False)},
        lambda index: both[index] | {"maximize": not index},
    )


@EACH_NUMBER
def test_a_schedule_is_a_number_per_step(rule: str, name: str) -> None:
    """Each step is one of an optimizer with that number, which goes on from the same slots."""
    params, gradients = tensors_of(rule), gradients_of(rule)
    values = [VALUES[rule][name], other(rule, name)]
    scheduled = make(rule, **{name: lambda step: values[int(step) % 2]})
    found = run(scheduled, params, gradients)
    state = scheduled.init(params)
    for index, grads in enumerate(gradients):
        now = make(rule, **{name: values[index % 2]})
        state = state._replace(hyperparameters=now.init(params).hyperparameters)
        params, state = now.step(params, grads, state)
    assert_same_run(found, (params, state))


# Zero, precision ---------------------------------------------------------------------------------------------------

POSITIVE = {("rprop", "etas"), ("adafactor", "d")}


@EACH_NUMBER
def test_a_tensor_of_zero_is_the_number_zero(rule: str, name: str) -> None:
    if (rule, name) in POSITIVE:
        return
    data = tensors_of(rule), gradients_of(rule)
    given = {"dampening": 0} if name == "momentum" and rule == "sgd" else {}  # which is of no meaning without momentum
    for place in range(len(_numbers(VALUES[rule][name]))):
        zeros = [torch.tensor(0.0, requires_grad=True), 0.0]
        ours, plain = (make(rule, **given, **{name: _with(VALUES[rule][name], place, zero)}) for zero in zeros)
        assert_close(run(ours, *data)[0], run(plain, *data)[0], 1e-13)
        assert slopes(zeros[:1], ours, data)[0].isfinite()


def _with(value: Any, place: int, new: Any) -> Any:
    return (*value[:place], new, *value[place + 1 :]) if isinstance(value, tuple) else new


@EACH_NUMBER
def test_the_dtype_of_a_parameter_stays(rule: str, name: str) -> None:
    for index, form in enumerate(forms_of(rule, name)):
        dtype = (torch.float32, torch.bfloat16)[index % 2]
        spec = with_each(VALUES[rule][name], lambda value, form=form: forms(rule, value)[form])
        start = tensors_of(rule, dtype=dtype)
        found, state = run(make(rule, **{name: spec}), start, [tensors_of(rule, dtype=dtype)] * 2)
        own = [tree for slot, tree in state.slots.items() if slot not in PER_PARAMETER]
        assert {leaf.dtype for leaf in tree_leaves((found, own))} == {dtype}


@EACH_RULE
@pytest.mark.parametrize("mapped", [False, True], ids=["step", "step under vmap"])
def test_precision_is_that_of_the_parameters_not_of_the_default(rule: str, mapped: bool) -> None:
    params, gradients = tensors_of(rule, 2), gradients_of(rule, 2)
    expected = run_tasks(make(rule), params, gradients)
    torch.set_default_dtype(torch.float32)
    try:
        found = run_tasks(make(rule), params, gradients, mapped)
    finally:
        torch.set_default_dtype(torch.float64)
    assert_close(found, expected, 1e-14)


def run_tasks(optimizer: optim.Optimizer, params: Any, gradients: Any, mapped: bool = False) -> Any:
    """Two tasks, one after the other, or mapped with all of their state, the step count too."""
    if mapped:
        state = torch.vmap(optimizer.init)(params)
        for grads in gradients:
            params, state = torch.vmap(optimizer.step)(params, grads, state)
        return params
    first, second = (
        run(optimizer, {name: value[task] for name, value in params.items()}, of_task(gradients, task))[0]
        for task in range(2)
    )
    return {name: torch.stack([first[name], second[name]]) for name in first}


def of_task(gradients: Any, task: int) -> list[dict[str, Tensor]]:
    return [{name: value[task] for name, value in grads.items()} for grads in gradients]
