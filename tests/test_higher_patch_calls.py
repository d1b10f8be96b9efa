"""Patched modules: calls of parts and of other methods, hooks, and what is left after an error."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, mlp, others, reference, slopes, times, visible
from torch import Tensor, nn
from torch.testing import assert_close

from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]


# ---------------------------------------------------------------- parts


def test_a_part_is_called_with_the_latest_weights() -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    for _ in range(3):
        weight, bias, *_ = fmodel.fast_params
        assert_close(fmodel.linear(x), x @ weight.T + bias)
        assert_close(fmodel.linear(input=x), x @ weight.T + bias)
        assert_close(fmodel.linear.forward(x), x @ weight.T + bias)
        fmodel.fast_params = others(fmodel)
    fmodel(x, params=(new := others(fmodel)))
    assert_close(fmodel.linear(x), x @ new[0].T + new[1])
    assert times(fmodel) == 5


@pytest.mark.parametrize("make", [mlp, lambda: nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])])
def test_the_first_child_of_a_container_may_be_called(make: Any) -> None:
    fmodel, x = higher.monkeypatch(make()), torch.randn(5, 3)
    assert_close(fmodel[0](x), x @ fmodel.fast_params[0].T + fmodel.fast_params[1])
    full = [torch.randn_like(p) for p in fmodel.parameters()]
    assert_close(fmodel[0](x, params=full), x @ full[0].T + full[1])
    assert_close(fmodel[0](x), x @ full[0].T + full[1])
    assert times(fmodel) == 2


def test_a_part_takes_all_weights_of_the_root() -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    new = others(fmodel)
    assert_close(fmodel.linear(x, params=new), x @ new[0].T + new[1])
    assert list(map(id, fmodel.parameters())) == list(map(id, new))
    assert_close(fmodel(x), reference(Encoder(), new, x))


def test_a_part_takes_its_own_weights_alone() -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    before, weight, bias = list(fmodel.fast_params), torch.randn(2, 4), torch.randn(2)
    hidden = torch.randn(5, 4)
    assert_close(fmodel.head(hidden, params=[weight, bias]), hidden @ weight.T + bias)
    assert list(map(id, fmodel.parameters())) == list(map(id, [*before[:4], weight, bias]))
    assert times(fmodel) == 2
    assert_close(fmodel(x), reference(Encoder(), fmodel.fast_params, x))


def test_a_branch_takes_its_own_weights_in_its_own_order() -> None:
    """Its weights are tied to others, and lie apart from each other among those of the root."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model[2][1].weight = model[0].weight
    fmodel, x = higher.monkeypatch(model), torch.randn(5, 3)
    branch = [p.detach() + 1 for p in model[2].parameters()]
    assert_close(fmodel[2](x, params=branch), reference(model[2], branch, x))
    assert [id(fmodel[2][0].weight), id(fmodel[2][0].bias), id(fmodel[0].weight)] == list(map(id, branch[:3]))
    full = [p.detach() for p in fmodel.fast_params]
    assert_close(fmodel(x), reference(model, full, x))


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_other_lengths_are_refused(count: int) -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    before = visible(fmodel)
    with pytest.raises(IndexError, match=f"{count} tensors"):
        fmodel.linear(x, params=[torch.ones(4, 3)] * count)
    assert visible(fmodel) == before


def test_a_part_without_weights_takes_those_of_the_root() -> None:
    fmodel, x = higher.monkeypatch(mlp()), torch.randn(5, 3)
    assert_close(fmodel[1](x, params=(new := others(fmodel))), x.tanh())
    assert fmodel[0].weight is new[0]


@pytest.mark.parametrize("make", [lambda: nn.ModuleList([nn.Linear(3, 3)]), lambda: nn.ModuleDict(), nn.Module])
def test_without_forward_there_is_no_call(make: Any) -> None:
    fmodel = higher.monkeypatch(make())
    before = visible(fmodel)
    with pytest.raises(NotImplementedError):
        fmodel(torch.ones(3))
    assert visible(fmodel) == before


# ---------------------------------------------------------------- methods, and arguments


def test_other_methods_and_properties_see_the_weights() -> None:
    class Many(Encoder):
        @property
        def norm_of_weight(self) -> Tensor:
            return self.linear.weight.norm()

        @staticmethod
        def double(x: Tensor) -> Tensor:
            return x * 2

        def both(self, x: Tensor) -> Tensor:
            return self(x) + self.forward(x) + super().forward(x) + self.double(self.head(self.encode(x)))

    model = Many().eval()
    fmodel, x = higher.monkeypatch(model), torch.randn(5, 3)
    fmodel.update_params(new := others(fmodel))
    plain = Many().eval()
    with torch.no_grad():
        for p, value in zip(plain.parameters(), new, strict=True):
            p.copy_(value)
    assert_close(fmodel.norm_of_weight, new[0].norm())
    assert_close(fmodel.both(x), plain.both(x))
    assert times(fmodel) == 2


class TakesParams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, params: float | None = None, scale: float = 1.0) -> Tensor:
        return self.linear(x) * (1 if params is None else params) * scale


def test_the_root_takes_the_keyword_params_for_itself() -> None:
    fmodel, x = higher.monkeypatch(TakesParams()), torch.randn(5, 3)
    weight, bias = others(fmodel)
    assert_close(fmodel(x, params=[weight, bias], scale=2.0), (x @ weight.T + bias) * 2)
    assert_close(fmodel(x, 3.0), (x @ weight.T + bias) * 3)
    assert times(fmodel) == 2


