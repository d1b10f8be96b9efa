"""What each rule refuses as a hyperparameter, by name, before anything is computed; the ranges are torch.optim's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizers import EACH_NUMBER, EACH_RULE, EACH_SWITCH, SWITCHES, VALUES, WHOLE, make, refused, run, tensors_of
from torch import Tensor

from statelessify import adapt, adapt_tasks, optim
from statelessify.errors import (
    HyperparameterError,
    HyperparameterNameError,
    NamesError,
    ShapeError,
    TaskError,
    TreeError,
)

pytestmark = pytest.mark.usefixtures("float64")
THEIRS = {name.lower(): cls for name, cls in vars(torch.optim).items() if isinstance(cls, type)}


def places(rule: str, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The hyperparameter with `value`, or ``value(usual)``, for each number, and what the error calls that."""
    change = value if callable(value) else lambda usual: value
    usual = VALUES[rule][name]
    if not isinstance(usual, tuple):
        yield name, change(usual)
        return
    for place in range(len(usual)):
        yield f"{name}\\[{place}\\]", (*usual[:place], change(usual[place]), *usual[place + 1 :])


# Names -------------------------------------------------------------------------------------------------------------


@EACH_RULE
def test_a_name_that_does_not_exist(rule: str) -> None:
    for name in (*VALUES[rule], *SWITCHES[rule]):
        hint = f"did you mean `{name}`" if len(name) > 1 else "it has .*`d`"
        with pytest.raises(HyperparameterNameError, match=f"`{rule}` has no `{name}_`.*{hint}") as caught:
            make(rule, **{f"{name}_": 0.1})
        assert isinstance(caught.value, TypeError)
    for name in ("foreach", "fused", "capturable", "differentiable"):
        with pytest.raises(HyperparameterNameError, match=f"`{rule}` has no `{name}`.*leave it out"):
            make(rule, **{name: False})


# Values ------------------------------------------------------------------------------------------------------------

NUMBERS = [-1.0, -0.1, -1e-9, -0.0, 0.0, 1e-9, 0.5, 1.0, 1 + 1e-9, 2.0, 100.0]


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule in VALUES if rule in THEIRS for name in VALUES[rule]])
def test_the_range_is_that_of_torch(rule: str, name: str) -> None:
    for number in NUMBERS:
        for called, value in places(rule, name, number):
            if (rule, name) == ("muon", "eps") and number < 0:  # a divisor that torch forgot to check
                accepted = False
            else:
                accepted = accepted_by_torch(rule, {**VALUES[rule], name: value})
            if accepted:
                make(rule, **{name: value})
                continue
            with pytest.raises(HyperparameterError, match=f"`{called}={number!r}` is out of range"):
                make(rule, **{name: value})
            with pytest.raises(HyperparameterError, match=f"`{name}.*'head.w'.*={number!r}` is out of range"):
                make(rule, **{name: {"body.*": VALUES[rule][name], "head.w": value, "tail.*": VALUES[rule][name]}})


def accepted_by_torch(rule: str, config: dict[str, Any]) -> bool:
    try:
        THEIRS[rule]([torch.nn.Parameter(torch.ones(2, 2))], **config)
    except ValueError:
        return False
    return True


def test_lions_range() -> None:
    for name, value in {"lr": -0.1, "weight_decay": -0.1}.items():
        with pytest.raises(HyperparameterError, match=f"`{name}=-0.1` is out of range"):
            optim.lion(**{name: value})
    for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1)):
        with pytest.raises(HyperparameterError, match=r"`betas\[[01]\]=.*at least 0.0 and below 1.0"):
            optim.lion(betas=betas)


@EACH_NUMBER
def test_what_is_no_finite_number(rule: str, name: str) -> None:
    for bad in (math.nan, math.inf, -math.inf, "0.1", True, [0.1], 1j, b"1"):
        for called, value in places(rule, name, bad):
            with pytest.raises(HyperparameterError, match=f"`{called}="):
                make(rule, **{name: value})
            with pytest.raises(HyperparameterError, match=f"`{name}.*body"):
                make(rule, **{name: {"body.*": value, "[!b]*": VALUES[rule][name]}})


@EACH_NUMBER
def test_the_wrong_number_of_numbers(rule: str, name: str) -> None:
    usual = VALUES[rule][name]
    wrong: list[Any] = [(), (0.5, 0.5), None]
    if isinstance(usual, tuple):
        wrong = [(), usual[:1], (*usual, 0.5), 0.5, None, torch.tensor(0.5), torch.tensor(usual), list(usual)]
        wrong += [(usual, *usual[1:]), {"*": 0.5}, {"*": usual[:1]}, {"*": ({"*": usual[0]}, *usual[1:])}]
    for value in wrong:
        with pytest.raises(HyperparameterError, match=f"`{name}"):
            make(rule, **{name: value})
        with pytest.raises(HyperparameterError, match=f"`{name}"):
            run(make(rule, **{name: lambda step, value=value: value}), tensors_of(rule), [tensors_of(rule)])


