"""Modules that do with Python what Python lets them: hooks, attributes of their own making, reflection in forward."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_member import Member
from zoo_modules import MLP

# ---------------------------------------------------------------- hooks


class Scale(nn.Module):
    """A hook that is a module, with a parameter that is its owner's too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 1.5))

    def forward(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * self.scale


class EveryHook(nn.Module):
    """Each kind of forward hook; some take keyword arguments, some run always, some see other submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), Scale()
        self.seen: list[int] = []
        self.body.register_forward_pre_hook(self.shift, with_kwargs=True)
        self.body.register_forward_hook(self.scale)
        self.body.register_forward_hook(self.note, with_kwargs=True, always_call=True)
        self.head.register_forward_pre_hook(lambda head, args: args[0] * self.body.bias.mean(), prepend=True)
        self.head.register_forward_hook(lambda head, args, out: out + head.weight.sum() * len(self.seen))

    def shift(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"input": kwargs["input"] + self.head.bias.sum()}

    def note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        self.seen.append(len(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(input=x).tanh())


def backward_hooks() -> nn.Module:
    """Hooks that change gradients; each is one that an ordinary module would call as well."""
    model = MLP()
    model[1].register_full_backward_hook(lambda module, grads_in, grads_out: (grads_in[0] * 2,))
    model[2].register_full_backward_pre_hook(lambda module, grads_out: (grads_out[0] * module.bias.numel(),))
    return model


class HalvesGradient(nn.Module):
    """Halves the gradient of its body by a hook on a tensor, where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 0.5)
        return self.head(x.sin())


def state_dict_hooks() -> nn.Module:
    """Reads itself through `state_dict`, whose entries its hooks rename, add to and cast."""

    class Model(MLP):
        def forward(self, x: Tensor) -> Tensor:
            state = self.state_dict(keep_vars=True)
            return F.linear(super().forward(x), state["renamed"].tanh()) + state["extra"]

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[prefix + "renamed"] = state.pop(prefix + "2.weight")[:, :2]
        state[prefix + "extra"] = module[0].bias.sum()

    model = Model()
    model.register_state_dict_post_hook(rename)
    model.register_load_state_dict_pre_hook(lambda module, state, *_: state.pop("extra", None))
    model.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
    return model


# ---------------------------------------------------------------- reflection in forward


class Reflects(nn.Module):
    """Reads its own tensors by each method there is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x).tanh())
        penalty = sum(p.square().sum() for p in self.parameters())
        penalty = penalty + dict(self.named_parameters())["body.bias"].sum() + self.get_parameter("body.weight").sum()
        penalty = penalty + dict(self.named_buffers())["norm.running_mean"].sum() + self.get_buffer("norm.running_var")
        penalty = penalty + self.state_dict(keep_vars=True)["norm.weight"] * self.get_submodule("norm").bias
        penalty = penalty + self.state_dict()["body.weight"].sum()  # a constant: state_dict detaches
        penalty = penalty + sum(m.weight.norm() for m in self.modules() if hasattr(m, "weight"))
        return x + penalty + self._parameters.__len__() + len(list(self.children())) + self.body._parameters["bias"]


class AsksForParameters(nn.Module):
    """Its result depends on whether its tensors are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        found = [t for t in (self.weight, self.shift) if isinstance(t, nn.Parameter)]
        return sum((x @ t for t in found), x * len(found))


class AsksForGradients(nn.Module):
    """Its result depends on which of its tensors require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return self.head(self.body(x)) * trained


class Copies(nn.Module):
    """Deep-copies a child in forward, and runs the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.head = MLP(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        target = copy.deepcopy(self.child).requires_grad_(False)
        return self.head(self.child(x)) - target(x)


class Modes(nn.Module):
    """Changes its own mode for a part of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.other = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.training
        x = self.body(x)
        self.eval()
        first = self.norm(x)
        self.other.train()
        second = self.other(x.sin())
        self.train(before)
        return first + second * self.other(x)


# ---------------------------------------------------------------- attributes


class Attributes(nn.Module):
    """`__getattr__` and `__setattr__` of its own: forwards to a child, sorts tensors into buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.level = torch.zeros(3)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and name not in self._buffers:
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.level = self.level + x.detach().mean(0)
        return x @ self.weight.T + self.bias * self.level


class Property(nn.Module):
    """A weight behind a property, and an output that it keeps for later."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.linear = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)
        self.last: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    @scale.setter
    def scale(self, value: Tensor) -> None:
        self.log_scale.data = value.log()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.linear(x) * self.scale
        self.activations = {"last": self.last, "norm": self.last.norm()}
        return self.last / self.activations["norm"]


class Unregistered(nn.Module):
    """Holds modules in a list and a dict that torch does not look into, and one behind `object.__setattr__`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.many = [nn.Linear(3, 3), nn.BatchNorm1d(3)]
        self.named = {"again": self.linear, "other": nn.Linear(3, 3)}
        object.__setattr__(self, "hidden", nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.many, *self.named.values(), self.hidden):
            x = module(self.linear(x)).tanh()
        return x


class Functions(nn.Module):
    """Bound methods of children, of itself and of a class, chosen by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.call = self.first.__call__
        self.steps = OrderedDict(first=self.first.forward, second=self.second, method=self.mix)
        self.unbound = Functions.mix

    def mix(self, x: Tensor) -> Tensor:
        return x + self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second", "method"):
            x = self.steps[name](x).tanh()
        return self.unbound(self, self.call(x))


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


# ---------------------------------------------------------------- outputs


class Pair(NamedTuple):
    mean: Tensor
    scale: Tensor


@dataclasses.dataclass
class Prediction:
    pair: Pair
    extras: dict[str, Any]


class Outputs(nn.Module):
    """A dataclass that holds a NamedTuple and a dict; one of its entries is a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale, self.bias = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Prediction:
        pair = Pair(self.mean(x), F.softplus(self.scale(x)))
        return Prediction(pair, {"bias": self.bias * 1, "hidden": [x.sin(), {"deep": x.sum()}], "name": "outputs"})


MEMBERS = {
    "every_hook": Member(EveryHook),
    "backward_hooks": Member(
        backward_hooks, blocked="torch leaves backward hooks out under vmap, and refuses them under grad"
    ),
    "halves_gradient": Member(HalvesGradient, blocked="torch refuses hooks on tensors inside its transforms"),
    "state_dict_hooks": Member(state_dict_hooks),
    "reflects": Member(Reflects),
    "asks_for_parameters": Member(AsksForParameters),
    "asks_for_gradients": Member(AsksForGradients),
    "copies": Member(Copies, blocked="torch refuses deep copies inside its transforms"),
    "modes": Member(Modes),
    "attributes": Member(Attributes),
    "property": Member(Property),
    "unregistered": Member(Unregistered, blocked="the statistics of a module that torch cannot see are shared"),
    "functions": Member(Functions),
    "outputs": Member(Outputs, compiles=True),
    "forward_on_instance": Member(forward_on_instance),
    "overridden_call": Member(OverriddenCall, compiles=True),
    "slotted": Member(Slotted),
}
