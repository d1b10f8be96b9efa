"""What `from_torch` refuses of optimizers, options, parameters and states, by name."""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign, start, without_graph
from live import gradients_for, step, untouched
from problems import assert_close
from torch import nn

from statelessify import adapt_tasks, optim, stateless
from statelessify.errors import (
    HyperparameterError,
    HyperparameterNameError,
    NamesError,
    OptimizerError,
    StatelessifyError,
)

pytestmark = pytest.mark.usefixtures("float64")
ALL = torch.ones(3, dtype=torch.float64)
NAMES = ("weight", "bias")


def taken(kind: Any, **options: Any) -> Any:
    """Two steps of it."""
    optimizer = optim.from_torch(kind, **options)
    with torch.no_grad():
        params, state = optimizer.step(start(), start(), optimizer.init(start()))
        return optimizer.step(params, start(), state)


# Optimizers --------------------------------------------------------------------------------------------------------


class Wrapping(Foreign):
    def set_up(self) -> None:
        self.inner: Any = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class WrappingSome(Wrapping):
    def set_up(self) -> None:
        super().set_up()
        self.all = [self.inner]
        del self.inner

    def step(self, closure: Any = None) -> None:
        self.all[0].step()


class WrappingDeep(Wrapping):
    def set_up(self) -> None:
        super().set_up()
        self.kept = {"of": types.SimpleNamespace(inner=self.inner)}
        del self.inner

    def step(self, closure: Any = None) -> None:
        self.kept["of"].inner.step()


@pytest.mark.parametrize("kind", [Wrapping, WrappingSome, WrappingDeep])
def test_wrapped_optimizers(kind: Any) -> None:
    with pytest.raises(OptimizerError, match=f"{kind.__name__} wraps another optimizer"):
        taken(kind)
    module = nn.Linear(2, 2)
    live = kind(module.parameters())
    with untouched(live, module), pytest.raises(OptimizerError, match="wraps another optimizer"):
        optim.from_torch(live, module=module).init(stateless(module).params)


class Closure(Foreign):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class ClosureByName(Foreign):
    def step(self, *, closure: Any) -> None:  # type: ignore[override]
        closure()


class WithLoss(Foreign):
    def step(self, loss: Any) -> None:  # type: ignore[override]
        self.param_groups[0]["lr"] = loss


@pytest.mark.parametrize("kind", [Closure, ClosureByName, WithLoss])
def test_a_step_that_needs_more_than_gradients(kind: Any) -> None:
    with pytest.raises(OptimizerError, match=f"{kind.__name__} has no pure form: its step needs"):
        taken(kind)
    with pytest.raises(OptimizerError, match=f"{kind.__name__} has no pure form: its step needs"):
        optim.from_torch(kind(nn.Linear(1, 1).named_parameters()))


@pytest.mark.parametrize(
    ("kind", "words"), [(torch.optim.LBFGS, "optim.adam.*optim.sgd"), (torch.optim.SparseAdam, "optim.adam")]
)
def test_what_has_no_pure_form(kind: Any, words: str) -> None:
    subclass = type("Sub", (kind,), {})
    for each in (kind, subclass, kind(nn.Linear(1, 1).parameters()), subclass(nn.Linear(1, 1).parameters())):
        name = each.__name__ if isinstance(each, type) else type(each).__name__
        with pytest.raises(OptimizerError, match=f"{name} has no pure form.*use `{words}"):
            optim.from_torch(each)


def test_step_hooks() -> None:
    live = Foreign(nn.Linear(1, 1).named_parameters())
    live.register_step_post_hook(lambda *args: None)
    with pytest.raises(OptimizerError, match="Foreign has step hooks"):
        optim.from_torch(live)


# Options -----------------------------------------------------------------------------------------------------------


class OpenEnded(Foreign):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options.get("lr", 0.1))


def test_options_that_do_not_exist() -> None:
    live = Foreign(nn.Linear(1, 1).named_parameters())
    for given in (Foreign, live):
        with pytest.raises(HyperparameterNameError, match=r"Foreign has no `lrr`.*did you mean `lr`") as caught:
            optim.from_torch(given, lrr=0.1)
        assert "`params`" not in str(caught.value)
    with pytest.raises(HyperparameterError, match="does not keep `wdd` in its parameter groups"):
        taken(OpenEnded, wdd=torch.tensor(0.1))
    with pytest.raises(TypeError):
        optim.from_torch(type("Needs", (Foreign,), {"__init__": lambda self, params, more: None})).init(start())