@pytest.mark.parametrize("config", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(config: Any) -> None:
    with pytest.raises(HyperparameterError, match="nesterov"):
        optim.sgd(nesterov=True, **config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("ns_steps", value) for value in (-1, 100, 2.0, True, None, "5")],
        *[("adjust_lr_fn", value) for value in ("arbitrary", 1, True)],
        *[("dtype", value) for value in (torch.int64, torch.complex64, "float32", float)],
    ],
)
def test_what_else_muon_refuses(name: str, value: Any) -> None:
    with pytest.raises(HyperparameterError, match=f"`{name}="):
        optim.muon(**{name: value})


# Values that a schedule returns ------------------------------------------------------------------------------------


def later(good: Any, bad: Any) -> Any:
    return lambda step: bad if step == 1 else good


def square(params: Any, batch: Tensor) -> Tensor:
    return torch.stack([((value - batch) ** 2).sum() for value in params.values()]).sum()


@EACH_NUMBER
def test_a_bad_value_of_a_schedule(rule: str, name: str) -> None:
    params, grads = tensors_of(rule), tensors_of(rule)
    for bad in (math.nan, -math.inf, "0.1", True):
        for called, value in places(rule, name, bad):
            optimizer = make(rule, **{name: later(VALUES[rule][name], value)})
            now, state = run(optimizer, params, [grads])
            with refused(HyperparameterError, f"`{called}=", now, grads, state):
                optimizer.step(now, grads, state)


@EACH_NUMBER
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_a_bad_value_of_a_schedule_in_the_inner_loop(rule: str, name: str, backend: Any) -> None:
    params = tensors_of(rule)
    for called, value in list(places(rule, name, math.nan))[-1:]:
        options: Any = {"optimizer": make(rule, **{name: later(VALUES[rule][name], value)}), "steps": 2}
        with pytest.raises(HyperparameterError, match=f"`{called}="):
            adapt(square, params, torch.ones(()), **options)
        with pytest.raises(HyperparameterError, match=f"`{called}="):
            adapt_tasks(square, params, torch.ones(3), backend=backend, **options)


# Values that do not fit the parameters -----------------------------------------------------------------------------

BAD_SPECS: dict[str, tuple[Any, Any, str]] = {
    "matches nothing": (NamesError, lambda v: {"*": v, "haed.*": v}, "`haed.*` matches no.*did you mean `head.w`"),
    "not all": (NamesError, lambda v: {"[!h]*": v}, "`head.w` is matched by no key"),
    "twice": (NamesError, lambda v: {"*": v, "head.w": v}, "`head.w` is matched by `\\*`, `head.w`"),
    "none": (NamesError, {}, "`body.b` is matched by no key"),
    "no name": (NamesError, lambda v: {0: v, "*": v}, "`0`"),
    "a vector for all": (HyperparameterError, torch.ones(3), "shape \\(3,\\)"),
    "a shape too many": (HyperparameterError, {"*": torch.ones(3)}, "'\\*'.* has shape \\(3,\\)"),
    "too many dimensions": (HyperparameterError, {"*": torch.ones(1, 1, 1)}, "shape \\(1, 1, 1\\)"),
    "per task": (HyperparameterError, optim.per_task(torch.ones(3)), "adapt_tasks"),
    "per task by name": (HyperparameterError, {"*": optim.per_task(torch.ones(3))}, "adapt_tasks"),
    "nested": (HyperparameterError, lambda v: {"b*": v, "[!b]*": {"head.w": v, "tail.*": v}}, "\\[!b\\]"),
    "complex": (HyperparameterError, torch.tensor(0.1 + 1j), "complex"),
    "complex by name": (HyperparameterError, lambda v: {"b*": v, "[!b]*": torch.tensor(1j)}, "complex"),
}


@EACH_RULE
@pytest.mark.parametrize("bad", BAD_SPECS)
def test_a_value_that_does_not_fit_the_parameters(rule: str, bad: str) -> None:
    error, spec, words = BAD_SPECS[bad]
    params = grads = tensors_of(rule)
    for name, usual in VALUES[rule].items():
        for _, value in places(rule, name, spec):
            with refused(error, words, params):
                run(make(rule, **{name: value}), params, [grads])
            optimizer = make(rule, **{name: later(usual, value)})
            now, state = run(optimizer, params, [grads])
            with refused(error, words, now, grads, state):
                optimizer.step(now, grads, state)


