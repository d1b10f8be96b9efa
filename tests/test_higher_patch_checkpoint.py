"""Activation checkpointing in a patched module: the right number or a named error, never a wrong number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from higher_cases import QUIET, descend, everything, mlp, others, slopes
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from statelessify import errors
from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]


class Recomputes(nn.Module):
    """Its first part runs again in backward, where that is switched on."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on, self.body, self.norm, self.head = on, nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def part(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.part, x, use_reentrant=False) if self.on else self.part(x))


def right_or_named(run: Callable[[Any], Any], *named: type[Exception]) -> bool:
    """Runs with and without checkpointing; whether there was a result."""
    plain = Recomputes(False)
    other = Recomputes(True)
    other.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    expected = run(plain)
    torch.manual_seed(1)
    try:
        found = run(other)
    except (errors.CheckpointError, *named):
        return False
    assert_close(found, expected)
    return True


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("copy_weights", [True, False])
def test_before_any_change_of_weights_it_is_right(copy_weights: bool) -> None:
    def run(model: Any) -> list[Tensor]:
        fmodel = higher.monkeypatch(model, copy_initial_weights=copy_weights)
        first = slopes(fmodel(torch.randn(5, 3)).square().sum(), fmodel.fast_params, create_graph=True)
        return [*first, *slopes(sum(slope.square().sum() for slope in first), fmodel.fast_params)]

    assert right_or_named(run)


