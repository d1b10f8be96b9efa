"""What is read off the code behind a module: only what leaves nothing behind counts as reading."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from zoo import Member, members, ordinary, seeded, tensors_in

from statelessify import stateless
from statelessify._known import conduct_of
from statelessify._reads import mentioned, only_reads

pytestmark = pytest.mark.usefixtures("float64")

GAIN, SEEN, CLASSES = 2.0, [], (nn.Parameter,)
linear = F.linear


def doubled(x: Tensor, times: int = 2) -> Tensor:
    return x * times


def noting(x: Tensor) -> Tensor:
    SEEN.append(1)
    return x


def looks(x: Tensor) -> bool:
    return isinstance(x, CLASSES)


class Base(nn.Module):
    kind = "relu"

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers, self.act = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)]), torch.tanh
        self.weight, self.sizes = nn.Parameter(torch.ones(3)), [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)

    def helper(self, x: Tensor) -> Tensor:
        return self.act(x)

    def writing(self, x: Tensor) -> Tensor:
        self.count = 1
        return x


def made(forward: Callable[..., Any], **members: Any) -> nn.Module:
    return type("Made", (Base,), {"forward": forward, "__module__": __name__, **members})()


READS: dict[str, Callable[..., Any]] = {
    "parts": lambda self, x: F.relu(self.first(x)) + torch.relu(self.layers[0](x)),
    "own method": lambda self, x: self.helper(x) * self.weight,
    "global function": lambda self, x: doubled(x, 3) * GAIN * math.sqrt(2) + linear(x, self.first.weight),
    "branches": lambda self, x: x.sum() if self.training and x.shape[0] > len(self.sizes) else x * self.sizes[0],
    "builtins": lambda self, x: sum((x, x)) if isinstance(x, torch.Tensor) else max(1, 2),
}
MORE: dict[str, Callable[..., Any]] = {
    "method that writes": lambda self, x: self.writing(x),
    "list": lambda self, x: self.sizes.append(1),
    "setattr": lambda self, x: setattr(self, "bias", x),
    "slots": lambda self, x: self._parameters["weight"],
    "parameters": lambda self, x: sum(p.sum() for p in self.parameters()),
    "mode": lambda self, x: self.first.eval()(x),
    "closure": lambda self, x: lambda: self.first(x),
    "looks": lambda self, x: isinstance(self.weight, nn.Parameter),
    "looks by a function": lambda self, x: looks(self.weight),
    "type": lambda self, x: type(self.weight),
    "data": lambda self, x: self.weight.data,
    "hook": lambda self, x: self.weight.register_hook(print),
    "checkpoint": lambda self, x: checkpoint(self.first, x, use_reentrant=False),
    "checkpoint, by its name": lambda self, x: torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False),
    "function that notes": lambda self, x: noting(x),
    "copy": lambda self, x: copy.copy(self.first),
    "dunder": lambda self, x: self.__dict__,
    "compile": lambda self, x: torch.compile(self.first)(x),
    "object": lambda self, x: functools.partial(doubled, x),
}


def setting(self: Any, x: Tensor) -> Tensor:
    self.count = 1
    return x


def item(self: Any, x: Tensor) -> Tensor:
    self.sizes[0] = 2
    return x


def generating(self: Any, x: Tensor) -> Any:
    yield self.first(x)


def globally(self: Any, x: Tensor) -> Tensor:
    global GAIN
    GAIN = GAIN * 1.0
    return x


MORE |= {"attribute": setting, "item": item, "generator": generating, "global": globally}


@pytest.mark.parametrize("name", READS)
def test_reading_is_known(name: str) -> None:
    module = made(READS[name])
    assert only_reads(module)
    assert conduct_of(module) == "only reads"
    apply, params, buffers = stateless(module)
    for _ in range(3):
        assert_close(apply(params, buffers, torch.ones(3, 3))[0], module(torch.ones(3, 3)))


@pytest.mark.parametrize("name", MORE)
def test_anything_else_is_not(name: str) -> None:
    assert not only_reads(made(MORE[name]))


@pytest.mark.parametrize(
    "members",
    [
        {"__getattr__": lambda self, name: nn.Module.__getattr__(self, name)},
        {"__call__": lambda self, x: x},
        {"bias": property(lambda self: self.weight)},
        {"_call_impl": lambda self, x: x},
        {"kind": nn.Parameter},
        {"made": classmethod(lambda cls: cls)},
    ],
)
def test_classes_that_do_more_are_not(members: dict[str, Any]) -> None:
    assert not only_reads(made(READS["parts"], **members))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "call", noting),
        lambda m: setattr(m, "kind", nn.Parameter),
        lambda m: setattr(m, "plain", torch.ones(3)),
        lambda m: setattr(m, "table", {}),
        lambda m: setattr(m.first, "forward", noting),
        lambda m: m.first.register_forward_hook(lambda *_: None),
        lambda m: m.first.register_full_backward_hook(lambda *_: None),
        lambda m: setattr(m, "memory", nn.LSTM(3, 3)),
        lambda m: setattr(m, "rows", nn.Embedding(3, 3, max_norm=1.0)),
    ],
)
def test_instances_that_hold_more_are_not(change: Callable[[Any], Any]) -> None:
    module = made(READS["parts"])
    change(module)
    assert conduct_of(module) == "unknown"


def test_what_torchs_code_calls_is_looked_at_too() -> None:
    class Layer(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            self.seen = x
            return x

    assert conduct_of(nn.TransformerEncoderLayer(4, 2, 5)) == "writes buffers"
    assert conduct_of(Layer(4, 2, 5)) == "unknown"


def test_names_are_found_behind_functions_and_attributes() -> None:
    module = made(lambda self, x: doubled(x) + looks(x))
    module.table = {"a": [functools.partial(noting, 1)]}
    names = mentioned(module)
    assert names is not None
    assert {"CLASSES", "SEEN", "append", "looks"} <= names


@members(lambda m: not m.random)
def test_known_members_agree_with_ordinary_modules_over_many_calls(member: Member) -> None:
    """Each call with tensors of its own, so that a stale one would show."""
    module = member.make()
    apply, params, buffers = stateless(module, params="detach", buffers="detach", **member.split)
    for scale in (1.0, 0.5, 2.0, 1.0):
        own = {name: (p.detach() * scale).requires_grad_(p.requires_grad) for name, p in params.items()}
        x = member.inputs()
        expected = seeded(ordinary(member, own, buffers, True), x, **member.kwargs)
        assert_close(tensors_in(seeded(apply, own, buffers, x, **member.kwargs)[0]), tensors_in(expected))
