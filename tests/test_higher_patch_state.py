"""Patched modules: attributes that are assigned, what they inherit from nn.Module, buffers, and the module itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, Tied, bits, descend, everything, mlp, others, reference, times, visible
from torch import Tensor, nn
from torch.testing import assert_close

from statelessify import errors
from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]

# nn.Module asks every tensor that it casts for its `.grad`; an ordinary module has leaves alone
non_leaves = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


# ---------------------------------------------------------------- assigning weights


def test_a_tensor_assigned_to_a_submodule_is_a_weight() -> None:
    """The example of higher's own changelog, which fails there."""
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    before, weight = list(fmodel.fast_params), torch.randn(4, 3, requires_grad=True)
    fmodel.linear.weight = weight
    assert times(fmodel) == 2
    assert [a is b for a, b in zip(fmodel.fast_params, before, strict=True)] == [False] + [True] * 5
    assert fmodel.fast_params[0] is fmodel.linear.weight is weight
    assert_close(fmodel(x), reference(Encoder(), [weight, *before[1:]], x))
    fmodel(x).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("path", ["", "linear"])
def test_tied_slots_follow(path: str) -> None:
    fmodel, weight = higher.monkeypatch(Tied()), torch.randn(3, 3)
    fmodel.get_submodule(path).weight = weight
    assert fmodel.weight is fmodel.linear.weight is fmodel.fast_params[0] is weight
    assert (times(fmodel), len(fmodel.fast_params)) == (2, 3)


def test_a_tensor_may_be_assigned_after_any_store() -> None:
    """In higher the slots lag after `fast_params =`, and the search for the weight fails."""
    fmodel, weight = higher.monkeypatch(nn.Linear(3, 2)), torch.randn(2, 3)
    fmodel.fast_params = new = others(fmodel)
    fmodel.weight = weight
    assert list(map(id, fmodel.parameters())) == [id(weight), id(new[1])]


def test_one_tensor_may_stand_for_two_weights() -> None:
    fmodel, shared, other = higher.monkeypatch(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), torch.ones(3), None
    fmodel.update_params([torch.ones(3, 3), shared, torch.ones(3, 3), shared])
    fmodel[1].bias = other = torch.zeros(3)
    assert fmodel[0].bias is shared
    assert fmodel[1].bias is other


def test_without_tracking_an_assignment_replaces() -> None:
    fmodel = higher.monkeypatch(Encoder(), track_higher_grads=False)
    fmodel.linear.weight = weight = torch.randn(4, 3)
    assert times(fmodel) == 1
    assert fmodel.fast_params[0] is weight


