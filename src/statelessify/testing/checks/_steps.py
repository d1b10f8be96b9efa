"""Several steps of an optimizer with given gradients: of a pure one, and of one of torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..._tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ...optim import Optimizer, OptState
from ._inner import TorchOptimizer, copied, hyperparameters_of, with_hyperparameters
from ._probe import is_inexact

__all__: list[str] = []


SMALL = 0.01
"""So much smaller than others are some gradients, for averages to go down as well."""


class Run(NamedTuple):
    """What several steps gave.

    Attributes:
        points: the parameters after each.
        state: after the last.
    """

    points: list[Any]
    state: Any


class Steps(Protocol):
    """An optimizer, to be run on trees ``{"params", "hyperparameters"}``.

    Attributes:
        differentiable: whether its steps have derivatives.
    """

    differentiable: bool

    def hyperparameters(self, params: Any) -> dict[str, Any]: ...

    def run(self, tree: Any, grads: Sequence[Any], state: Any = None) -> Run:
        """Steps from the beginning, or from the state of an earlier run."""
        ...

    def kept(self, state: Any) -> list[Tensor]:
        """The floating tensors of a state."""
        ...


class PureSteps:
    """Those of an `optim.Optimizer`."""

    differentiable = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def hyperparameters(self, params: Any) -> dict[str, Any]:
        return hyperparameters_of(self.optimizer.init(params))

    def start(self, tree: Any) -> Any:
        return with_hyperparameters(self.optimizer.init(tree["params"]), tree)

    def run(self, tree: Any, grads: Sequence[Any], state: Any = None) -> Run:
        params, points = tree["params"], list[Any]()
        state = self.start(tree) if state is None else state
        for each in grads:
            params, state = self.optimizer.step(params, each, state)
            points.append(params)
        return Run(points, state)

    def kept(self, state: Any) -> list[Tensor]:
        tree = state.slots if isinstance(state, OptState) else state
        return [leaf for leaf in tree_leaves(tree) if is_inexact(leaf)]


class TorchSteps:
    """Those of an optimizer of torch, whose gradients are put into `.grad`.

    They have derivatives where it lets parameters be the results of operations: with ``differentiable=True``.
    """

    def __init__(self, make: TorchOptimizer, params: Any) -> None:
        self.make = make
        leaves = [leaf.detach().clone().requires_grad_() for leaf in tree_leaves(params)]
        self.differentiable = bool(make(leaves).defaults.get("differentiable", False))

    def hyperparameters(self, params: Any) -> dict[str, Any]:
        return {}

    def run(self, tree: Any, grads: Sequence[Any], state: Any = None) -> Run:
        leaves, spec = tree_flatten(tree["params"])
        if self.differentiable:
            leaves = [leaf.clone() for leaf in leaves]
        else:
            leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        optimizer, points = self.make(leaves), list[Any]()
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(tree_map(copied, state.state_dict())))
        for each in grads:
            for leaf, grad in zip(leaves, tree_leaves(each), strict=True):
                leaf.grad = grad if self.differentiable else grad.detach().clone()
            optimizer.step()
            points.append(tree_unflatten(spec, [leaf.clone() for leaf in leaves]))
        return Run(points, optimizer)

    def kept(self, state: Any) -> list[Tensor]:
        slots = [value for own in state.state.values() for name, value in own.items() if name != "step"]
        return [value for value in slots if is_inexact(value)]


def gradients_like(params: Any, count: int, seed: int) -> Any:
    """``(count, ...)`` numbers of either sign for each parameter, none zero; the second ones are much smaller."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.ones(count, dtype=torch.float64)
    scales[1::4] = SMALL

    def draw(leaf: Tensor) -> Tensor:
        shape, kind = (count, *leaf.shape), leaf.real.dtype if leaf.is_complex() else leaf.dtype

        def one() -> Tensor:
            sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            size = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
            return (size * sign * scales.reshape(-1, *[1] * leaf.ndim)).to(kind)

        drawn = torch.complex(one(), one()) if leaf.is_complex() else one()
        return drawn.to(leaf.device)

    return tree_map(draw, params)


def each_step(stacked: Any) -> list[Any]:
    """The gradients of each step."""
    leaves, spec = tree_flatten(stacked)
    return [tree_unflatten(spec, list(row)) for row in zip(*(leaf.unbind() for leaf in leaves), strict=True)]
