"""`check_modes`: all modes agree on drawn problems, and a mode that breaks its promise is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import small, small_problem
from torch import Tensor, nn

from statelessify import FirstOrder, ForwardMode, Implicit, Unroll, optim, stateless
from statelessify._capture import Replaced
from statelessify._loop import unrolled
from statelessify._tree import tree_detach
from statelessify.errors import HyperparameterError
from statelessify.testing import check_modes

pytestmark = pytest.mark.usefixtures("float64")


OPTIMIZERS: dict[str, Callable[[Tensor], Any]] = {
    "sgd": lambda lr: optim.sgd(lr=lr),
    "plain numbers": lambda lr: optim.sgd(lr=0.1, momentum=0.9),
    "momentum": lambda lr: optim.sgd(lr=lr, momentum=lr * 5, nesterov=True, weight_decay=lr),
    "adam": lambda lr: optim.adam(lr=lr, betas=(0.8, lr * 9), eps=0.1),
    "per parameter": lambda lr: optim.sgd(lr={"w": torch.stack([lr, 2 * lr]), "b": 0.1}),
    "schedule": lambda lr: optim.sgd(lr=lambda step: lr / (1 + step)),
}


@given(st.sampled_from(sorted(OPTIMIZERS)), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=8)
def test_all_modes_agree(name: str, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    rate = torch.tensor(0.1, requires_grad=name == "schedule")
    check_modes(small, *small_problem(), optimizer=OPTIMIZERS[name](rate), steps=steps)


def test_a_closed_over_tensor_fresh_batches_and_a_module() -> None:
    params, support, query = small_problem()
    weight = torch.randn(2, requires_grad=True)
    loss = lambda p, b: small({**p, "w": p["w"] * weight}, b)
    check_modes(loss, params, support, query, optimizer=optim.sgd(lr=0.1), steps=2)
    batches = [support, query]
    check_modes(small, params, lambda step, params: batches[step], query, optimizer=optim.sgd(lr=0.1), steps=2)
    apply, params, buffers = stateless(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)))
    apart = lambda p, b: F.mse_loss(apply(p, buffers, b[0])[0].squeeze(-1), b[1])
    check_modes(apart, params, support, query, optimizer=optim.adam(lr=0.1), steps=2)
    assert weight.grad is None
    assert all(p.grad is None for p in params.values())


def test_float32_no_steps_and_implicit() -> None:
    narrow = [torch.randn(2, dtype=torch.float32) for _ in range(3)]
    check_modes(lambda w, x: ((w - x) ** 4).sum(), *narrow, optimizer=optim.sgd(lr=0.1), steps=2)
    check_modes(small, *small_problem(), optimizer=optim.sgd(lr=0.1), steps=0, modes=[Unroll(), FirstOrder()])
    loss = lambda w, x: (2 * (w - x) ** 2).sum() + ((w - x) ** 4).sum() + (w * x[0]).sum()
    batches = [torch.rand(2) for _ in range(3)]
    check_modes(loss, *batches, optimizer=optim.sgd(lr=torch.tensor(0.1)), steps=100, modes=[Implicit()])


# Mistakes ------------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)


def closing(params: Any, batch: Any) -> Tensor:
    return small({**params, "w": params["w"] * WEIGHT}, batch)


class NoIdentity(Unroll):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        if not torch.is_grad_enabled():
            return super().run(loop, state, steps)
        state = state._replace(params={name: p.detach().requires_grad_() for name, p in state.params.items()})
        return super().run(loop, state, steps)


class OneMore(Unroll):
    """Differentiates through one step more."""

    def run(self, loop: Any, state: Any, steps: int) -> Any:
        return Unroll(truncate=(self.truncate or 0) + 1).run(loop, state, steps)


class LosesClosed(Unroll):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        with Replaced({id(WEIGHT): WEIGHT.detach()}):
            return unrolled(loop, state, range(steps), True)


class TooFew(Unroll):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        state, losses = super().run(loop, state, steps - 1)
        return state, [*losses, losses[-1]]


class LateLosses(Unroll):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        state, losses = super().run(loop, state, steps)
        return state, losses[::-1]


class SecondOrder(FirstOrder):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        return unrolled(loop, state, range(steps), True)


class Constant(ForwardMode):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        return unrolled(loop, tree_detach(state), range(steps), True)


class Recording(Unroll):
    def run(self, loop: Any, state: Any, steps: int) -> Any:
        with torch.enable_grad():
            return super().run(loop, state, steps)


def among_others() -> optim.Optimizer:
    """Says that it is elementwise, and shares a norm."""

    def step(params: Any, grads: Any, state: optim.OptState) -> Any:
        size = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        return {name: p - 0.1 * grads[name] / size for name, p in params.items()}, state

    return optim.sgd(lr=0.1)._replace(step=step, elementwise=True)


CUT = "`Unroll(truncate=1)`: the meta-gradient differs from a plain loop with what"
AGAIN = "`Unroll(checkpoint_every=1)`:"
MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "the identity path": (NoIdentity(truncate=1), [CUT, "leaf `params.b`"]),
    "one step more": (OneMore(truncate=1), [CUT]),
    "a closed-over tensor": (LosesClosed(checkpoint_every=1), [AGAIN, "the meta-gradient", "closed.0 of shape (2,)"]),
    "steps": (TooFew(checkpoint_every=1), [AGAIN, "the parameters differ from Unroll()"]),
    "losses": (LateLosses(checkpoint_every=1), [AGAIN, "the losses differ", "worst at ["]),
    "first order": (SecondOrder(), ["`SecondOrder()`: the meta-gradient differs", "leaf `closed.0"]),
    "forward": (Constant(), ["`ForwardMode()`: the meta-gradient differs from Unroll()", "leaf `params.b`"]),
    "no_grad": (Recording(checkpoint_every=1), ["recorded a graph under `torch.no_grad`"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mode_that_breaks_its_promise_is_named(name: str) -> None:
    mode, words = MISTAKES[name]
    with pytest.raises(AssertionError) as caught:
        check_modes(closing, *small_problem(), optimizer=optim.sgd(lr=0.1), steps=3, modes=[mode])
    for word in (*words, "reproduce: check_modes(closing"):
        assert word in str(caught.value)


def test_tasks_that_see_each_other() -> None:
    options: Any = {"steps": 2, "modes": [Unroll()]}
    check_modes(small, *small_problem(), optimizer=among_others()._replace(elementwise=False), **options)
    with pytest.raises(AssertionError, match=r"adapt_tasks with Unroll\(\): the parameters differ from a loop"):
        check_modes(small, *small_problem(), optimizer=among_others(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": -1}, "number of tasks"),
        ({"optimizer": torch.optim.SGD}, "not an `optim.Optimizer`"),
        ({"modes": [Unroll(truncate=5)]}, "truncate"),
        ({"steps": -1}, "number of steps"),
    ],
)
def test_misuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HyperparameterError, match=words):
        check_modes(small, *small_problem(), **{"optimizer": optim.sgd(lr=0.1), "steps": 2, **options})
