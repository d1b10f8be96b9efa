"""What a step is given: gradients like the parameters, and a state of this very rule, its options and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import EACH_RULE, REAL, VALUES, gradients_of, make, refused, run, tensors_of
from problems import assert_close
from torch import Tensor
from torch.utils._pytree import tree_map

from statelessify import adapt, adapt_tasks, optim, over_tasks, tree_stack
from statelessify.errors import DtypeError, ShapeError, TreeError

pytestmark = pytest.mark.usefixtures("float64")


def warm(rule: str, **given: Any) -> tuple[optim.Optimizer, Any, Any, Any]:
    """An optimizer after a step: with parameters, gradients and state."""
    optimizer, grads = make(rule, **given), tensors_of(rule)
    return optimizer, *_swapped(grads, *run(optimizer, tensors_of(rule), [grads]))


def _swapped(grads: Any, params: Any, state: Any) -> tuple[Any, Any, Any]:
    return params, grads, state


# Gradients ---------------------------------------------------------------------------------------------------------


def changed(**entries: Any) -> Any:
    return lambda grads: {**grads, **{name.replace("_", "."): value for name, value in entries.items()}}


BAD_GRADIENTS: dict[str, tuple[Any, Any, str]] = {
    "missing": (TreeError, lambda grads: dict(list(grads.items())[1:]), "only the first has `body.w`"),
    "extra": (TreeError, changed(odd=torch.ones(2)), "only the second has `odd`"),
    "another name": (TreeError, lambda grads: {name.replace("head", "haed"): g for name, g in grads.items()}, "haed.w"),
    "a list": (TreeError, lambda grads: list(grads.values()), "different structures"),
    "nested": (DtypeError, lambda grads: {**grads, "head.w": {"w": grads["head.w"]}}, "`head.w` is dict"),
    "one tensor": (TreeError, lambda grads: grads["head.w"], "different structures"),
    "nothing": (TreeError, lambda grads: None, "different structures"),
    "empty": (TreeError, lambda grads: {}, "only the first has"),
    "a pair": (DtypeError, changed(head_w=(1.0, 2.0)), "`head.w`"),
    "a number": (DtypeError, changed(head_w=0.0), "gradient of `head.w` is float, not a tensor"),
    "another shape": (ShapeError, changed(body_b=torch.ones(2)), r"gradient of `body.b` has shape \(2,\)"),
    "a shape that broadcasts": (ShapeError, changed(body_w=torch.ones(1, 1)), r"`body.w` has shape \(1, 1\)"),
    "another precision": (DtypeError, changed(head_w=torch.ones((), dtype=torch.float32)), "float32.*is torch.float64"),
    "an integer": (DtypeError, changed(head_w=torch.ones((), dtype=torch.int64)), "int64.*is torch.float64"),
    "complex": (DtypeError, changed(head_w=torch.ones((), dtype=torch.complex128)), "complex128.*is torch.float64"),
}


@EACH_RULE
@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_gradients_are_like_the_parameters(rule: str, bad: str) -> None:
    error, change, words = BAD_GRADIENTS[bad]
    optimizer, params, grads, state = warm(rule)
    wrong = change(grads)
    if isinstance(wrong, dict) and rule == "muon" and bad in ("another precision", "an integer", "complex"):
        wrong["head.w"] = wrong["head.w"].expand(4, 2)
    with refused(error, words, params, wrong, state):
        optimizer.step(params, wrong, state)


@EACH_RULE
def test_sparse_gradients_are_as_dense_ones(rule: str) -> None:
    optimizer, params, grads, state = warm(rule)
    sparse = {name: grad.to_sparse() if grad.ndim else grad for name, grad in grads.items()}
    assert_close(optimizer.step(params, sparse, state), optimizer.step(params, grads, state), 0.0)


@EACH_RULE
def test_what_is_returned_may_be_changed_in_place(rule: str) -> None:
    """Neither the state nor what was given lies in the memory of the new parameters."""
    for given in ({}, {"t0": 1e6}) if rule == "asgd" else ({},):  # with no average yet
        optimizer, params, grads, state = warm(rule, **given)
        now, after = optimizer.step(params, grads, state)
        before = tree_map(torch.clone, (params, grads, state.slots, after.slots))
        for value in now.values():
            value.add_(1)
        assert_close((params, grads, state.slots, after.slots), before, 0.0)


# No gradient counts as zero ----------------------------------------------------------------------------------------

NAMES = ("body.b", "tail.0", "tail.3", "head.w")


def without(grads: dict[str, Tensor]) -> dict[str, Any]:
    return {name: None if name in NAMES else grad for name, grad in grads.items()}


def zeroed(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(grad) if name in NAMES else grad for name, grad in grads.items()}


@EACH_RULE
def test_no_gradient_is_zero(rule: str) -> None:
    params, gradients = tensors_of(rule), gradients_of(rule)
    # The first without any: there is a state to go on from, and a state that has seen nothing.
    for first in (0, 1):
        expected = run(make(rule), params, [*gradients[:first], *map(zeroed, gradients[first:])])
        assert_close(run(make(rule), params, [*gradients[:first], *map(without, gradients[first:])]), expected, 0.0)
    none = dict.fromkeys(params)
    zero = {name: torch.zeros_like(value) for name, value in params.items()}
    assert_close(run(make(rule), params, [none, none]), run(make(rule), params, [zero, zero]), 0.0)


@EACH_RULE
def test_no_gradient_is_zero_under_vmap(rule: str) -> None:
    params, gradients = tensors_of(rule), gradients_of(rule, 3)
    optimizer = make(rule)

    def steps(params: Any, gradients: Any) -> Any:
        return run(optimizer, params, map(without, gradients))

    expected = torch.vmap(lambda gradients: run(optimizer, params, map(zeroed, gradients)))(gradients)
    assert_close(torch.vmap(steps, in_dims=(None, 0))(params, gradients), expected)
    assert_close(over_tasks(lambda gradients: steps(params, gradients), in_dims=0)(gradients), expected)
    dims = {name: None if name in NAMES else 0 for name in params}
    first = torch.vmap(optimizer.step, in_dims=(None, dims, None))
    assert_close(
        first(params, without(gradients[0]), optimizer.init(params)),
        torch.vmap(optimizer.step, in_dims=(None, 0, None))(params, zeroed(gradients[0]), optimizer.init(params)),
    )


@EACH_RULE
@pytest.mark.parametrize("transformed", [False, True], ids=["unused", "dropped"])
def test_no_gradient_is_zero_in_the_inner_loop(rule: str, transformed: bool) -> None:
    """Either the loss does not read some parameters, or `grad_transform` gives None for them."""
    params, targets = tensors_of(rule), torch.randn(3)

    def loss(params: Any, target: Tensor) -> Tensor:
        values = [params[name] for name in params if transformed or name not in NAMES]
        return torch.stack([((value - target) ** 4).sum() for value in values]).sum()

    def by_hand(target: Tensor) -> Any:
        state, now, losses = make(rule).init(params), params, []
        for _ in range(2):
            grads, value = torch.func.grad_and_value(loss)(now, target)
            losses.append(value)
            now, state = make(rule).step(now, zeroed(grads), state)
        return now, state, torch.stack(losses)

    expected = [by_hand(target) for target in targets]
    options: Any = {"optimizer": make(rule), "steps": 2, "grad_transform": without if transformed else None}
    for target, own in zip(targets, expected, strict=True):
        assert_close(tuple(adapt(loss, params, target, **options))[:3], own)
    for backend in ("vmap", "loop"):
        found = adapt_tasks(loss, params, targets, **options, backend=backend)
        assert_close(tuple(found)[:3], tree_stack(expected))


# Parameters --------------------------------------------------------------------------------------------------------


@EACH_RULE
@pytest.mark.parametrize("bad", ["an integer", "a number", "a list"])
def test_parameters_are_floating_tensors(rule: str, bad: str) -> None:
    optimizer, params, grads, state = warm(rule)
    value = {"an integer": params["head.w"].int(), "a number": 0.5, "a list": [0.5]}[bad]
    wrong = {**params, "head.w": value}
    with refused(DtypeError, "`head.w(.0)?`"):
        optimizer.init(wrong)
    with refused((DtypeError, TreeError), "`head.w(.0)?`", params, grads, state):
        optimizer.step(wrong, grads, state)


@pytest.mark.parametrize("rule", REAL)
def test_a_rule_for_real_parameters(rule: str) -> None:
    params = tensors_of(rule, dtype=torch.complex128)
    with refused(DtypeError, f"`body.b` is complex, for which `{rule}`"):
        make(rule).init(params)
    loss = lambda p, b: p["body.w"].abs().sum() * b
    with pytest.raises(DtypeError, match=f"`{rule}`"):
        adapt_tasks(loss, params, torch.ones(3), optimizer=make(rule), steps=1)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3), (2, 1, 1, 1)], ids=str)
def test_muon_is_for_matrices(shape: tuple[int, ...]) -> None:
    params = {"a": torch.ones(2, 2), "w": torch.randn(shape)}
    loss = lambda p, b: (p["w"] * b).sum()
    with refused(ShapeError, "`w` has shape .*`partition`"):
        make("muon").init(params)
    with pytest.raises(ShapeError, match="`w` has shape"):
        adapt(loss, params, torch.ones(()), optimizer=make("muon"), steps=1)
    many = {name: value.expand(3, *value.shape) for name, value in params.items()}
    with pytest.raises(ShapeError, match="`w` has shape"):
        adapt_tasks(loss, many, torch.ones(3), optimizer=make("muon"), steps=1, in_dims=0)


# States ------------------------------------------------------------------------------------------------------------


@EACH_RULE
@pytest.mark.parametrize("other", VALUES)
def test_the_state_of_another_rule(rule: str, other: str) -> None:
    if other == rule:
        return
    params = grads = tensors_of("muon")  # which every rule takes
    ours, state = make(rule), make(other).init(params)
    words = f"state is one of `{other}` .*but this optimizer is `{rule}`"
    with refused(TreeError, words, params, state):
        ours.step(params, grads, state)
    with pytest.raises(TreeError, match=words):
        torch.vmap(ours.step, in_dims=(None, None, 0))(
            params, grads, torch.vmap(make(other).init)(tensors_of("muon", 2))
        )
    loss = lambda p, b: p["head.w"].sum() * b
    with pytest.raises(TreeError, match=words):
        adapt(loss, params, torch.ones(()), optimizer=ours, steps=1, opt_state=state)


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0},
    "adam": {"amsgrad": True},
    "adamw": {"amsgrad": True},
    "rmsprop": {"centered": True},
    "rmsprop, momentum": {"momentum": 0},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_state_of_other_options(case: str) -> None:
    rule = case.split(",")[0]
    params = grads = tensors_of(rule)
    both = [make(rule), make(rule, **OPTIONS[case])]
    for ours, theirs in (both, both[::-1]):
        state = theirs.init(params)
        with refused(TreeError, f"one of `{rule}` with the slots .*is `{rule}` with .*options", params, state):
            ours.step(params, grads, state)


def other_parameters(rule: str) -> dict[str, dict[str, Tensor]]:
    params = tensors_of(rule)
    return {
        "fewer": {name: value for name, value in params.items() if name != "tail.4"},
        "more": {**params, "tail.5": torch.randn(params["tail.4"].shape)},
        "other shapes": {**params, "body.w": torch.randn(3, 2)},
        "for many tasks": tensors_of(rule, 3) if rule != "muon" else {**params, "body.w": torch.randn(1, 3)},
        "other names": {name.replace("tail", "tale"): value for name, value in params.items()},
        "shifted": {f"tail.{int(n[-1]) + 1}" if "tail" in n else n: value for n, value in params.items()},
    }


@EACH_RULE
@pytest.mark.parametrize("which", other_parameters("sgd"))
def test_the_state_of_other_parameters(rule: str, which: str) -> None:
    params = grads = tensors_of(rule)
    optimizer = make(rule)
    state = optimizer.init(other_parameters(rule)[which])
    with refused((ShapeError, TreeError), "state does not fit the parameters|differ", params, state):
        optimizer.step(params, grads, state)


@EACH_RULE
def test_what_is_no_state(rule: str) -> None:
    optimizer, params, grads, state = warm(rule)
    for wrong in (None, {}, (), state.slots, tuple(state), torch.tensor(0), optimizer):
        with refused(TreeError, "not an `OptState`.*`init", params, grads, wrong):
            optimizer.step(params, grads, wrong)
    values = state.hyperparameters
    fewer = {name: value for name, value in values.items() if name != "lr"}
    for names in (fewer, {**values, "lrr": 0.1}, {}, {**fewer, "lrr": 0.1}):
        with refused(TreeError, "hyperparameters .*`lr`", params, grads, state):
            optimizer.step(params, grads, state._replace(hyperparameters=names))
    for slots in ({}, {**state.slots, "odd": params}, dict(list(state.slots.items())[1:])):
        with refused(TreeError, "slots", params, grads, state):
            optimizer.step(params, grads, state._replace(slots=slots))
