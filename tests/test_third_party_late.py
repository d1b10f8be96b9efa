"""Derivatives that a third-party step loses out of sight of torch functions: late, sometimes, in some dtype, again."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign, Kind, adapted, by_autograd, inputs, loss, made, pure, real, refused_or_right, start
from problems import assert_close
from torch import Tensor

from statelessify import adapt, optim
from statelessify.errors import DerivativeError

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def unseen(x: Tensor) -> Tensor:
        return x.detach()


def forgetful(when: Any = lambda p, state: True) -> Kind:
    """Takes its decay for a constant, sometimes."""

    def one(p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        state["step"] = state.get("step", 0) + 1
        decay = group["wd"] * p
        p.sub_(group["lr"] * (g + (unseen(decay) if when(p, state) else decay)))

    return made(one)


def test_it_is_refused_every_time() -> None:
    optimizer = optim.from_torch(forgetful(), lr=0.1)
    params = {name: value.requires_grad_() for name, value in start().items()}
    for _ in range(3):
        with pytest.raises(DerivativeError):
            adapt(loss, params, torch.ones(2), optimizer=optimizer, steps=1)


def test_it_is_refused_after_a_run_without_derivatives() -> None:
    optimizer = optim.from_torch(forgetful(), lr=0.1)
    with torch.no_grad():
        done = adapt(loss, start(), torch.ones(2), optimizer=optimizer, steps=2)
    params = {name: value.requires_grad_() for name, value in done.params.items()}
    with pytest.raises(DerivativeError):
        adapt(loss, params, torch.ones(2), optimizer=optimizer, steps=1, opt_state=done.opt_state)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_loss_at_some_later_step(at: int) -> None:
    """As in optimizers that look back every few steps."""
    kind = forgetful(lambda p, state: state["step"] == at)
    given = inputs()
    given[3] = torch.tensor(0.01, requires_grad=True)
    try:
        z, a = adapted(kind, steps=6)(*given)
    except DerivativeError:
        return
    found = torch.autograd.grad(z.sum() + a, given)
    right = adapted(forgetful(lambda p, state: False), steps=6)(*given)
    assert_close(found, torch.autograd.grad(right[0].sum() + right[1], given), 1e-10)


def test_a_loss_of_the_live_state_alone() -> None:
    """What is lost is lost of a state that a new optimizer does not have."""
    module = torch.nn.Linear(2, 1)
    live = forgetful(lambda p, state: state["step"] > 5)(module.parameters())
    for p in module.parameters():
        live.state[p]["step"] = 5
    params = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}
    optimizer = optim.from_torch(live, module=module)
    with pytest.raises(DerivativeError):
        optimizer.step(params, params, optimizer.init(params))


# What is not lost must not be refused ------------------------------------------------------------------------------


def test_signs_and_corners_are_no_loss() -> None:
    """Their derivative is zero, or one, wherever finite differences do not cross them."""

    class Signs(Foreign):
        def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
            m = 0.9 * state.get("m", torch.zeros_like(p)) + g
            state["m"] = m
            p.sub_(
                group["lr"] * (m.sign() * g.clamp(-0.1, 0.1) + torch.where(g > 0, g, 0.1 * g) + group["wd"] * p.abs())
            )

    refused_or_right(partial(by_autograd, Signs), Signs, errors=())


def test_the_random_state_and_the_modes_around_a_step_are_kept() -> None:
    optimizer = optim.from_torch(Foreign, lr=0.1)
    params = {name: value.requires_grad_() for name, value in start().items()}
    before = torch.get_rng_state()
    optimizer.step(params, params, optimizer.init(params))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float64


def test_noise_is_that_of_the_seed() -> None:
    def one(p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        p.sub_(group["lr"] * (g + torch.randn_like(p) * p))

    torch.manual_seed(3)
    expected = real(made(one), 3)
    for derivative in (False, True):
        torch.manual_seed(3)
        with torch.set_grad_enabled(derivative):
            params = {name: value.requires_grad_() for name, value in start().items()}
            optimizer = optim.from_torch(made(one))
            found = adapt(loss, params, torch.tensor([0.5, 2.0]), optimizer=optimizer, steps=3).params
        assert_close({name: value.detach() for name, value in found.items()}, expected, 1e-12)
    assert_close(pure(Foreign, 2), real(Foreign, 2), 1e-14)