def test_the_keyword_params_of_a_part_is_its_own_within_a_call() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = TakesParams()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x, params=3.0)

    model, x = Outer(), torch.randn(5, 3)
    fmodel = higher.monkeypatch(model)
    assert_close(fmodel(x), model(x))
    assert times(fmodel) == 1
    weight, bias = others(fmodel)
    assert_close(fmodel.part(x, params=[weight, bias]), x @ weight.T + bias)


def test_signature_and_keyword_arguments_are_passed_on() -> None:
    class Keywords(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    assert higher.monkeypatch(Keywords())(1, 2, a=3, params=None) == ((1, 2), {"a": 3})
    assert "x" in inspect.signature(higher.monkeypatch(Encoder()).encode).parameters


def test_a_module_may_call_itself() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self(self.linear(x), depth=depth - 1) if depth else x

    model, x = Recursive(), torch.randn(5, 3)
    fmodel = higher.monkeypatch(model)
    assert_close(fmodel(x), model(x))
    assert fmodel.direct_submodule_call
    assert times(fmodel) == 1


def test_forward_may_ask_for_its_own_weights() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            own = [*self.parameters(), *dict(self.named_parameters()).values(), *self.linear.parameters()]
            own += self.state_dict(keep_vars=True).values()
            return self.linear(x) + sum(tensor.square().sum() for tensor in own)

    fmodel, x = higher.monkeypatch(Penalized()), torch.randn(5, 3)
    weight, bias = new = others(fmodel)
    expected = x @ weight.T + bias + 4 * (weight.square().sum() + bias.square().sum())
    assert_close(fmodel(x, params=new), expected)
    assert_close(slopes(fmodel(x).sum(), new), slopes(expected.sum(), new))
    assert_close(higher.patch.make_functional(Penalized())(x, params=new), expected)


def test_recurrent_weights_are_never_packed() -> None:
    fmodel, x = higher.monkeypatch(nn.Sequential(nn.LSTM(3, 4, 2))), torch.randn(5, 2, 3)
    for _ in range(2):
        new = others(fmodel)
        expected = reference(nn.LSTM(3, 4, 2), new, x)[0]
        assert_close(fmodel(x, params=new)[0], expected)
        before = visible(fmodel)
        assert fmodel[0].flatten_parameters() is None
        assert visible(fmodel) == before
        assert_close(fmodel[0](x)[0], expected)
        assert all(a is b for a, b in zip(fmodel[0]._flat_weights, new, strict=True))


# ---------------------------------------------------------------- hooks


def test_hooks_of_the_module_run_on_the_patched_one() -> None:
    model, calls = mlp(), []
    note = lambda what: lambda part, *_: calls.append((what, type(part).__name__))
    model.register_forward_pre_hook(note("before"))
    model[0].register_forward_hook(lambda part, args, out: out * part.weight.mean())
    model[2].register_forward_hook(note("after"), always_call=True)
    model[2].register_full_backward_hook(note("backward"))
    model[2].register_full_backward_pre_hook(note("before backward"))
    fmodel, x = higher.monkeypatch(model), torch.randn(5, 3)
    weights = fmodel.fast_params
    expected = ((x @ weights[0].T + weights[1]) * weights[0].mean()).tanh() @ weights[2].T + weights[3]
    found = slopes(fmodel(x).square().sum(), weights)
    assert calls == [
        ("before", "FunctionalSequential"),
        ("after", "InnerFunctionalLinear"),
        ("before backward", "InnerFunctionalLinear"),
        ("backward", "InnerFunctionalLinear"),
    ]
    assert_close(found, slopes(expected.square().sum(), weights))


def test_hooks_are_independent_after_patching() -> None:
    model, x = mlp(), torch.randn(5, 3)
    expected = model(x)
    handle = model[0].register_forward_hook(lambda part, args, out: out * 0)
    fmodel = higher.monkeypatch(model)
    handle.remove()
    assert_close(fmodel(x), fmodel[2].bias.expand(5, 2))
    own = fmodel.register_forward_hook(lambda part, args, out: out + 1)
    assert_close(fmodel(x), fmodel[2].bias.expand(5, 2) + 1)
    assert_close(model(x), expected)
    assert_close(higher.monkeypatch(model)(x), expected)
    own.remove()
    assert_close(fmodel(x), fmodel[2].bias.expand(5, 2))


def test_hooks_of_state_dict_are_kept() -> None:
    model = mlp()
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(extra=torch.ones(1)))
    assert "extra" in higher.monkeypatch(model).state_dict()


# ---------------------------------------------------------------- errors in forward


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.child = nn.Linear(3, 3), nn.Module()
        self.when = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "before":
            raise KeyError("asked to fail")
        x = self.linear(x)
        if self.when == "after":
            raise KeyError("asked to fail")
        return self.child(x) if self.when == "child" else x


@pytest.mark.parametrize("when", ["before", "after", "child", "input"])
@pytest.mark.parametrize("given", [True, False])
def test_after_an_error_in_forward_all_works(when: str, given: bool) -> None:
    fmodel, x = higher.monkeypatch(Fails()), torch.randn(5, 3)
    fmodel.when, new = when, others(fmodel)
    with pytest.raises((KeyError, NotImplementedError, RuntimeError)):
        fmodel(torch.ones(5, 7) if when == "input" else x, **({"params": new} if given else {}))
    fmodel.when = ""
    weight, bias = new if given else fmodel.fast_params
    assert fmodel.direct_submodule_call
    assert times(fmodel) == 1 + given
    for call in (fmodel, fmodel.linear, fmodel.forward):
        assert_close(call(x), x @ weight.T + bias)
    fmodel.update_params(again := others(fmodel))
    assert_close(fmodel(x), x @ again[0].T + again[1])
