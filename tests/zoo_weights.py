"""Modules whose weights are computed, shared, masked, wrapped or held in containers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from zoo_member import Member
from zoo_modules import MLP

# ---------------------------------------------------------------- parametrizations, new and legacy


def reparametrized(wrap: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    """A small network whose first layer's weight is computed from other tensors."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with warnings.catch_warnings():
        # the legacy forms are deprecated; models that were built with them are still in use
        warnings.simplefilter("ignore", FutureWarning)
        wrap(model[0], *args, **kwargs)
    return model


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Sharpened(nn.Module):
    """A parametrization with a parameter of its own, and a buffer that counts in training."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.ones(()))
        self.register_buffer("uses", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            self.uses = self.uses + 1
        return weight * self.sharpness / (1 + 0.1 * self.uses)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.sharpness


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def parametrized() -> nn.Module:
    model = MLP()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    parametrize.register_parametrization(model[2], "bias", Doubled())
    return model


def parametrized_twice() -> nn.Module:
    """Three on one tensor, of which two are one module; one of them has tensors of its own."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    sharpened = Sharpened()
    for parametrization in (sharpened, Symmetric(), Doubled()):
        parametrize.register_parametrization(model[0], "weight", parametrization)
    parametrize.register_parametrization(model[2], "weight", sharpened)
    return model


class Cached(nn.Module):
    """Computes a parametrized weight once for both of its uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        parametrize.register_parametrization(self.linear, "weight", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.linear(self.linear(x).tanh())


# ---------------------------------------------------------------- pruning


def pruned(finished: bool = False) -> nn.Module:
    model = MLP()
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    prune.random_unstructured(model[0], "weight", amount=0.2)
    prune.ln_structured(model[2], "weight", amount=1, n=2, dim=1)
    if finished:
        prune.remove(model[0], "weight")
    return model


# ---------------------------------------------------------------- one tensor, several uses


class Autoencoder(nn.Module):
    """Decodes with the encoder's own weight, by a property that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.offset = nn.Parameter(torch.zeros(3))

    @property
    def decoder(self) -> Tensor:
        return self.encoder.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.decoder, self.offset)


class TwoNames(nn.Module):
    """One parameter under two names of one module, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.alias = self.weight
        self.again = nn.ParameterList([self.weight, self.weight])

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.weight).tanh() @ self.alias).tanh() @ self.again[0] * self.again[1].sum()


# ---------------------------------------------------------------- containers


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 3) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.randn(3)})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x * self.weights[0].sum() + self.named["shift"]


class Nested(nn.Module):
    """Containers in containers: indexed, sliced, iterated; one slot is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        pair = lambda: nn.ParameterDict({"weight": torch.randn(3, 3), "bias": torch.randn(3)})
        self.layers = nn.ParameterList([pair(), pair(), 0.5])
        self.groups = nn.ModuleDict({"a": nn.ModuleList([nn.ParameterDict({"b": torch.randn(3)}), nn.Linear(3, 3)])})

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:2]:
            x = (x @ layer["weight"] + layer["bias"]).tanh()
        first, second = self.groups["a"]
        for name, tensor in first.items():
            x = x * tensor if name == "b" else x
        return second(x) * self.layers[-1] + sum(value.sum() for value in self.layers[0].values())


class BufferList(nn.Module):
    """Buffers under numbers, as `nn.ParameterList` holds parameters."""

    def __init__(self, tensors: list[Tensor], persistent: bool = True) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(str(index), tensor, persistent=persistent)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._buffers.values())

    def __getitem__(self, index: int) -> Tensor:
        return self._buffers[str(index % len(self))]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._buffers[str(index % len(self))] = value


