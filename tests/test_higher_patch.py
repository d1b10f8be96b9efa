"""Patched modules: how they are made, the weights that they have over time, and what they are."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, Tied, everything, mlp, slots, times, visible
from torch import Tensor, nn
from torch.testing import assert_close

import statelessify
from statelessify import errors
from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]

policies = pytest.mark.parametrize("copy", [True, False], ids=["copied", "in the graph"])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# ---------------------------------------------------------------- names (B.1)


def test_names_are_where_higher_has_them() -> None:
    assert higher.patch.monkeypatch is higher.monkeypatch
    for name in ("innerloop_ctx", "monkeypatch", "get_diff_optim", "create_diff_optim", "register_optim"):
        assert callable(getattr(higher, name))
    for name in ("monkeypatch", "make_functional", "buffer_sync", "_MonkeyPatchBase"):
        assert callable(getattr(higher.patch, name))


@pytest.mark.parametrize("name", ["monkeypatch", "make_functional", "buffer_sync"])
def test_three_names_stand_at_the_top_too(name: str) -> None:
    assert getattr(statelessify, name) is getattr(higher.patch, name)


def test_arguments_are_in_the_order_of_higher() -> None:
    order = ["module", "device", "copy_initial_weights", "track_higher_grads"]
    assert list(inspect.signature(higher.monkeypatch).parameters) == order
    order = ["model", "opt", "device", "copy_initial_weights", "override", "track_higher_grads"]
    assert list(inspect.signature(higher.innerloop_ctx).parameters)[:6] == order
    assert list(inspect.signature(higher.patch.make_functional).parameters) == ["module", "encapsulator"]
    assert list(inspect.signature(higher.patch.buffer_sync).parameters) == ["module", "fmodule", "device"]


# ---------------------------------------------------------------- innerloop_ctx (B.2)


def test_both_stay_usable_after_the_context() -> None:
    model, x = Encoder(), torch.randn(5, 3)
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().sum())
    diffopt.step(fmodel(x).square().sum())
    assert times(fmodel) == 3


def test_exceptions_propagate_out_of_the_context() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError), higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        raise ZeroDivisionError
    diffopt.step(fmodel(torch.randn(2, 3)).square().sum())
    assert times(fmodel) == 2


@pytest.mark.parametrize("nested", [True, False])
def test_several_contexts_of_one_model_add_their_gradients(nested: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    outer = higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False)
    inner = higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False)
    if nested:
        with outer as (first, _), inner as (second, _):
            (first(torch.ones(1)) + second(torch.ones(1))).sum().backward()
    else:
        for context in (outer, inner):
            with context as (fmodel, _):
                fmodel(torch.ones(1)).sum().backward()
    assert_close(model.weight.grad, torch.full((1, 1), 2.0))


def test_the_context_takes_a_callback_of_gradients() -> None:
    model, x, seen = mlp(), torch.randn(2, 3), []

    def callback(grads: Any) -> Any:
        seen.append(type(grads))
        return [g * 0 for g in grads]

    with higher.innerloop_ctx(model, sgd(model), grad_callback=callback) as (fmodel, diffopt):
        diffopt.step(fmodel(x).square().sum())
    assert_close(list(fmodel.parameters()), list(fmodel.parameters(time=0)))
    assert seen == [tuple]


def test_the_context_passes_its_flags_on() -> None:
    model = mlp()
    with higher.innerloop_ctx(model, sgd(model), "meta", False, None, False) as (fmodel, _):
        assert not fmodel.track_higher_grads
        assert {p.device.type for p in fmodel.parameters()} == {"meta"}
        assert not any(p.is_leaf for p in fmodel.parameters())


# ---------------------------------------------------------------- monkeypatch: initial weights (B.3)


def test_copied_weights_are_leaves_in_storage_of_their_own() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    fmodel = higher.monkeypatch(model)
    for own, source in zip(fmodel.parameters(), model.parameters(), strict=True):
        assert type(own) is Tensor
        assert own.is_leaf
        assert own.requires_grad == source.requires_grad
        assert own.data_ptr() != source.data_ptr()
        assert torch.equal(own, source)


def test_weights_in_the_graph_lead_to_the_module() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    for own, source in zip(fmodel.parameters(), model.parameters(), strict=True):
        assert type(own) is Tensor
        assert own.requires_grad == source.requires_grad
        assert own.is_leaf != source.requires_grad
        assert own.data_ptr() != source.data_ptr()
    fmodel(torch.randn(2, 3)).sum().backward()
    assert [p.grad is not None for p in model.parameters()] == [False, True, True, True]


@policies
def test_gradients_reach_the_module_or_not(copy: bool) -> None:
    model = mlp()
    fmodel = higher.monkeypatch(model, copy_initial_weights=copy)
    fmodel.update_params([p * 2 for p in fmodel.parameters()])
    fmodel(torch.randn(2, 3)).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [copy] * 4
    assert [p.is_leaf and p.grad is not None for p in fmodel.parameters(time=0)] == [copy] * 4


@policies
def test_a_device_is_for_weights_and_buffers(copy: bool) -> None:
    fmodel = higher.monkeypatch(Encoder(), torch.device("meta"), copy)
    assert {t.device.type for t in [*fmodel.parameters(), *fmodel.buffers()]} == {"meta"}
    assert fmodel(torch.randn(2, 3, device="meta")).shape == (2, 2)
    assert all(p.requires_grad for p in fmodel.parameters())


def test_weights_are_unique_and_in_the_order_of_parameters() -> None:
    model = Tied()
    model.add_module("again", model.linear)
    fmodel = higher.monkeypatch(model)
    assert [id(p) for p in fmodel.parameters()] == [id(p) for p in fmodel.fast_params]
    assert_close(list(fmodel.parameters()), list(model.parameters()))
    assert len(fmodel.fast_params) == 3
    assert fmodel.linear.weight is fmodel.again.weight is fmodel.weight is fmodel.fast_params[0]


def test_a_module_used_twice_follows_its_weights_in_both_places() -> None:
    part = nn.Linear(3, 3)
    fmodel, x = higher.monkeypatch(nn.Sequential(part, nn.Tanh(), part)), torch.randn(2, 3)
    weight, bias = torch.randn(3, 3), torch.randn(3)
    fmodel.update_params([weight, bias])
    layer = lambda x: x @ weight.T + bias
    assert_close(fmodel(x), layer(layer(x).tanh()))
    assert fmodel[0].weight is fmodel[2].weight


def test_without_weights_and_without_tracking() -> None:
    for fmodel in (higher.monkeypatch(nn.Tanh()), higher.monkeypatch(mlp(), track_higher_grads=False)):
        assert times(fmodel) == 1
    assert higher.monkeypatch(nn.Tanh()).fast_params == []


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (lambda: nn.LazyLinear(2), ValueError, "lazy"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), ValueError, "lazy"),
        (lambda: higher.monkeypatch(mlp()), ValueError, "patched"),
        (lambda: higher.monkeypatch(mlp())[0], ValueError, "patched"),
        (lambda: nn.Sequential(higher.monkeypatch(mlp())), ValueError, "patched"),
        (lambda: nn.Sequential(nn.Tanh(), higher.monkeypatch(mlp())[0]), ValueError, "patched"),
        (lambda: 3, TypeError, "not a torch.nn.Module"),
    ],
    ids=["lazy", "lazy child", "patched", "child of a patched", "holds a patched", "holds a patched child", "int"],
)
@pytest.mark.parametrize("patch", [higher.monkeypatch, higher.patch.make_functional], ids=["monkeypatch", "functional"])
def test_what_cannot_be_patched(patch: Any, module: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        patch(module())
    assert isinstance(caught.value, errors.StatelessifyError)


def test_a_lazy_module_is_told_what_helps_here() -> None:
    with pytest.raises(errors.LazyModuleError) as caught:
        higher.monkeypatch(nn.LazyLinear(2))
    assert "example_args" not in str(caught.value)  # an argument of `stateless`, not of `monkeypatch`
    assert "call the module once" in str(caught.value)


# ---------------------------------------------------------------- make_functional (B.4)


def test_make_functional_has_buffers_and_no_weights() -> None:
    model = Encoder()
    fmodel = higher.patch.make_functional(model)
    assert fmodel.fast_params is None
    assert times(fmodel) == 0
    assert_close(dict(fmodel.named_buffers()), dict(model.named_buffers()))
    assert all(a is not b for a, b in zip(fmodel.buffers(), model.buffers(), strict=True))


def test_the_first_weights_are_stored() -> None:
    fmodel, x = higher.patch.make_functional(nn.Linear(3, 1)), torch.randn(2, 3)
    weights = [torch.randn(1, 3), torch.randn(1)]
    assert_close(fmodel(x, params=weights), x @ weights[0].T + weights[1])
    assert times(fmodel) == 1
    assert_close(fmodel(x), x @ weights[0].T + weights[1])
    assert fmodel.init_fast_params[0] is weights[0]


@pytest.mark.parametrize("how", ["fast_params", "update_params"])
@pytest.mark.parametrize("tracking", [True, False])
def test_first_weights_may_be_set(how: str, tracking: bool) -> None:
    """The first store without tracking is an IndexError in higher."""
    fmodel, weights = higher.patch.make_functional(nn.Linear(3, 1)), [torch.randn(1, 3), torch.randn(1)]
    fmodel.track_higher_grads = tracking
    fmodel.update_params(weights) if how == "update_params" else setattr(fmodel, how, weights)
    assert times(fmodel) == 1
    assert fmodel.weight is fmodel.fast_params[0] is weights[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda f: f(torch.ones(1, 3)),
        lambda f: f.forward(torch.ones(1, 3)),
        lambda f: f.linear(torch.ones(1, 3)),
        lambda f: f.linear(torch.ones(1, 3), params=[torch.ones(4, 3), torch.ones(4)]),
        lambda f: f.parameters(),
        lambda f: f.parameters(time=0),
        lambda f: f.init_fast_params,
        lambda f: setattr(f.linear, "bias", torch.ones(4)),
    ],
    ids=["call", "forward", "submodule", "sub-list", "parameters", "time", "init_fast_params", "assignment"],
)
def test_there_are_no_weights_yet(use: Any) -> None:
    fmodel = higher.patch.make_functional(Encoder())
    before = slots(fmodel)
    with pytest.raises(ValueError, match="no weights"):
        use(fmodel)
    assert slots(fmodel) == before
    assert fmodel.fast_params is None


def test_the_encapsulator_is_called_last_with_both() -> None:
    model, calls = Encoder(), []

    def encapsulate(fmodel: Any, module: nn.Module) -> str:
        calls.append((fmodel, module))
        fmodel.update_params([p * 2 for p in module.parameters()])
        return "ignored"

    fmodel = higher.patch.make_functional(model, encapsulator=encapsulate)
    assert calls == [(fmodel, model)]
    assert_close(fmodel.linear.weight, model.linear.weight * 2)


# ---------------------------------------------------------------- what it is (B.5)


@pytest.mark.parametrize("patch", [higher.monkeypatch, higher.patch.make_functional], ids=["monkeypatch", "functional"])
def test_classes_and_their_names(patch: Any) -> None:
    fmodel = patch(Encoder())
    assert isinstance(fmodel, Encoder)
    assert isinstance(fmodel.linear, nn.Linear)
    assert all(isinstance(part, higher.patch._MonkeyPatchBase) for part in fmodel.modules())
    assert type(fmodel).__name__ == "FunctionalEncoder"
    assert type(fmodel.linear).__name__ == "InnerFunctionalLinear"
    first, second, *_ = repr(fmodel).splitlines()
    assert first == "FunctionalEncoder("
    assert second.strip() == "(linear): InnerFunctionalLinear(in_features=3, out_features=4, bias=True)"
    assert isinstance(higher.monkeypatch(nn.Module()), nn.Module)


def test_root_and_parts() -> None:
    fmodel = higher.monkeypatch(Encoder())
    assert (fmodel.is_root, fmodel.linear.is_root) == (True, False)
    assert fmodel.root is fmodel
    assert fmodel.linear.root is fmodel
    assert fmodel.direct_submodule_call
    assert not hasattr(fmodel.linear, "update_params")


def test_direct_submodule_call_is_false_within_a_call() -> None:
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.seen = nn.Linear(3, 3), []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.direct_submodule_call)
            return self.part(x)

    fmodel = higher.monkeypatch(Notes())
    fmodel(torch.ones(3))
    assert (fmodel.seen, fmodel.direct_submodule_call) == ([False], True)


def test_modes_are_copied_and_then_independent() -> None:
    model = Encoder()
    model.norm.eval()
    fmodel = higher.monkeypatch(model)
    assert [part.training for part in fmodel.modules()] == [part.training for part in model.modules()]
    before = everything(model)
    fmodel.eval()
    assert everything(model) == before
    model.train()
    assert not any(part.training for part in fmodel.modules())
    fmodel.train()
    model.eval()
    assert all(part.training for part in fmodel.modules())


def test_buffers_are_isolated_both_ways() -> None:
    model, x = Encoder(), torch.randn(6, 3)
    fmodel = higher.monkeypatch(model)
    before = everything(model)
    fmodel(x)
    fmodel.norm.running_var.fill_(3)
    fmodel.norm.running_mean = torch.ones(4)
    assert everything(model) == before
    seen = visible(fmodel)
    model(x)
    model.norm.running_mean = torch.zeros(4)
    assert visible(fmodel) == seen
