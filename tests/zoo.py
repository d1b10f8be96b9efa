"""Awkward modules, each small, and what an ordinary module of the same values does with the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

# ---------------------------------------------------------------- modules


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


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(3, 3, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None])[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.attention(x, x, x)[0])


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrized() -> nn.Module:
    model = MLP()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    parametrize.register_parametrization(model[2], "bias", Doubled())
    return model


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        out = (x.to(self.weight.dtype) @ self.weight) * self.phase
        self.phase = self.phase * 1j
        return out.abs()


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 3) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x * self.weights[0].sum() + self.named["shift"]


def forward_on_instance() -> nn.Module:
    model = MLP()
    model.forward = types.MethodType(lambda self, x: self[2](self[0](x).sin()), model)
    return model


class OverriddenCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Slotted(nn.Module):
    __slots__ = ("calls",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.linear(x) * self.calls[0]


class WritesParameter(nn.Module):
    """What no pure function can do: `how` it changes its own parameter."""

    def __init__(self, how: str = "add_") -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "add_":
            with torch.no_grad():
                self.weight.add_(1.0)
        elif self.how == "data":
            self.weight.data.add_(1.0)
        elif self.how == "rebind":
            self.weight = nn.Parameter(self.weight.detach() + 1)
        elif self.how == "in training" and self.training:
            with torch.no_grad():
                self.weight.add_(1.0)
        return x * self.weight


# ---------------------------------------------------------------- members


class Member(NamedTuple):
    """One module of the zoo: how to make it (the same each time), and what it is called with."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 3)
    kwargs: Mapping[str, Any] = types.MappingProxyType({})
    vmaps: bool = True
    compiles: bool = True

    def make(self, training: bool = True) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return self.build().train(training)

    def inputs(self, *batch: int) -> Tensor:
        return torch.randn(*batch, *self.shape)


ZOO = {
    "mlp": Member(MLP),
    "norms": Member(Norms, (4, 3, 5)),
    "cumulative": Member(functools.partial(Norms, None), (4, 3, 5), compiles=False),
    "tied": Member(Tied),
    "shared_submodule": Member(shared_submodule),
    "frozen": Member(Frozen),
    "empty_slots": Member(EmptySlots),
    "buffers": Member(Buffers, vmaps=False, compiles=False),
    "fails": Member(Fails, compiles=False),
    "closures": Member(Closures, compiles=False),
    "weak_parent": Member(WeakParent, compiles=False),
    "hooked": Member(hooked, compiles=False),
    "python_state": Member(PythonState, compiles=False),
    "rotating": Member(Rotating, compiles=False),
    "uncopyable": Member(Uncopyable, compiles=False),
    "noise": Member(Noise, vmaps=False, compiles=False),
    "plain_tensors": Member(PlainTensors, vmaps=False, compiles=False),
    "structured": Member(Structured, kwargs={"params": 2.0, "buffers": torch.tensor(1.0)}, vmaps=False),
    "rnn": Member(functools.partial(Recurrent, nn.RNN), vmaps=False, compiles=False),
    "lstm": Member(Recurrent, vmaps=False, compiles=False),
    "attention": Member(Attention, (2, 3, 4), vmaps=False),
    "parametrized": Member(parametrized, vmaps=False, compiles=False),
    "complex": Member(Complex),
    "containers": Member(Containers),
    "forward_on_instance": Member(forward_on_instance, compiles=False),
    "overridden_call": Member(OverriddenCall),
    "slotted": Member(Slotted, compiles=False),
}


# ---------------------------------------------------------------- what to compare with


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a module's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def total(value: Any) -> Tensor:
    """A number that depends on every tensor of an output, not symmetrically."""
    return sum((t.real * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in tensors_in(value))


def ordinary(member: Member, params: dict[str, Tensor], buffers: dict[str, Tensor], training: bool) -> nn.Module:
    """A module of its own, made anew, that holds these values in the ordinary way."""
    module = member.make(training)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in {**params, **buffers}.items():
            if name in own:
                own[name].copy_(value)
            else:
                path, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(path), attribute, value.clone())
    return module


def fingerprint(value: Any, seen: dict[int, int] | None = None) -> Any:
    """All that an object holds, by value and by identity, in a form that can be compared."""
    seen = {} if seen is None else seen
    if isinstance(value, (bool, int, float, str, bytes, type, type(None), torch.dtype, torch.device, types.ModuleType)):
        return value
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    parts: list[Any] = [type(value).__name__, id(value)]
    if isinstance(value, Tensor):
        if isinstance(value, nn.parameter.UninitializedTensorMixin):
            return tuple(parts)
        holds_values = type(value) in (Tensor, nn.Parameter) and not value.is_meta
        bits = value.detach().numpy().tobytes() if holds_values else b""
        return (*parts, value.shape, value.requires_grad, bits)
    if isinstance(value, torch.Generator):
        return (*parts, value.get_state().numpy().tobytes())
    parts += [fingerprint(item, seen) for item in _inside(value)]
    return tuple(parts)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, item)
    elif isinstance(value, (list, tuple, deque)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from [cell.cell_contents for cell in value.__closure__ or ()]
        yield from (value.__defaults__, value.__kwdefaults__)
    if not isinstance(value, types.FunctionType):
        yield from getattr(value, "__dict__", {}).values()
    for cls in type(value).__mro__:
        names = cls.__dict__.get("__slots__", ())
        yield from [getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)]


def perturbed(tree: dict[str, Tensor], scale: float = 0.1) -> dict[str, Tensor]:
    """Other values of the same shapes, as new leaves; integers stay."""
    return {name: _moved(tensor, scale) for name, tensor in tree.items()}


def _moved(tensor: Tensor, scale: float) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    noise = torch.rand_like(tensor)  # positive: running variances stay so
    return (tensor.detach() + scale * noise).requires_grad_(tensor.requires_grad)
