"""Patched modules inside `torch.func`: right, and nothing of the transform is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, everything, others, reference, slopes, times, visible
from problems import IGNORE_SCRIPT
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

from statelessify import errors
from statelessify.compat import higher

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings(QUIET),
    pytest.mark.filterwarnings(IGNORE_SCRIPT),
]


class Norms(nn.Module):
    """Running statistics, a norm without, a counter, and tensors that are kept for later."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.batch, self.layer = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.calls, self.last, self.log = 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean()
        self.log.append(self.last)
        return self.head(self.layer(self.batch(self.linear(x).sin())).tanh())


def fresh(model: nn.Module, params: list[Tensor], x: Tensor) -> Tensor:
    """By torch alone, one call of a new copy."""
    return reference(copy.deepcopy(model), params, x)


@pytest.fixture(params=[Encoder, Norms, lambda: Norms().eval()], ids=["encoder", "norms", "eval"])
def case(request: pytest.FixtureRequest) -> Any:
    """A module, its patched copy and inputs of three tasks; neither is changed by the test."""
    model = request.param()
    fmodel = higher.monkeypatch(model)
    fmodel.update_params(others(fmodel))
    before = visible(fmodel), everything(model)
    yield model, fmodel, torch.randn(3, 5, 3)
    assert (visible(fmodel), everything(model)) == before
    new = others(fmodel)
    assert_close(fmodel(torch.ones(5, 3), params=new).shape, (5, 2))
    assert fmodel.linear.weight is new[0]


def stacked(fmodel: Any) -> list[Tensor]:
    return [torch.randn(3, *p.shape) for p in fmodel.parameters()]


def row(stack: list[Tensor], task: int) -> list[Tensor]:
    return [tensor[task].detach().requires_grad_() for tensor in stack]


# ---------------------------------------------------------------- values and derivatives


def test_vmap_over_inputs(case: Any) -> None:
    model, fmodel, xs = case
    expected = torch.stack([fresh(model, fmodel.fast_params, x) for x in xs])
    for call in (fmodel, fmodel.forward, lambda x: fmodel(x)):
        assert_close(vmap(call)(xs), expected)


def test_vmap_over_weights(case: Any) -> None:
    model, fmodel, xs = case
    stack = stacked(fmodel)
    expected = torch.stack([fresh(model, row(stack, task), xs[task]) for task in range(3)])
    assert_close(vmap(lambda params, x: fmodel(x, params=params))(stack, xs), expected)
    shared = torch.stack([fresh(model, row(stack, task), xs[0]) for task in range(3)])
    assert_close(vmap(lambda params: fmodel(xs[0], params=params))(stack), shared)


def test_gradients_with_respect_to_weights(case: Any) -> None:
    model, fmodel, xs = case
    params = [p.detach().requires_grad_() for p in fmodel.parameters()]
    loss = lambda params: fmodel(xs[0], params=params).square().sum()
    expected = slopes(fresh(model, params, xs[0]).square().sum(), params)
    plain = [p.detach() for p in params]
    assert_close(grad(loss)(plain), expected)
    assert_close(jacrev(loss)(plain), expected)
    assert_close(vjp(loss, plain)[1](torch.ones(()))[0], expected)


def test_gradients_with_respect_to_inputs(case: Any) -> None:
    model, fmodel, xs = case
    x = xs[0].clone().requires_grad_()
    (expected,) = slopes(fresh(model, fmodel.fast_params, x).square().sum(), [x])
    assert_close(grad(lambda x: fmodel(x).square().sum())(xs[0]).detach(), expected)


def test_gradients_of_eager_weights_through_vmap(case: Any) -> None:
    """The weights of the patched module itself, on the ordinary graph."""
    model, fmodel, xs = case
    found = slopes(vmap(fmodel)(xs).square().sum(), fmodel.fast_params)
    expected = slopes(sum(fresh(model, fmodel.fast_params, x).square().sum() for x in xs), fmodel.fast_params)
    assert_close(found, expected)


def test_tangents(case: Any) -> None:
    model, fmodel, xs = case
    params = [p.detach() for p in fmodel.parameters()]
    tangents = [torch.randn_like(p) for p in params]
    out, tangent = jvp(lambda *params: fmodel(xs[0], params=list(params)), tuple(params), tuple(tangents))
    shift = lambda s: [p + s * t for p, t in zip(params, tangents, strict=True)]
    assert_close(out, fresh(model, params, xs[0]))
    slope = (fresh(model, shift(1e-5), xs[0]) - fresh(model, shift(-1e-5), xs[0])) / 2e-5
    assert_close(tangent, slope, rtol=1e-6, atol=1e-6)


def adapted(call: Callable[..., Tensor], params: list[Tensor], x: Tensor, steps: int, found: Any) -> Tensor:
    """The loss after gradient steps, with any way of taking gradients."""
    loss = lambda params: call(params, x).square().mean()
    for _ in range(steps):
        params = [p - 0.1 * slope for p, slope in zip(params, found(loss, params), strict=True)]
    return loss(params)


