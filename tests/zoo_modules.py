"""Awkward modules, each small: what they hold, and how forward reaches it."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_member import Member


class MLP(nn.Sequential):
    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


class Norms(nn.Module):
    """Every norm, with running statistics, over inputs ``(batch, 3, length)``."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)
        self.batch = nn.BatchNorm1d(4, momentum=momentum)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm(5)
        self.plain = nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.batch(self.conv(x)).tanh())
        return self.plain(self.layer(self.group(x).sin())) * F.layer_norm(x, (4, 5))


class Tied(nn.Module):
    """One tensor in two slots."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def shared_submodule() -> nn.Module:
    part = nn.Linear(3, 3)
    return nn.Sequential(part, nn.Tanh(), part, nn.ModuleDict({"again": part})["again"])


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class EmptySlots(nn.Module):
    """Slots that hold None: a bias, a parameter, and a buffer that the first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        self.register_parameter("scale", None)
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = x.mean() if self.cache is None else self.cache + x.mean()
        return self.linear(x) * self.cache


class Buffers(nn.Module):
    """Buffers of every kind: written in place, bound anew, through ``.data``, not persistent, integer, untouched."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("in_place", torch.zeros(2, 3))
        self.register_buffer("rebound", torch.zeros(3))
        self.register_buffer("data_written", torch.zeros(2, 3))
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("untouched", torch.full((2, 3), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) + self.hidden + self.in_place.sum() + self.rebound + self.data_written.sum() * self.count
        with torch.no_grad():
            self.in_place.mul_(0.9).add_(x.mean())
            self.hidden += 0.5
        self.rebound = self.rebound + x.detach().mean(0)
        self.data_written.data.add_(x.detach().mean())
        self.count += 1
        return out * self.untouched.sum()


class Fails(nn.Module):
    """Writes everywhere, then raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(2, 3))
        self.calls, self.log = 0, []

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.seen.add_(x.detach().mean())
        out = self.linear(x) * self.calls * len(self.log) + self.seen.sum()
        if fail:
            raise KeyError("asked to fail")
        return out


class Helper:
    """Not a module, but it holds one."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __call__(self, x: Tensor) -> Tensor:
        return self.owner.linear(x)


class Closures(nn.Module):
    """Functions that reach the module's weights by every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        linear = self.linear
        self.by_self = lambda x: self.linear(x)
        self.by_child = lambda x: linear(x)
        self.by_default = lambda x, layer=linear: layer(x)
        self.bound = self.step
        self.child_bound = self.linear.forward
        self.partial = functools.partial(F.linear, bias=None)
        self.partial_bound = functools.partial(self.step, scale=0.5)
        self.table = {"nested": [lambda x: self.by_self(x)]}
        self.helper = Helper(self)

    def step(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.linear(x) * scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_child(self.by_self(x).tanh()) + self.by_default(x)
        x = x + self.bound(x) + self.child_bound(x).tanh() + self.partial(x, self.linear.weight) + self.partial_bound(x)
        return x + self.table["nested"][0](x).tanh() + self.helper(x)


class Child(nn.Module):
    """Knows its parent without registering it."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        return self.parent().linear(x)


class WeakParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


class CallCounter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        self.calls += 1
        return out * self.calls


def hooked() -> nn.Module:
    model = MLP()
    model[0].register_forward_hook(CallCounter())
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * module.weight.mean(),))
    model.register_forward_hook(lambda module, args, out: out + model[0].bias.sum())
    return model


class PythonState(nn.Module):
    """Counters, lists and objects that a call changes, and that change its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.count, self.log, self.queue = 0, [], deque([1, 2, 3])
        self.turns = {"first": 1.0, "second": 2.0}
        self.nested = {"deep": [{"calls": 0}]}
        self.counter = CallCounter()

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(self.count)
        self.queue.rotate(1)
        turn = next(iter(self.turns))
        self.turns[turn] = self.turns.pop(turn)
        self.nested["deep"][0]["calls"] += 1
        out = self.linear(x) * self.count * len(self.log) * self.queue[0] * next(iter(self.turns.values()))
        return self.counter(self, x, out) * self.nested["deep"][0]["calls"]


class Rotating(nn.Module):
    """Its only trace is the order of a dict, which equality does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.turns = {"first": 1.0, "second": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        turn = next(iter(self.turns))
        self.turns[turn] = value = self.turns.pop(turn)
        return self.linear(x) * value


class Uncopyable(nn.Module):
    """A lock cannot be copied; the list beside it can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.state = {"lock": threading.Lock(), "log": []}
        self.same = self.state

    def forward(self, x: Tensor) -> Tensor:
        with self.state["lock"]:
            self.state["log"].append(1)
        return self.linear(x) * len(self.same["log"])


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.randn(3, generator=self.generator)


class PlainTensors(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale, self.many, self.last = torch.ones(3), {"a": [torch.ones(3)]}, None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is not None:
            x = x + self.last
        self.scale.mul_(0.5)
        self.many["a"][0] += 1
        self.last = self.linear(x).mean(0)
        return self.linear(x) * self.scale + self.many["a"][0]


class Handles(nn.Module):
    """Weights that stand in a plain list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weights = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x[0] @ self.weights[0].T


@dataclasses.dataclass
class Outputs:
    value: Tensor
    extras: dict[str, Any]


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, params: float, buffers: Tensor, module: Any = None) -> Outputs:
        out = self.linear(x) * params + buffers
        return Outputs(out, {"sum": out.sum(), "none": module, "pair": (out[0], "text")})


MEMBERS = {
    "mlp": Member(MLP, compiles=True),
    "norms": Member(Norms, (4, 3, 5), compiles=True),
    "cumulative": Member(functools.partial(Norms, None), (4, 3, 5)),
    "tied": Member(Tied, compiles=True),
    "shared_submodule": Member(shared_submodule, compiles=True),
    "frozen": Member(Frozen, compiles=True),
    "empty_slots": Member(EmptySlots, compiles=True),
    "buffers": Member(Buffers, blocked="writes through `.data`"),
    "fails": Member(Fails),
    "closures": Member(Closures),
    "weak_parent": Member(WeakParent),
    "hooked": Member(hooked),
    "python_state": Member(PythonState),
    "rotating": Member(Rotating),
    "uncopyable": Member(Uncopyable),
    "noise": Member(Noise, random=True),
    "plain_tensors": Member(PlainTensors),
    "structured": Member(Structured, kwargs={"params": 2.0, "buffers": torch.tensor(1.0)}, compiles=True),
}