@pytest.mark.parametrize(
    ("lr", "error", "words"),
    [
        (torch.ones(3), HyperparameterError, r"`lr` is a tensor of shape \(3,\)"),
        ({"z": 0.1}, NamesError, "`a` is matched by no key"),
        ({"z": 0.1, "a": torch.ones(5)}, HyperparameterError, "`lr.*` has shape"),
        ({"z": 0.1, "aa": 0.1}, NamesError, "`aa` matches no name"),
        (lambda step: torch.ones(3), HyperparameterError, r"`lr` is a tensor of shape \(3,\)"),
        (optim.per_task(ALL), HyperparameterError, "adapt_tasks"),
    ],
    ids=range(6),
)
def test_options_that_do_not_fit(lr: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        taken(Foreign, lr=lr)


def test_the_optimizers_own_checks_are_heard() -> None:
    class Checks(Foreign):
        def __init__(self, params: Any, lr: Any = 0.1) -> None:
            if lr < 0:
                raise ValueError("no such lr")
            super().__init__(params, lr)

    with pytest.raises(ValueError, match="no such lr"):
        taken(Checks, lr=-1.0)
    taken(Checks, lr=torch.tensor(0.1, requires_grad=True))


# Parameters, gradients, states -------------------------------------------------------------------------------------


def bad_calls() -> dict[str, tuple[Any, Any, Any]]:
    """``(params, grads, state)``, of which one does not fit."""
    good, state = start(), optim.from_torch(without_graph(Foreign)).init(start())
    other = without_graph(type("Other", (Foreign,), {}))
    return {
        "fewer parameters": ({"z": good["z"]}, {"z": good["z"]}, state),
        "more parameters": ({**good, "x": torch.ones(2)}, {**good, "x": torch.ones(2)}, state),
        "fewer gradients": (good, {"z": good["z"]}, state),
        "a gradient of another shape": (good, {**good, "a": torch.ones(2)}, state),
        "a gradient of another dtype": (good, {**good, "a": torch.ones((), dtype=torch.float32)}, state),
        "a gradient that is a number": (good, {**good, "a": 1.0}, state),
        "no state": (good, good, 3),
        "the state of a rule": (good, good, optim.sgd(momentum=0.9).init(good)),
        "the state of another class": (good, good, optim.from_torch(other).init(good)),
    }


@pytest.mark.parametrize("kind", bad_calls())
def test_a_call_that_does_not_fit(kind: str) -> None:
    with pytest.raises(StatelessifyError), torch.no_grad():
        optim.from_torch(without_graph(Foreign)).step(*bad_calls()[kind])


def test_a_parameter_that_is_no_tensor_or_has_no_gradient() -> None:
    for bad in (1.0, torch.tensor(1)):
        with pytest.raises(StatelessifyError, match="`z`"):
            optim.from_torch(Foreign).init({**start(), "z": bad})


def squares(params: Any, scale: Any) -> Any:
    return scale * torch.stack([(p**2).sum() for p in params.values()]).sum()


def states_of(pure: Any, params: Any) -> dict[str, Any]:
    many = {name: torch.stack([p] * 3) for name, p in params.items()}
    with torch.no_grad():
        tasks = adapt_tasks(squares, many, ALL, optimizer=pure(), steps=1, in_dims=0).opt_state
    state = pure().init(params)
    return {
        "no state": 3,
        "of a rule": optim.adam().init(params),
        "of many tasks": tasks,
        "a part": optim.from_torch(without_graph(Foreign)).init({"weight": params["weight"]}),
        "one rate for each entry": pure(lr={"weight": torch.rand_like(params["weight"]), "bias": 0.1}).init(params),
        "one rate for each parameter": pure(lr={"weight": 0.1, "bias": 0.2}).init(params),
        "made by hand": optim.OptState(state.step, {"lr": 0.1}, {"m": params}),
    }


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize(
    "kind", states_of(partial(optim.from_torch, without_graph(Foreign)), {"weight": ALL, "bias": ALL})
)
def test_a_state_that_the_live_optimizer_cannot_take(kind: str, warm: int) -> None:
    module = nn.Linear(2, 2)
    live = without_graph(Foreign)(module.parameters())
    step(live, module, gradients_for(module, warm))
    params = {name: p.detach() for name, p in module.named_parameters()}
    state = states_of(partial(optim.from_torch, live, module=module), params)[kind]
    with untouched(live, module), pytest.raises(StatelessifyError):
        optim.to_torch_(live, state, module=module)


def test_a_copy_that_a_constructor_takes_is_seen() -> None:
    """Of parameters that carry a derivative it would have none; the values are right where none is asked for."""

    class Anchored(Foreign):
        def set_up(self) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["anchor"] = p.detach().clone()

        def one(self, p: Any, g: Any, group: Any, state: Any) -> None:
            p.sub_(group["lr"] * (g + p - state["anchor"]))

    class AnchoredInAttribute(Anchored):
        def set_up(self) -> None:
            self.anchors = [p.detach().clone() for p in self.param_groups[0]["params"]]

        def one(self, p: Any, g: Any, group: Any, state: Any) -> None:
            index = [each is p for each in group["params"]].index(True)
            p.sub_(group["lr"] * (g + p - self.anchors[index]))

    for kind in (Anchored, AnchoredInAttribute):
        optimizer = optim.from_torch(kind)
        params, grads = ({name: value.requires_grad_() for name, value in start().items()} for _ in range(2))
        try:
            new, state = optimizer.step(params, grads, optimizer.init(params))
            new, _ = optimizer.step(new, grads, state)
        except StatelessifyError:
            continue
        # w1 = w - lr * g, w2 = w1 - lr * (g + w1 - w), whose derivative by w is 1
        assert_close(torch.autograd.grad(new["a"], params["a"])[0], torch.tensor(1.0), 1e-12)
