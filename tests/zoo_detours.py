"""Modules that reach their tensors or keep their state by detours: right, or a named error, never a wrong number."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from zoo_member import Member

# ---------------------------------------------------------------- submodules behind what is not copied


class AttributeDict(dict[str, Any]):
    """As many projects write it; `copy.deepcopy` fails on it, since it has no ``__deepcopy__`` *key*."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Singleton:
    """Says that it is its own copy, as settings and loggers do."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __deepcopy__(self, memo: Any) -> Singleton:
        return self


class Holder(nn.Module):
    """Calls its layer through whatever `how` makes of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(3, 3), how
        self.held: Any = {
            "attribute dict": lambda: AttributeDict(layer=self.linear),
            "singleton": lambda: Singleton(self.linear),
            "read-only dict": lambda: types.MappingProxyType({"layer": self.linear}),
            "dict view": lambda: {"layer": self.linear}.values(),
            "weak method": lambda: weakref.WeakMethod(self.linear.forward),
            "weak dict": lambda: weakref.WeakValueDictionary({"layer": self.linear}),
            "function attribute": self._function,
            "cached method": lambda: functools.lru_cache(self._weight),
        }[how]()

    def _function(self) -> Any:
        def call(x: Tensor) -> Tensor:
            return call.layer(x)

        call.layer = self.linear
        return call

    def _weight(self) -> Tensor:
        return self.linear.weight.exp()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cached method":
            return x @ self.held()
        if self.how == "dict view":
            return next(iter(self.held))(x)
        if self.how in ("attribute dict", "read-only dict", "weak dict"):
            return self.held["layer"](x)
        if self.how == "weak method":
            return self.held()(x)
        return (self.held.held if self.how == "singleton" else self.held)(x)


HOLDERS = ["attribute dict", "singleton", "read-only dict", "dict view", "weak method", "weak dict"]
HOLDERS += ["function attribute", "cached method"]

# ---------------------------------------------------------------- other names for the same numbers


class View(nn.Module):
    """Keeps a tensor that shares its weight's memory: an ordinary module sees each update through it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        weight = self.linear.weight
        self.view = {"data": weight.data, "detached": weight.detach().T, "in the graph": weight.T}[how]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.view


class Prior(nn.Module):
    """Builds a distribution of its own parameters once."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.prior = torch.distributions.Normal(self.mean, self.scale, validate_args=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.prior.log_prob(x)


class Overlapping(nn.Module):
    """One buffer is a view of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("whole", torch.zeros(6))
        self.register_buffer("part", self.whole[:3])

    def forward(self, x: Tensor) -> Tensor:
        self.whole.add_(1)
        return self.linear(x) + self.part


class Keyed(nn.Module):
    """Looks up a factor by the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.factors = {self.linear.weight: 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factors.get(self.linear.weight, 1.0)


class Annotated(nn.Module):
    """Has written a note on its parameter (the width of a layer, for scaled initializations)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.linear.weight.multiplier = 5.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * getattr(self.linear.weight, "multiplier", 1.0)


# ---------------------------------------------------------------- state that is hard to put back

MISSING = object()


class Sentinel(nn.Module):
    """Tells by identity whether a value has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.given = nn.Linear(3, 3), MISSING

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if self.given is MISSING else 1.0)


class Generates(nn.Module):
    """Takes the next value of a generator in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.values = nn.Linear(3, 3), (value for value in range(1, 100))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * next(self.values)


class Settings(nn.Module):
    """Counts in a dict that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.settings = nn.Linear(3, 3), AttributeDict(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.settings.calls += 1
        return self.linear(x) * self.settings.calls


class Adversarial(nn.Module):
    """Switches the gradient of one part off and on again."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.critic.requires_grad_(False)
        fooled = self.critic(self.generator(x))
        self.critic.requires_grad_(True)
        return fooled + self.critic(x)


class Saliency(nn.Module):
    """Calls `backward` in forward, which adds to the gradients of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            probe = x.detach().requires_grad_()
            self.linear(probe).square().sum().backward()
        return self.linear(x * probe.grad.abs())


class SparseGraph(nn.Module):
    """Its neighbours in a sparse buffer."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        dense = torch.eye(4) + torch.eye(4).roll(1, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls one layout a beta
            self.register_buffer("neighbours", dense.to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        return self.neighbours @ self.linear(x)


class Lasting(nn.Module):
    """Makes a layer when it is first called, and so has parameters that nobody knows of before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "head"):
            self.head = nn.Linear(x.shape[-1], 2)
        return self.head(self.linear(x))


DETOURS = {
    **{how.replace(" ", "_"): Member(functools.partial(Holder, how)) for how in HOLDERS},
    **{f"view_{how}".replace(" ", "_"): Member(functools.partial(View, how)) for how in ("data", "detached")},
    "view_in_the_graph": Member(functools.partial(View, "in the graph")),
    "prior": Member(Prior),
    "overlapping": Member(Overlapping),
    "keyed": Member(Keyed),
    "annotated": Member(Annotated),
    "sentinel": Member(Sentinel),
    "generates": Member(Generates),
    "settings": Member(Settings),
    "adversarial": Member(Adversarial),
    "saliency": Member(Saliency),
    "sparse_coo": Member(functools.partial(SparseGraph, torch.sparse_coo)),
    "sparse_csr": Member(functools.partial(SparseGraph, torch.sparse_csr)),
    "lasting": Member(Lasting, random=True),
}