@pytest.mark.parametrize("tracking", [True, False])
def test_steps_of_an_optimizer(tracking: bool) -> None:
    """Each takes the gradient of a loss of the latest weights; none reaches back over a change."""

    def run(model: Any) -> list[Tensor]:
        with higher.innerloop_ctx(model, sgd(model), track_higher_grads=tracking) as (fmodel, diffopt):
            for _ in range(3):
                diffopt.step(fmodel(torch.randn(5, 3)).square().sum())
        return [p.detach() for p in fmodel.parameters()]

    done = right_or_named(run)
    assert done or tracking


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_meta_gradients(steps: int) -> None:
    def run(model: Any) -> list[Tensor]:
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(steps):
                diffopt.step(fmodel(torch.randn(5, 3)).square().sum())
            fmodel(torch.randn(5, 3)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    assert right_or_named(run) or steps


def test_steps_by_hand() -> None:
    def run(model: Any) -> list[Tensor]:
        fmodel, x = higher.monkeypatch(model), torch.randn(5, 3)
        for _ in range(2):
            fmodel.update_params(descend(fmodel, fmodel.fast_params, x))
        return slopes(fmodel(x).sum(), fmodel.init_fast_params)

    right_or_named(run)


def written_into(fmodel: Any) -> None:
    fmodel.fast_params[0] = others(fmodel)[0]
    fmodel(torch.randn(5, 3))


def switched_off(fmodel: Any) -> None:
    fmodel.update_params(others(fmodel))
    fmodel.track_higher_grads = False


CHANGES: dict[str, Callable[[Any], Any]] = {
    "update_params": lambda f: f.update_params(others(f)),
    "fast_params": lambda f: setattr(f, "fast_params", others(f)),
    "params": lambda f: f(torch.randn(5, 3), params=others(f)),
    "params of a part": lambda f: f.body(torch.randn(5, 3), params=others(f)),
    "weights of a part": lambda f: f.body(torch.randn(5, 3), params=others(f)[:2]),
    "assigned": lambda f: setattr(f.body, "weight", others(f)[0]),
    "written into": written_into,
    "switched off": switched_off,
    "transform": lambda f: vmap(f.body)(torch.randn(2, 5, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tracking", [True, False], ids=["tracked", "untracked"])
def test_a_change_between_forward_and_backward(change: str, tracking: bool) -> None:
    """What runs again must not see the later weights."""

    def run(model: Any) -> list[Tensor]:
        fmodel = higher.monkeypatch(model, track_higher_grads=tracking)
        weights = list(fmodel.fast_params)
        loss = fmodel(torch.randn(5, 3)).square().sum()
        CHANGES[change](fmodel)
        return slopes(loss, weights)

    right_or_named(run)


@pytest.mark.parametrize("tracking", [True, False], ids=["tracked", "untracked"])
def test_a_step_on_earlier_weights(tracking: bool) -> None:
    def run(model: Any) -> list[Tensor]:
        fmodel = higher.monkeypatch(model, track_higher_grads=tracking)
        diffopt = higher.get_diff_optim(sgd(model), model.parameters(), fmodel, track_higher_grads=tracking)
        weights = list(fmodel.fast_params)
        loss = fmodel(torch.randn(5, 3)).square().sum()
        fmodel.update_params(others(fmodel))
        return diffopt.step(loss, params=weights)

    right_or_named(run)


def test_two_lists_of_weights_in_one_loss() -> None:
    def run(model: Any) -> list[Tensor]:
        fmodel = higher.patch.make_functional(model)
        first, second = ([torch.randn_like(p).requires_grad_() for p in model.parameters()] for _ in range(2))
        x = torch.randn(5, 3)
        return slopes((fmodel(x, params=first) * fmodel(x, params=second)).sum(), [*first, *second])

    right_or_named(run)


def test_two_patched_modules_do_not_hinder_each_other() -> None:
    def run(model: Any) -> list[Tensor]:
        first, second = higher.monkeypatch(model), higher.monkeypatch(model)
        x = torch.randn(5, 3)
        loss = (first(x) * second(x)).sum()
        return slopes(loss, [*first.fast_params, *second.fast_params])

    assert right_or_named(run)


def test_a_copy_made_in_between() -> None:
    def run(model: Any) -> list[Tensor]:
        fmodel = higher.monkeypatch(model)
        weights = fmodel.fast_params
        loss = fmodel(torch.randn(5, 3)).square().sum()
        copy.deepcopy(fmodel).update_params(others(fmodel))
        return slopes(loss, weights)

    assert right_or_named(run)


def test_without_gradients_it_may_change_at_will() -> None:
    model = Recomputes(True)
    fmodel, before = higher.monkeypatch(model), everything(model)
    with torch.no_grad():
        for _ in range(3):
            fmodel.update_params(others(fmodel))
            assert fmodel(torch.randn(5, 3)).shape == (5, 2)
    assert everything(model) == before


def test_after_a_refusal_the_patched_module_is_usable() -> None:
    fmodel, x = higher.monkeypatch(Recomputes(True)), torch.randn(5, 3)
    loss = fmodel(x).sum()
    fmodel.update_params(others(fmodel))
    with pytest.raises(errors.CheckpointError, match="checkpoint"):
        loss.backward()
    plain = Recomputes(False)
    with torch.no_grad():
        for p, value in zip(plain.parameters(), fmodel.fast_params, strict=True):
            p.copy_(value)
    assert_close(fmodel(x), plain(x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: grad(lambda params: f(x, params=params).sum())([p.detach() for p in f.parameters()]),
        lambda f, x: slopes(vmap(f)(torch.stack([x, x])).sum(), f.fast_params),
        lambda f, x: grad(lambda x: f(x).sum())(x),
    ],
    ids=["grad", "vmap", "grad of the input"],
)
def test_inside_a_transform(transform: Any) -> None:
    """Refused by torch there; `LateUseError` is what `apply` says of the same."""
    right_or_named(lambda model: transform(higher.monkeypatch(model), torch.randn(5, 3)), errors.LateUseError)


def test_hooks_on_the_gradient_of_an_activation() -> None:
    """A backward hook that reads a weight does so late as well."""

    def run(model: Any) -> list[Tensor]:
        net = mlp()
        if model.on:
            net[2].register_full_backward_pre_hook(lambda part, found: (found[0] * part.bias.sum(),))
        else:
            net[2].register_forward_hook(lambda part, args, out: Scaled.apply(out, part.bias.sum().detach()))
        fmodel, x = higher.monkeypatch(net), torch.randn(5, 3)
        weights = fmodel.fast_params
        loss = fmodel(x).square().sum()
        fmodel.update_params(others(fmodel))
        return slopes(loss, weights)

    right_or_named(run)


class Scaled(torch.autograd.Function):
    """Scales the gradient by what a number was in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, found: Tensor) -> Any:
        return found * ctx.saved_tensors[0], None