@pytest.mark.parametrize(("rule", "name"), sorted(WHOLE))
@pytest.mark.parametrize(("shape", "own"), [((4, 1), (4, 1)), ((4, 2), (4, 1)), ((4, 2), (1, 2)), ((2, 2), (2, 2))])
def test_a_number_of_a_whole_parameter_has_no_entries(rule: str, name: str, shape: Any, own: Any) -> None:
    """It acts where rows and columns are mixed: a value per entry has no meaning."""
    params = {"w": torch.randn(shape)}
    for _, value in places(rule, name, {"*": torch.full(own, -0.5 if rule == "adafactor" else 0.5)}):
        with refused(HyperparameterError, name, params):
            run(make(rule, **{name: value}), params, [params])


BAD_REPLACEMENTS: dict[str, tuple[Any, Any]] = {
    "a vector": (HyperparameterError, torch.ones(2, 3)),
    "out of range": (HyperparameterError, -0.1),
    "no number": (HyperparameterError, "0.1"),
    "another name": (NamesError, {"haed.*": 0.1, "*": 0.1}),
}


@EACH_RULE
@pytest.mark.parametrize("bad", BAD_REPLACEMENTS)
@pytest.mark.parametrize("in_place", [False, True], ids=["another dict", "in place"])
def test_a_bad_value_put_into_the_state(rule: str, bad: str, in_place: bool) -> None:
    error, value = BAD_REPLACEMENTS[bad]
    params, grads = tensors_of(rule), tensors_of(rule)
    now, state = run(make(rule), params, [grads])
    if in_place:
        state.hyperparameters["lr"] = value
    else:
        state = state._replace(hyperparameters={**state.hyperparameters, "lr": value})
    with refused(error, "lr", now, grads, state):
        make(rule).step(now, grads, state)


def test_a_shaped_value_of_other_parameters() -> None:
    """Without slots, nothing else in the state has a shape."""
    optimizer = optim.sgd(lr={"w": torch.ones(3)})
    state, params = optimizer.init({"w": torch.zeros(3)}), {"w": torch.zeros(())}
    with refused((HyperparameterError, ShapeError), "`w`", params, state):
        optimizer.step(params, params, state)


@pytest.mark.parametrize("rule", ["sgd", "rmsprop"])
def test_momentum_put_into_a_state_without(rule: str) -> None:
    params = grads = tensors_of(rule)
    optimizer = make(rule, momentum=0)
    state = optimizer.init(params)
    state = state._replace(hyperparameters={**state.hyperparameters, "momentum": 0.9})
    with refused((HyperparameterError, TreeError), "momentum", params, grads, state):
        optimizer.step(params, grads, state)


# Switches, tasks ---------------------------------------------------------------------------------------------------


@EACH_SWITCH
def test_a_switch_is_true_or_false(rule: str, switch: str) -> None:
    for bad in (1, 0, 0.5, "yes", None, torch.tensor(True), lambda step: True, optim.per_task(torch.ones(3)), (True,)):
        for value in (bad, {"body.*": True, "[!b]*": bad}):
            with pytest.raises(HyperparameterError, match=f"`{switch}="):
                make(rule, **{switch: value})
    given = {"dampening": 0} if rule == "sgd" else {}
    for value, words in {"haed.*": "did you mean", "body.*": "is matched by no key"}.items():
        with refused(NamesError, f"in `{switch}`.*{words}|{words}"):
            make(rule, **given, **{switch: {value: True}}).init(tensors_of(rule))


@pytest.mark.parametrize("tree", [0.1, torch.tensor(0.1), {}, {"a": 0.1}, [torch.tensor(1.0)], None], ids=str)
def test_per_task_takes_tensors_with_a_task_dimension(tree: Any) -> None:
    with pytest.raises(HyperparameterError, match="per_task"):
        optim.per_task(tree)


@EACH_NUMBER
def test_one_value_per_task_fits_parameters_and_tasks(rule: str, name: str) -> None:
    params = tensors_of(rule)
    options: Any = {"steps": 1}
    for _, value in places(rule, name, optim.per_task(torch.full((3,), 0.5))):
        with pytest.raises(HyperparameterError, match=r"per_task.*adapt_tasks"):
            adapt(square, params, torch.ones(()), optimizer=make(rule, **{name: value}), **options)
        with pytest.raises(TaskError, match=r"`batches` has 4.*has 3|has 3.*has 4"):
            adapt_tasks(square, params, torch.ones(4), optimizer=make(rule, **{name: value}), **options)
    for _, value in places(rule, name, optim.per_task({"*": torch.full((3, 3), 0.5)})):
        with pytest.raises(HyperparameterError, match=f"`{name}.*shape \\(3,\\)"):
            adapt_tasks(square, params, torch.ones(3), optimizer=make(rule, **{name: value}), **options)
    for _, value in places(rule, name, optim.per_task(torch.full((3, 2), 0.5))):
        with pytest.raises(HyperparameterError, match=f"`{name}.*shape \\(3, 2\\)"):
            adapt_tasks(square, params, torch.ones(3), optimizer=make(rule, **{name: value}), **options)