REFUSED: dict[str, tuple[Any, type[Exception]]] = {
    "number over a weight": (lambda f: setattr(f.linear, "weight", 3.0), TypeError),
    "None over a weight": (lambda f: setattr(f.linear, "bias", None), TypeError),
    "module over a weight": (lambda f: setattr(f.linear, "weight", nn.Linear(1, 1)), TypeError),
    "shape of a weight": (lambda f: setattr(f.linear, "weight", torch.ones(3, 4)), ValueError),
    "number over a module": (lambda f: setattr(f, "linear", 3), TypeError),
    "tensor over a module": (lambda f: setattr(f, "linear", torch.ones(4, 3)), TypeError),
    "parameter over a module": (lambda f: setattr(f, "linear", nn.Parameter(torch.ones(4, 3))), TypeError),
    "number over a buffer": (lambda f: setattr(f.norm, "running_mean", 3), TypeError),
    "no such attribute": (lambda f: f.nothing, AttributeError),
    "update_params of a part": (lambda f: f.linear.update_params(f.fast_params), AttributeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_assignment_changes_nothing(name: str) -> None:
    model = Encoder()
    fmodel, x = higher.monkeypatch(model), torch.randn(5, 3)
    use, error = REFUSED[name]
    before, module = visible(fmodel), everything(model)
    with pytest.raises(error):
        use(fmodel)
    assert visible(fmodel) == before
    assert everything(model) == module
    assert_close(fmodel(x), reference(Encoder(), fmodel.fast_params, x))


def test_a_slot_that_was_none_is_a_plain_attribute() -> None:
    fmodel, x, bias = higher.monkeypatch(nn.Linear(3, 2, bias=False)), torch.randn(5, 3), torch.randn(2)
    assert fmodel.bias is None
    assert_close(fmodel(x), x @ fmodel.weight.T)
    fmodel.bias = bias
    assert_close(fmodel(x), x @ fmodel.weight.T + bias)
    assert fmodel.bias is bias
    assert (times(fmodel), len(fmodel.fast_params)) == (1, 1)
    fmodel.update_params([torch.zeros(2, 3)])
    assert_close(fmodel(x), bias.expand(5, 2))


def test_a_parameter_under_a_new_name_is_a_plain_attribute() -> None:
    fmodel = higher.monkeypatch(mlp())
    fmodel.extra = fmodel[0].extra = extra = nn.Parameter(torch.ones(2))
    assert fmodel.extra is extra
    assert (len(fmodel.fast_params), times(fmodel)) == (4, 1)
    assert "extra" not in dict(fmodel.named_parameters())
    assert not {"extra", "0.extra"} & set(fmodel.state_dict())


def test_an_assigned_module_is_registered_but_no_weight() -> None:
    model = Encoder()
    fmodel, x, head = higher.monkeypatch(model), torch.randn(5, 3), nn.Linear(4, 7)
    before = everything(model)
    fmodel.head = head
    assert dict(fmodel.named_children())["head"] is head
    assert len(list(fmodel.parameters())) == 6
    assert fmodel(x).shape == (5, 7)
    fmodel.linear = None
    assert fmodel.linear is None
    assert everything(model) == before


def test_plain_attributes_and_buffers_may_be_assigned() -> None:
    fmodel = higher.monkeypatch(Encoder())
    fmodel.scale, fmodel.linear.scale = 2, 3
    fmodel.norm.running_mean = mean = torch.ones(4)
    assert (fmodel.scale, fmodel.linear.scale) == (2, 3)
    assert fmodel.norm._buffers["running_mean"] is mean
    del fmodel.scale
    assert not hasattr(fmodel, "scale")


def test_writing_into_a_weight_takes_effect_and_stays_there() -> None:
    model, x = Encoder(), torch.randn(5, 3)
    fmodel, before = higher.monkeypatch(model), everything(model)
    with torch.no_grad():
        fmodel.linear.weight.fill_(0)
    assert not fmodel.fast_params[0].any()
    assert_close(fmodel.encode(x), fmodel.linear.bias.expand(5, 4))
    assert everything(model) == before


# ---------------------------------------------------------------- what nn.Module does


def test_state_dict_has_the_keys_of_the_module_and_the_latest_values() -> None:
    model = Encoder()
    model.register_buffer("hidden", torch.ones(1), persistent=False)
    fmodel = higher.monkeypatch(model)
    assert_close(fmodel.state_dict(), model.state_dict())
    assert "hidden" in dict(fmodel.named_buffers())
    fmodel.update_params(new := others(fmodel))
    assert list(fmodel.state_dict()) == list(model.state_dict())
    assert_close(fmodel.state_dict()["head.bias"], new[-1].detach())


@pytest.mark.parametrize("copy", [True, False])
def test_load_state_dict_writes_into_the_weights(copy: bool) -> None:
    model, source = Encoder(), Encoder()
    source(torch.randn(5, 3))
    fmodel, before = higher.monkeypatch(model, copy_initial_weights=copy), everything(model)
    weights = list(map(id, fmodel.fast_params))
    assert str(fmodel.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
    assert_close([p.detach() for p in fmodel.fast_params], [p.detach() for p in source.parameters()])
    assert list(map(id, fmodel.fast_params)) == weights
    assert (times(fmodel), bits(fmodel)) == (1, bits(source))
    assert everything(model) == before
    with pytest.raises(RuntimeError, match="Missing key"):
        fmodel.load_state_dict({})


@non_leaves
@pytest.mark.parametrize("copy", [True, False])
def test_to_a_dtype_is_effective(copy: bool) -> None:
    model, x = Encoder(), torch.randn(5, 3)
    fmodel, before = higher.monkeypatch(model, copy_initial_weights=copy), everything(model)
    assert fmodel.to(torch.float32) is fmodel
    assert fmodel(x.float()).dtype == torch.float32
    assert {p.dtype for p in fmodel.parameters()} == {fmodel.linear.weight.dtype} == {torch.float32}
    assert fmodel.linear.weight is fmodel.fast_params[0]
    assert everything(model) == before
    fmodel.double()
    assert fmodel(x).dtype == torch.float64


def test_gradients_are_filled_and_zeroed() -> None:
    model, x = Encoder(), torch.randn(5, 3)
    fmodel, before = higher.monkeypatch(model), everything(model)
    fmodel(x).square().sum().backward()
    assert all(p.grad is not None for p in fmodel.parameters())
    assert all(part.weight.grad is not None for part in (fmodel.linear, fmodel.norm, fmodel.head))
    fmodel.zero_grad()
    assert all(p.grad is None for p in fmodel.parameters())
    fmodel.requires_grad_(False)
    assert not fmodel(x).requires_grad
    assert everything(model) == before


def test_walks_over_it_are_those_of_the_module() -> None:
    model = nn.Sequential(part := nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), part))
    fmodel = higher.monkeypatch(model)
    for walk in ("named_modules", "named_children", "named_buffers", "named_parameters"):
        assert [name for name, _ in getattr(fmodel, walk)()] == [name for name, _ in getattr(model, walk)()]
    assert fmodel.get_submodule("1.0") is fmodel[1][0]
    assert len(fmodel) == 2
    assert [type(part).__name__ for part in fmodel] == ["InnerFunctionalLinear", "InnerFunctionalSequential"]
    seen: list[str] = []
    fmodel.apply(lambda part: seen.append(type(part).__name__))
    assert seen[-1] == "FunctionalSequential"


# ---------------------------------------------------------------- buffers, and buffer_sync (B.6)


class Held(nn.Module):
    """Buffers of each kind, also one that stands in two places, and None."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Module()
        self.register_buffer("floats", torch.randn(3))
        self.register_buffer("whole", torch.arange(3))
        self.register_buffer("flags", torch.tensor([True, False]), persistent=False)
        self.register_buffer("nothing", None)
        self.child.register_buffer("again", self.floats)
        self.child.register_buffer("graph", torch.ones(2, requires_grad=True) * 2)


@pytest.mark.parametrize("device", [None, "cpu", "meta"])
def test_buffer_sync_copies_once(device: str | None) -> None:
    model = Held()
    fmodel = higher.monkeypatch(model)
    model.floats.add_(1)
    model.whole = torch.arange(3, 6)
    before = everything(model)
    assert higher.patch.buffer_sync(model, fmodel, device) is None
    assert fmodel.nothing is None
    for own, source in zip(fmodel.buffers(), model.buffers(), strict=True):
        assert own.device.type == (device or "cpu")
        assert (own.dtype, own.requires_grad) == (source.dtype, False)
        assert own is not source
        assert device == "meta" or torch.equal(own, source)
    assert everything(model) == before
    if device != "meta":
        fmodel.floats.zero_()
        assert everything(model) == before
        held = bits(fmodel)
        model.floats.add_(1)
        assert bits(fmodel) == held


def test_buffer_sync_fills_what_make_functional_made() -> None:
    model, x = Encoder().eval(), torch.randn(5, 3)
    fmodel = higher.patch.make_functional(model)
    model.norm.running_mean += 3
    higher.patch.buffer_sync(model, fmodel)
    assert_close(fmodel(x, params=list(model.parameters())), model(x))


def test_buffer_sync_wants_every_child_and_ignores_others() -> None:
    small = nn.Sequential(nn.BatchNorm1d(3))
    large = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    large[0].running_mean += 1
    fmodel = higher.monkeypatch(small)
    before = visible(fmodel)
    with pytest.raises(KeyError, match="1") as caught:
        higher.patch.buffer_sync(large, fmodel)
    assert isinstance(caught.value, errors.NamesError)
    assert visible(fmodel) == before
    large[0].running_mean += 1
    larger = higher.monkeypatch(large)
    higher.patch.buffer_sync(small, larger)
    assert not larger[0].running_mean.any()
    assert bits(larger[1]) == bits(large[1])


# ---------------------------------------------------------------- the module itself


@non_leaves
@pytest.mark.parametrize("copy", [True, False])
def test_the_module_is_never_changed(copy: bool) -> None:
    """Only its `.grad`, and only where weights are in its graph and `backward` is called."""
    model, x = Encoder(), torch.randn(5, 3)
    model.linear.weight.grad, model.note = torch.ones(4, 3), "kept"
    model.norm.eval()
    model.head.register_forward_hook(lambda head, args, out: out * 2)
    before = everything(model)
    fmodel = higher.monkeypatch(model, copy_initial_weights=copy)
    for _ in range(2):
        fmodel.update_params(descend(fmodel, fmodel.fast_params, x))
    fmodel.head.register_forward_hook(lambda head, args, out: out + 1)
    fmodel.note, fmodel.linear.note, fmodel.head = "changed", "new", nn.Linear(4, 2)
    fmodel.linear.weight = torch.zeros(4, 3)
    del fmodel.norm.bias
    fmodel.train().double()
    assert everything(model) == before
    copied = higher.monkeypatch(model)
    copied(x).sum().backward()
    copied.requires_grad_(False).zero_grad()
    assert everything(model) == before


def test_what_a_program_keeps_beside_is_shared_as_in_higher() -> None:
    """Lists and other objects that hold no part of the module are its own; what is rebound, or a tensor, is not."""

    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.log, self.calls = nn.Linear(3, 3), [], 0
            self.last, self.sum = torch.zeros(3), torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(self.calls)
            self.last = x.detach()
            self.sum += x.detach()
            return self.linear(x)

    model = Logs()
    fmodel = higher.monkeypatch(model)
    fmodel(torch.ones(3))
    assert fmodel.log is model.log
    assert (model.log, model.calls, fmodel.calls) == ([1], 0, 1)
    assert not model.last.any()
    assert not model.sum.any()
    assert torch.equal(fmodel.sum, torch.ones(3))
