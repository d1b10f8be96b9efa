"""Small modules that `modules` builds from torch's layers: what those alone do not have."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Buffered", "Chain", "Residual", "Shared", "Single", "Tied"]


class Residual(nn.Module):
    """``x + body(x)``.

    Args:
        body: a module whose output has the shape of its input.

    Example:
        >>> Residual(nn.Tanh())(torch.zeros(2, 1)).shape
        torch.Size([2, 1])
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Tied(nn.Module):
    """``last(first(x))``, where one parameter stands in both slots ``weight``.

    Args:
        first: a module with a parameter ``weight``, which stays.
        last: a module with one of the same shape, which is replaced.

    Example:
        >>> sorted(dict(Tied(nn.Linear(2, 2), nn.Linear(2, 2)).named_parameters()))
        ['first.bias', 'first.weight', 'last.bias']
    """

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.last = last
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class Shared(nn.Module):
    """``again(first(x))``, where both are the same module.

    Args:
        layer: a module whose output has the shape of its input.

    Example:
        >>> sorted(dict(Shared(nn.Linear(2, 2)).named_parameters()))
        ['first.bias', 'first.weight']
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = layer
        self.again = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


class Buffered(nn.Module):
    """``(x - offset) * scale`` with registered buffers; in training the offset moves toward the mean of the batch.

    Args:
        features: the last dimension of the input.
        persistent: whether ``scale`` is in the state dict.
        moves: whether a call in training changes ``offset`` in place, and counts itself in ``calls``.

    Example:
        >>> block = Buffered(1)
        >>> block(torch.ones(2, 1)).tolist(), block.offset.tolist(), int(block.calls)
        ([[1.0], [1.0]], [0.25], 1)
    """

    offset: Tensor
    scale: Tensor
    calls: Tensor

    def __init__(self, features: int, *, persistent: bool = True, moves: bool = True) -> None:
        super().__init__()
        self.moves = moves
        self.register_buffer("offset", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features), persistent=persistent)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out = (x - self.offset) * self.scale
        if self.training and self.moves:
            mean = x.detach().flatten(0, -2).mean(0)
            self.offset.add_(0.25 * (mean - self.offset))
            self.calls.add_(1)
        return out


class Single(nn.Module):
    """One tensor in, one tensor out: for layers that take several inputs, or return several outputs.

    Args:
        layer: any module.
        inputs: how many times it is given the input.

    Example:
        >>> Single(nn.Bilinear(3, 3, 1), 2)(torch.ones(2, 3)).shape
        torch.Size([2, 1])
        >>> Single(nn.GRU(3, 4, batch_first=True))(torch.ones(2, 5, 3)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, layer: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.layer(*[x] * self.inputs)
        return cast("tuple[Tensor, ...]", out)[0] if isinstance(out, tuple) else out


class Chain(nn.Sequential):
    """An `nn.Sequential` whose first module takes all inputs.

    Example:
        >>> Chain(nn.Bilinear(1, 2, 3), nn.Tanh())(torch.ones(2, 1), torch.ones(2, 2)).shape
        torch.Size([2, 3])
    """

    def forward(self, *inputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, *rest = self
        out = first(*inputs)
        for layer in rest:
            out = layer(out)
        return out
