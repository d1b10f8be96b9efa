"""Modules that are patched again and again, as inner loops do, and that change in between: nothing is stale."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, everything, others, reference, slopes, visible
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]


def bend(x: Tensor) -> Tensor:
    return x.sinh()


class Changes(Encoder):
    """Its result depends on all that can change."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.sizes, self.extra = 2.0, (1, 2), nn.ParameterList([torch.randn(2)])
        self.activation = bend
        self.register_buffer("offset", torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(super().forward(x)) * self.factor + self.offset + sum(self.sizes)
        out = out + sum(self.extra)
        for name in ("late", "also"):
            out = getattr(self, name, nn.Identity())(out)
        return out


class Holds(Changes):
    """Holds a dict as well, which may change without being replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"shift": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.settings["shift"]


class Doubles(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Absolute(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


def write(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(3)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "weight written": lambda m: write(m.linear.weight),
    "weight's data": lambda m: setattr(m.linear.weight, "data", torch.randn(4, 3)),
    "weight replaced": lambda m: setattr(m.linear, "weight", nn.Parameter(torch.randn(4, 3))),
    "weight of another shape": lambda m: (
        setattr(m.head, "weight", nn.Parameter(torch.randn(1, 4))),
        setattr(m.head, "bias", nn.Parameter(torch.randn(1))),
    ),
    "data of another shape": lambda m: (
        setattr(m.head.weight, "data", torch.randn(1, 4)),
        setattr(m.head, "bias", None),
    ),
    "frozen": lambda m: m.linear.requires_grad_(False),
    "one frozen": lambda m: m.head.bias.requires_grad_(False),
    "bias removed": lambda m: setattr(m.head, "bias", None),
    "bias deleted and added": lambda m: (delattr(m.head, "bias"), m.head.register_parameter("bias", None)),
    "tied": lambda m: setattr(m, "late", Tying(m)),
    "child replaced": lambda m: setattr(m, "linear", nn.Linear(3, 4)),
    "child of another class": lambda m: setattr(m, "linear", Doubles(3, 4)),
    "class of a child": lambda m: setattr(m.linear, "__class__", Doubles),
    "child added": lambda m: setattr(m, "late", nn.Linear(2, 2)),
    "child twice": lambda m: (setattr(m, "late", nn.Linear(2, 2)), setattr(m, "also", m.late)),
    "grandchild": lambda m: setattr(m, "late", nn.Sequential(nn.Tanh(), nn.Linear(2, 2))),
    "list grows": lambda m: m.extra.append(torch.randn(2)),
    "buffer written": lambda m: m.offset.add_(1),
    "buffer replaced": lambda m: setattr(m, "offset", torch.randn(2)),
    "statistics": lambda m: m(torch.randn(7, 3)),
    "mode": lambda m: m.norm.eval(),
    "attribute": lambda m: setattr(m, "factor", 7.5),
    "attribute of a child": lambda m: setattr(m.norm, "eps", 10.0),
    "tuple": lambda m: setattr(m, "sizes", (5, 6)),
    "function": lambda m: setattr(m, "activation", torch.sin),
    "dict written": lambda m: getattr(m, "settings", {}).update(shift=9.0),
    "hook": lambda m: m.linear.register_forward_hook(lambda part, args, out: out * part.bias.sum()),
    "hook of the root": lambda m: m.register_forward_pre_hook(lambda part, args: (args[0] * 2,)),
    "forward of the instance": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: self.encode(x), m)),
    "parametrization": lambda m: parametrize.register_parametrization(m.linear, "weight", Absolute()),
    "dtype": lambda m: m.float().double(),
    "state": lambda m: m.load_state_dict(type(m)().state_dict()),
}


class Tying(nn.Module):
    """Holds a weight of its parent as its own."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.weight = parent.head.bias

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def check_fresh(model: nn.Module, copied: bool = True) -> None:
    """A patched copy that is made now does what the module does now, also with other weights."""
    before, x = everything(model), torch.randn(5, 3)
    for fmodel in (higher.monkeypatch(model, copy_initial_weights=copied), higher.patch.make_functional(model)):
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in fmodel.named_parameters()] == names
        if fmodel.fast_params is None:
            fmodel.update_params([p.detach().requires_grad_(p.requires_grad) for p in model.parameters()])
        assert_close([p.detach() for p in fmodel.fast_params], [p.detach() for p in model.parameters()])
        assert [p.requires_grad for p in fmodel.fast_params] == [p.requires_grad for p in model.parameters()]
        assert_close(dict(fmodel.named_buffers()), dict(model.named_buffers()))
        assert_close(fmodel(x).detach(), reference(copy.deepcopy(model), list(model.parameters()), x).detach())
        new = others(fmodel)
        expected = reference(copy.deepcopy(model), new, x)
        out = fmodel(x, params=new)
        assert_close(out, expected)
        if out.requires_grad:
            assert_close(slopes(out.square().sum(), new), slopes(expected.square().sum(), new))
    assert everything(model) == before


