"""What the tests of patched modules share: small modules, what a caller can see of one, steps by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from zoo import fingerprint, total

# Tests that are not about them do not mind the warnings of differences.
QUIET = "ignore::statelessify.compat.higher.DifferenceWarning"


class Encoder(nn.Module):
    """Two layers and a norm, and a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def encode(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encode(x)).tanh())


class Tied(nn.Module):
    """One tensor in a slot of the root and in one of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = self.linear.weight
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh() @ self.weight + self.bias


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def others(fmodel: Any) -> list[Tensor]:
    """New leaves of the shapes of the weights."""
    return [torch.randn_like(p).requires_grad_(p.requires_grad) for p in fmodel.fast_params]


def times(fmodel: Any) -> int:
    """How many times the history has."""
    return 0 if fmodel._fast_params is None else len(fmodel._fast_params)


def slots(fmodel: nn.Module) -> list[tuple[str, int]]:
    """Which object stands in each slot of a weight or a buffer."""
    found = []
    for path, part in fmodel.named_modules(remove_duplicate=False):
        found += [(f"{path}.{name}", id(t)) for kind in (part._parameters, part._buffers) for name, t in kind.items()]
    return found


def visible(fmodel: Any) -> Any:
    """All that a caller can see of a patched module, by identity and by value, in a form that can be compared."""
    attributes = [
        (path, name, id(value))
        for path, part in fmodel.named_modules()
        for name, value in part.__dict__.items()
        if not name.startswith("_")
    ]
    flags = fmodel.track_higher_grads, fmodel.direct_submodule_call
    return fingerprint(fmodel._fast_params), slots(fmodel), bits(fmodel), attributes, flags


def bits(module: nn.Module) -> list[bytes]:
    """The values of all buffers."""
    return [buffer.detach().numpy().tobytes() for buffer in module.buffers()]


def everything(module: nn.Module) -> Any:
    """All that a module holds, gradients included."""
    return fingerprint(module), [None if p.grad is None else fingerprint(p.grad) for p in module.parameters()]


def reference(module: nn.Module, params: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """What torch computes with a module and other weights, in the order of ``module.parameters()``."""
    names = [name for name, _ in module.named_parameters()]
    return functional_call(module, dict(zip(names, params, strict=True)), args, kwargs)


def slopes(value: Tensor, params: Iterable[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradient of each tensor, zero for what is frozen or not reached."""
    params = list(params)
    wanted = [p for p in params if p.requires_grad] if value.requires_grad else []
    if not wanted:
        return [torch.zeros_like(p) for p in params]
    found = torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    remaining = iter(found)
    return [next(remaining) if p.requires_grad else torch.zeros_like(p) for p in params]


def descend(call: Callable[..., Any], params: Sequence[Tensor], x: Tensor, lr: float = 0.1) -> list[Tensor]:
    """One step by hand, on the graph."""
    found = slopes(total(call(x)) ** 2, params, create_graph=True)
    return [p - lr * slope.tanh() if p.requires_grad else p for p, slope in zip(params, found, strict=True)]
