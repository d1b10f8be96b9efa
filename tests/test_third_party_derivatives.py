"""Derivatives through third-party optimizers, eager and in transforms; hyperparameters that are kept elsewhere."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from foreign import DIFFERENTIABLE, Foreign, Kind, adapted, inputs, loss, pure, real, start
from live import gradients_for, step, untouched
from problems import IGNORE_SCRIPT, assert_close, fresh, gradients, one_by_one
from torch import Tensor, nn

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, over_tasks
from statelessify.errors import DerivativeError, StatelessifyError

pytestmark = pytest.mark.usefixtures("float64")
EACH = pytest.mark.parametrize("kind", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
TARGETS = torch.tensor([[0.5, 2.0], [1.0, -1.0], [0.2, 0.3]], dtype=torch.float64)


# Derivatives -------------------------------------------------------------------------------------------------------


def of_numbers(optimizer: optim.Optimizer, steps: int) -> Any:
    """What `adapted` is, with one optimizer for all calls: hyperparameters are put into its state."""

    def after(z: Tensor, a: Tensor, target: Tensor, lr: Tensor, wd: Tensor) -> tuple[Tensor, Tensor]:
        params = {"z": z, "a": a}
        state = optimizer.init(params)
        state = state._replace(hyperparameters={**state.hyperparameters, "lr": lr, "wd": wd})
        params = adapt(loss, params, target, optimizer=optimizer, steps=steps, opt_state=state).params
        return params["z"], params["a"]

    return after


def with_tensors(kind: Any, **options: Any) -> optim.Optimizer:
    return optim.from_torch(kind, lr=torch.tensor(0.1), wd=torch.tensor(0.2), **options)


@EACH
def test_finite_differences(kind: Kind) -> None:
    assert torch.autograd.gradcheck(of_numbers(with_tensors(kind), 3), inputs())


@EACH
def test_finite_differences_of_second_order(kind: Kind) -> None:
    assert torch.autograd.gradgradcheck(of_numbers(with_tensors(kind), 2), inputs())


@EACH
def test_finite_differences_from_a_warm_live_optimizer(kind: Kind) -> None:
    module = nn.Module()
    module.z, module.a = (nn.Parameter(value) for value in start().values())
    live = kind(module.parameters())
    with torch.no_grad():
        step(live, module, gradients_for(module, 2))

    with untouched(live, module):
        assert torch.autograd.gradcheck(of_numbers(with_tensors(live, module=module), 2), inputs())


@EACH
def test_first_order(kind: Kind) -> None:
    """Inner gradients are constants: the derivative is that of the steps with gradients that are given."""
    given = inputs()
    given[2].requires_grad_(False)
    found = adapted(kind, gradient=FirstOrder())(*given)
    optimizer = optim.from_torch(kind, lr=given[3], wd=given[4])
    params = {"z": given[0], "a": given[1]}
    state = optimizer.init(params)
    for _ in range(3):
        constant = {
            name: g.detach() for name, g in gradients(loss(params, given[2]), params, retain_graph=True).items()
        }
        params, state = optimizer.step(params, constant, state)
    wanted = [given[0], given[1], given[3], given[4]]
    expected = torch.autograd.grad(params["z"].sum() + params["a"], wanted, allow_unused=True)
    assert_close(torch.autograd.grad(found[0].sum() + found[1], wanted, allow_unused=True), expected, 1e-12)


@EACH
def test_the_derivative_by_torch_func_is_refused(kind: Kind) -> None:
    """All of these write in place, which torch.func does not follow."""

    def meta(*given: Tensor) -> Tensor:
        z, a = adapted(kind)(*given)
        return (z**2).sum() + a.sin()

    plain = [value.detach() for value in inputs()]
    with pytest.raises(DerivativeError, match="writes in place"):
        torch.func.grad(meta, tuple(range(5)))(*plain)


@EACH
@pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
def test_many_tasks(kind: Kind, gradient: Any) -> None:
    params, rate = fresh(start()), torch.tensor(0.1, requires_grad=True)
    options: Any = {"optimizer": optim.from_torch(kind, lr=rate), "steps": 3, "gradient": gradient}
    expected = one_by_one(loss, params, TARGETS, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.vmap cannot batch")
        found = adapt_tasks(loss, params, TARGETS, **options)
        mapped = over_tasks(lambda p, t: adapt(loss, p, t, **options).params)(params, TARGETS)
    assert_close(found.params, expected.params, 1e-12)
    assert_close(mapped, expected.params, 1e-12)
    wanted = {**params, "rate": rate}
    meta = gradients(expected.params["z"].sum(), wanted)
    assert_close(gradients(found.params["z"].sum(), wanted), meta, 1e-11)
    assert_close(gradients(mapped["z"].sum(), wanted), meta, 1e-11)


@EACH
@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_forward_mode_is_refused(kind: Kind) -> None:
    plain = tuple(value.detach() for value in inputs())
    for transform in (torch.func.jacfwd, lambda f: lambda *args: torch.func.jvp(f, args, args)):
        with pytest.raises(DerivativeError, match="forward mode"):
            transform(adapted(kind))(*plain)


# Hyperparameters -----------------------------------------------------------------------------------------------------


class OutsideOfGroups(Foreign):
    """Reads its rate where it was constructed with it, not where it is looked up."""

    def __init__(self, params: Any, lr: Any = 0.1) -> None:
        super().__init__(params, lr)
        self.rate = lr

    def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        p.sub_(self.rate * g)


class Defaults(Foreign):
    def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        p.sub_(self.defaults["lr"] * g)


class Derived(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: Any = 0.1) -> None:
        super().__init__(params, {"lr": lr, "doubled": 2 * lr})

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.param_groups[0]["doubled"] * p.grad)


class Renamed(torch.optim.SGD):
    """Steps as SGD does, so that it is a rule; but `rate` is not its name for the rate."""

    def __init__(self, params: Any, rate: Any = 0.1) -> None:
        super().__init__(params, lr=rate)


@pytest.mark.parametrize("kind", [OutsideOfGroups, Defaults, Derived, Renamed])
def test_a_hyperparameter_that_is_kept_elsewhere(kind: Any) -> None:
    """A number is fine; a learned one, a schedule or a dict would be taken for a number, of one parameter and step."""
    name = "rate" if kind is Renamed else "lr"
    assert_close(pure(kind, 3, **{name: 0.3}), real(kind, 3, {name: 0.3}), 1e-14)
    rate = torch.tensor(0.3, requires_grad=True)
    schedule, by_name = (lambda step: 0.1 * (step + 1)), {"z": 0.3, "a": 0.1}
    expected = {"schedule": -0.1 - 0.2, "by name": -0.1 - 0.1}
    with torch.no_grad():
        for words, given in {"schedule": schedule, "by name": by_name}.items():
            try:
                found = two_steps(kind, **{name: given})
            except (StatelessifyError, TypeError):  # nothing can be computed with several values at once
                continue
            assert_close(found["a"], torch.tensor(expected[words] * (2 if kind is Derived else 1)), 1e-12)
    try:
        found = two_steps(kind, **{name: rate})
    except StatelessifyError:
        return
    assert_close(torch.autograd.grad(found["a"], rate)[0], torch.tensor(-4.0 if kind is Derived else -2.0), 1e-12)


def two_steps(kind: Any, **options: Any) -> dict[str, Tensor]:
    optimizer = optim.from_torch(kind, **options)
    params: Any = {"z": torch.zeros(2), "a": torch.tensor(0.0)}
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.step(params, {"z": torch.ones(2), "a": torch.tensor(1.0)}, state)
    return params