kinds = pytest.mark.parametrize("kind", [Changes, Holds])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [True, False])
@kinds
def test_a_change_is_seen_by_the_next_copy_and_not_by_the_last(kind: Any, change: str, copied: bool) -> None:
    model, x = kind().eval(), torch.randn(5, 3)
    for _ in range(2):
        check_fresh(model, copied)
    earlier = higher.monkeypatch(model, copy_initial_weights=copied)
    shared = change == "dict written" and kind is Holds  # by reference, as in higher
    before, expected = visible(earlier), earlier(x)
    CHANGES[change](model)
    assert visible(earlier) == before
    assert_close(earlier(x), expected + 8 if shared else expected)
    for _ in range(2):
        check_fresh(model, copied)


@given(st.lists(st.sampled_from(sorted(CHANGES.keys() - {"forward of the instance"})), max_size=5), st.booleans())
def test_any_sequence_of_changes(chosen: list[str], holds: bool) -> None:
    model = (Holds if holds else Changes)().eval()
    for change in chosen:
        try:
            CHANGES[change](model)
            model(torch.randn(5, 3))
        except (ValueError, KeyError, RuntimeError, AttributeError, TypeError):
            return  # an ordinary module does not work after these changes either
        check_fresh(model)


LATER: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda m: setattr(m, "activation", lambda x: x + m.head.bias.sum()),
    "attribute of a child": lambda m: setattr(m.norm, "activation", lambda x: x + m.head.bias.sum()),
    "hook": lambda m: m.norm.register_forward_hook(lambda part, args, out: out + m.head.bias.sum()),
    "hook of the root": lambda m: m.register_forward_pre_hook(lambda part, args: (args[0] + m.head.bias.sum(),)),
    "bound method": lambda m: setattr(m, "activation", m.head.forward),
}


@kinds
@pytest.mark.parametrize("later", LATER)
def test_what_leads_to_the_module_from_now_on_leads_to_the_copy(kind: Any, later: str) -> None:
    model, x = kind().eval(), torch.randn(5, 3)
    if later == "bound method":
        model.head = nn.Linear(2, 2)
        model.norm = nn.Sequential(model.norm, nn.Linear(4, 2))
    for _ in range(2):
        higher.monkeypatch(model)(x)
    LATER[later](model)
    fmodel = higher.monkeypatch(model)
    assert_close(fmodel(x), model(x))
    new = others(fmodel)
    out = fmodel(x, params=new)
    with torch.no_grad():
        for p, value in zip(model.parameters(), new, strict=True):
            p.copy_(value)
    assert_close(out, model(x))


# ---------------------------------------------------------------- classes that change


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize("name", ["forward", "encode", "added", "property"])
def test_a_class_that_is_changed(name: str, patched_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program replaces a method of a class (an attention, a mock); higher asks the class each time it patches."""

    class Own(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x)

    model, x = Own().eval(), torch.randn(5, 3)
    holder = nn.Sequential(Own().eval())
    if patched_before:
        for module in (model, holder):
            higher.monkeypatch(module)(x)
    value: Any = lambda self, x: self.linear(x) * 3
    monkeypatch.setattr(Own, name, property(lambda self: self.linear.bias * 3) if name == "property" else value, False)
    for module in (model, holder):
        fmodel = higher.monkeypatch(module)
        assert_close(fmodel(x), module(x))
        new = others(fmodel)
        assert_close(fmodel(x, params=new), reference(module, new, x))
    fmodel = higher.monkeypatch(model)
    if name in ("added", "encode"):
        assert_close(getattr(fmodel, name)(x), getattr(model, name)(x))
    if name == "property":
        assert_close(fmodel.property, model.property)


def test_a_class_that_takes_params_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x, **({"params": 3.0} if Part.forward.__code__.co_argcount == 3 else {}))

    model, x = Whole(), torch.randn(5, 3)
    assert_close(higher.monkeypatch(model)(x), x)
    monkeypatch.setattr(Part, "forward", lambda self, x, params: x * params)
    assert_close(higher.monkeypatch(model)(x), x * 3)


def test_two_classes_of_one_name() -> None:
    made = []
    for factor in (1.0, 2.0):

        class Same(nn.Linear):
            scale = factor

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * self.scale

        made.append(Same(3, 2))
    x = torch.randn(5, 3)
    for model in (*made, *made):
        assert_close(higher.monkeypatch(model)(x), model(x))


def test_modules_that_say_that_they_are_equal() -> None:
    class Equal(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        def __hash__(self) -> int:
            return 1

    class Unhashable(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Unhashable)

    x = torch.randn(5, 3)
    for kind in (Equal, Unhashable):
        models = [kind(3, 2), kind(3, 2)]
        for model in (*models, *models):
            fmodel = higher.monkeypatch(model)
            assert_close(fmodel(x), model(x))
            assert fmodel.weight is fmodel.fast_params[0]


def test_copies_of_one_module_share_nothing_that_changes() -> None:
    model, x = Changes(), torch.randn(5, 3)
    first, second = higher.monkeypatch(model), higher.monkeypatch(model)
    before = visible(second)
    first.update_params(others(first))
    first(x)
    del first.head.bias
    first.linear.weight = torch.zeros(4, 3)
    first.offset, first.factor, first.norm = torch.zeros(2), 0.0, nn.Identity()
    first.register_forward_hook(lambda *args: None)
    first.track_higher_grads = False
    first.eval()
    assert visible(second) == before
    assert_close(second(x), reference(copy.deepcopy(model), second.fast_params, x))
    check_fresh(model.eval())