class History(nn.Module):
    """Shifts its last inputs through a list of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen = BufferList([torch.zeros(3), torch.ones(3)], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x) + sum(self.seen)
        self.seen[0] = self.seen[-1]
        self.seen[-1] = x.detach().mean(0)
        return out


# ---------------------------------------------------------------- weights that are computed


class LoRA(nn.Module):
    """A frozen layer and a trainable low-rank update of it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted() -> nn.Module:
    model = MLP()
    model[0], model[2] = LoRA(model[0]), LoRA(model[2], rank=1)
    return model


class HyperNetwork(nn.Module):
    """Writes the weights of one layer, and modulates the features of another (FiLM)."""

    def __init__(self) -> None:
        super().__init__()
        self.writer, self.film, self.body = nn.Linear(3, 12), nn.Linear(3, 8), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(0)
        scale, shift = self.film(context).chunk(2)
        hidden = (self.body(x) * (1 + scale) + shift).tanh()
        return F.linear(hidden, self.writer(context).view(3, 4))


class Delegates(nn.Module):
    """Runs its child by `functional_call`, with weights that it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.scale = MLP(), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        own = {name: value * self.scale for name, value in self.child.named_parameters()}
        return functional_call(self.child, own, (x,)) + self.child(x)


class WeightDrop(nn.Module):
    """Keeps a raw weight itself, and puts what it makes of it into its child as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3)
        self.raw = nn.Parameter(self.child.weight.detach().clone())
        del self.child.weight
        self._place()

    def _place(self) -> None:
        self.child.weight = F.dropout(self.raw, 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        self._place()
        return self.child(x)


def equalized() -> nn.Module:
    """A pre-hook computes each weight from another parameter (equalized learning rates)."""
    model = MLP()
    for layer in (model[0], model[2]):
        layer.raw = nn.Parameter(layer.weight.detach() * 2)
        del layer._parameters["weight"]
        layer.register_forward_pre_hook(lambda layer, args: setattr(layer, "weight", layer.raw * 0.5))
    return model


class Standardized(nn.Conv1d):
    """Standardizes its weight before each use."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True).view_as(self.weight)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding)


class Quantized(nn.Module):
    """Rounds weights and activations, and lets gradients pass; its range follows what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.step = nn.Linear(3, 3), nn.Parameter(torch.tensor(0.1))
        self.register_buffer("top", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.top.mul_(0.9).add_(0.1 * x.detach().abs().amax())
        x = x.clamp(-self.top, self.top)
        x = x + (x.div(0.25).round().mul(0.25) - x).detach()
        scaled = self.linear.weight / self.step
        weight = (scaled + (scaled.round() - scaled).detach()) * self.step
        return F.linear(x, weight, self.linear.bias)


legacy = torch.nn.utils
MEMBERS = {
    "weight_norm": Member(functools.partial(reparametrized, parametrizations.weight_norm), compiles=True),
    "weight_norm_legacy": Member(functools.partial(reparametrized, legacy.weight_norm)),
    "spectral_norm": Member(functools.partial(reparametrized, parametrizations.spectral_norm)),
    "spectral_norm_legacy": Member(functools.partial(reparametrized, legacy.spectral_norm)),
    **{
        f"orthogonal_{how}": Member(functools.partial(reparametrized, parametrizations.orthogonal, "weight", how))
        for how in ("matrix_exp", "cayley", "householder")
    },
    "parametrized": Member(parametrized),
    "parametrized_twice": Member(parametrized_twice),
    "cached": Member(Cached),
    "pruned": Member(pruned),
    "pruned_for_good": Member(functools.partial(pruned, finished=True)),
    "autoencoder": Member(Autoencoder),
    "two_names": Member(TwoNames),
    "containers": Member(Containers, compiles=True),
    "nested": Member(Nested),
    "history": Member(History),
    "lora": Member(adapted, compiles=True),
    "hypernetwork": Member(HyperNetwork),
    "delegates": Member(Delegates),
    "weight_drop": Member(WeightDrop, random=True),
    "equalized": Member(equalized),
    "standardized": Member(functools.partial(Standardized, 3, 4, 2), (4, 3, 5)),
    "quantized": Member(Quantized),
}