def by_autograd(loss: Any, params: list[Tensor]) -> list[Tensor]:
    return slopes(loss(params), params, create_graph=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_meta_gradients_over_tasks(case: Any, steps: int) -> None:
    """``vmap(grad(... grad ...))`` goes through every norm, where torch alone is silently wrong."""
    model, fmodel, xs = case
    stack = stacked(fmodel)
    call = lambda params, x: fmodel(x, params=params)
    outer = lambda params, x: adapted(call, params, x, steps, lambda loss, params: grad(loss)(params))
    found = vmap(grad(outer))(stack, xs)
    for task in range(3):
        params = row(stack, task)
        oracle = lambda params, x: fresh(model, params, x)
        expected = slopes(adapted(oracle, params, xs[task], steps, by_autograd), params)
        assert_close([tensor[task] for tensor in found], expected, rtol=1e-8, atol=1e-9)


def test_second_derivatives(case: Any) -> None:
    model, fmodel, xs = case
    rest = [p.detach() for p in fmodel.fast_params[1:]]
    weight = fmodel.fast_params[0].detach()
    found = hessian(lambda w: fmodel(xs[0], params=[w, *rest]).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    (first,) = slopes(fresh(model, [leaf, *rest], xs[0]).square().sum(), [leaf], create_graph=True)
    expected = torch.stack([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in first.flatten()])
    assert_close(found.reshape(expected.shape), expected, rtol=1e-8, atol=1e-9)


def test_parts(case: Any) -> None:
    _, fmodel, xs = case
    weight, bias = (p.detach() for p in fmodel.fast_params[:2])
    expected = xs @ weight.T + bias
    assert_close(vmap(fmodel.linear)(xs).detach(), expected)
    assert_close(vmap(lambda x: fmodel.linear(input=x))(xs).detach(), expected)
    found = grad(lambda own: fmodel.linear(xs[0], params=own).square().sum())([weight, bias])
    assert_close(found[0], 2 * expected[0].T @ xs[0])
    full = [p.detach() for p in fmodel.fast_params]
    found = grad(lambda params: fmodel.linear(xs[0], params=params).square().sum())(full)
    assert_close(found[0], 2 * expected[0].T @ xs[0])


def test_methods() -> None:
    fmodel, xs = higher.monkeypatch(Encoder()), torch.randn(3, 5, 3)
    before = visible(fmodel)
    assert_close(vmap(fmodel.encode)(xs), xs @ fmodel.fast_params[0].T + fmodel.fast_params[1])
    assert_close(vmap(fmodel.norm)(xs @ torch.ones(3, 4)).shape, (3, 5, 4))
    assert visible(fmodel) == before


@pytest.mark.parametrize(
    "use",
    [
        lambda f, params: setattr(f, "fast_params", params),
        lambda f, params: f.update_params(params),
        lambda f, params: setattr(f.linear, "weight", params[0]),
    ],
    ids=["fast_params", "update_params", "assignment"],
)
def test_weights_of_a_transform_are_not_stored(use: Any, case: Any) -> None:
    _, fmodel, _ = case
    params = [p.detach() for p in fmodel.parameters()]
    before = visible(fmodel)
    with pytest.raises(errors.FastWeightsError, match="outlive"):
        grad(lambda params: (use(fmodel, params), params[0].sum())[1])(params)
    assert visible(fmodel) == before


def test_an_error_inside_leaves_all_as_it_was(case: Any) -> None:
    _, fmodel, xs = case
    before = visible(fmodel)
    with pytest.raises(RuntimeError):
        vmap(fmodel)(xs[..., :2])
    with pytest.raises(IndexError):
        vmap(lambda x: fmodel(x, params=[]))(xs)
    assert visible(fmodel) == before


def test_without_weights() -> None:
    model, xs = Norms(), torch.randn(3, 5, 3)
    fmodel = higher.patch.make_functional(model)
    stack = [torch.randn(3, *p.shape) for p in model.parameters()]
    found = vmap(lambda params, x: fmodel(x, params=params))(stack, xs)
    assert_close(found, torch.stack([fresh(model, row(stack, task), xs[task]) for task in range(3)]))
    assert (fmodel.fast_params, times(fmodel), fmodel.calls, fmodel.last, fmodel.log) == (None, 0, 0, None, [])
    assert not fmodel.batch.running_mean.any()
    with pytest.raises(ValueError, match="no weights"):
        vmap(fmodel)(xs)


def test_each_task_has_draws_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    fmodel, xs = higher.monkeypatch(model), torch.randn(3, 5, 3)
    out = vmap(fmodel, randomness="different")(xs)
    dropped = out == 0
    assert dropped.any()
    assert not dropped.all()
    assert_close(out[~dropped], 2 * model[0](xs)[~dropped])
