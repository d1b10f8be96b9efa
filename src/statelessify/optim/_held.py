"""The parameters that an optimizer of torch holds, by name; the others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._tree import require_floating, tree_flatten, tree_names, tree_unflatten
from .._words import listed
from ..errors import NamesError, ShapeError
from ..typing import Tree
from ._given import aligned
from ._optimizer import Optimizer, OptState

__all__: list[str] = []


class Group(NamedTuple):
    """A parameter group: names, the parameters themselves, and everything else that stands in the group."""

    names: list[str]
    params: list[Tensor]
    options: dict[str, Any]


def groups_of(optimizer: torch.optim.Optimizer, module: nn.Module | None) -> list[Group]:
    """The groups of an optimizer, the parameters named by identity."""
    known = None if module is None else {id(p): name for name, p in module.named_parameters()}
    found: list[Group] = []
    for index, group in enumerate(optimizer.param_groups):
        params: list[Tensor] = group["params"]
        if known is None:
            if "param_names" not in group:
                raise NamesError(
                    f"the parameters of this {type(optimizer).__name__} have no names; pass the module that they "
                    "belong to (`module=`), or make the optimizer from `module.named_parameters()`"
                )
            names = list(group["param_names"])
        else:
            for place, p in enumerate(params):
                if id(p) not in known:
                    raise NamesError(
                        f"parameter {place} of group {index}, of shape {tuple(p.shape)}, is not one of the module's; "
                        "pass the module whose parameters the optimizer was made with"
                    )
            names = [known[id(p)] for p in params]
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        found.append(Group(names, params, options))
    return found


def trainable(groups: list[Group]) -> dict[str, torch.Size]:
    """The shape of each parameter that the optimizer would move."""
    pairs = [pair for group in groups for pair in zip(group.names, group.params, strict=True)]
    return {name: p.shape for name, p in pairs if p.requires_grad}


@dataclass(eq=False)
class Held:
    """An optimizer on a tree, made from one on a flat dict of some of its parameters.

    Attributes:
        shapes: the parameters that are held; None for all.
        start: ``start(params) -> state``.
        move: ``move(params, grads, state) -> (params, state)``.
    """

    shapes: dict[str, torch.Size] | None
    start: Callable[[dict[str, Tensor]], OptState]
    move: Callable[[dict[str, Tensor], dict[str, Any], OptState], tuple[dict[str, Tensor], OptState]]

    def optimizer(self, elementwise: bool) -> Optimizer:
        return Optimizer(self.init, self.step, elementwise)

    def init(self, params: Tree) -> OptState:
        require_floating(params, "params")
        leaves, _ = tree_flatten(params)
        flat = dict(zip(tree_names(params), leaves, strict=True))
        if isinstance(params, dict) and cast("dict[str, Any]", params).keys() == flat.keys():
            flat = {name: flat[name] for name in cast("dict[str, Any]", params)}  # in the order of its maker
        if self.shapes is None:
            return self.start(flat)
        if missing := [name for name in self.shapes if name not in flat]:
            raise NamesError(
                f"the optimizer holds {listed(missing)}, which `params` does not have: {listed(flat)}; pass the "
                "parameters of the module that the optimizer was made for"
            )
        for name, shape in self.shapes.items():
            if flat[name].shape != shape:
                raise ShapeError(
                    f"parameter `{name}` has shape {tuple(flat[name].shape)}, but the optimizer holds one of shape "
                    f"{tuple(shape)}; pass the parameters of the module that the optimizer was made for"
                )
        return self.start({name: flat[name] for name in self.shapes})

    def step(self, params: Tree, grads: Tree, state: OptState) -> tuple[Tree, OptState]:
        leaves, spec = tree_flatten(params)
        gradients = aligned(spec, grads)
        names = tree_names(params)
        held = [index for index, name in enumerate(names) if self.shapes is None or name in self.shapes]
        moved, state = self.move(
            {names[index]: leaves[index] for index in held}, {names[index]: gradients[index] for index in held}, state
        )
        return tree_unflatten(spec, [moved.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)]), state
