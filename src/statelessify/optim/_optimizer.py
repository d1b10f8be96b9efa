"""The one contract of all optimizers: `Optimizer(init, step)`, and `OptState`, in which all that changes lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tree import (
    first_difference,
    flatten_up_to,
    require_floating,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_names,
    tree_unflatten,
)
from .._words import listed
from ..errors import ShapeError, TreeError
from ..typing import Tree
from ._hyperparameters import Range, check_fits, check_ranges, per_leaf

__all__ = ["OptState", "Optimizer"]


class OptState(NamedTuple):
    """The state of an optimizer, a tree.

    Attributes:
        step: updates so far, a 0-dim int64 tensor.
        hyperparameters: name -> number, tensor, dict, callable of the step, or `per_task`.
        slots: slot name -> a tree like the parameters (momentum buffers and such).
    """

    step: Tensor
    hyperparameters: dict[str, Any]
    slots: dict[str, Any]


class Optimizer(NamedTuple):
    """An optimizer as two pure functions, written for one task; build your own from any two.

    Attributes:
        init: ``init(params) -> state``; the state is any tree.
        step: ``step(params, grads, state) -> (params, state)``.
        elementwise: whether each entry of the result depends on that entry of the inputs only, so that `step` may
            be given all tasks at once. `adapt_tasks` maps it over tasks otherwise.

    Example:
        >>> from statelessify import optim
        >>> halve = optim.Optimizer(lambda p: (), lambda p, g, s: ({k: p[k] - 0.5 * g[k] for k in p}, s))
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    elementwise: bool = False


Update = Callable[[Tensor, Tensor, dict[str, Tensor], dict[str, Any], Any], tuple[Tensor, dict[str, Tensor]]]
"""``update(param, grad, slots, hyperparameters, prepared) -> (param, slots)`` for one leaf."""


class Rule(NamedTuple):
    """An elementwise update rule; `init` and `step` make it an `Optimizer`.

    Attributes:
        hyperparameters: as the user gave them.
        slots: the names of the per-parameter tensors, zero at first.
        update: the rule for one leaf.
        prepare: ``prepare(hyperparameters, step)``: what all leaves with the same hyperparameters share.
    """

    hyperparameters: dict[str, Any]
    slots: tuple[str, ...]
    update: Update
    prepare: Callable[[dict[str, Any], Tensor], Any]

    def init(self, params: Tree) -> OptState:
        require_floating(params, "params")
        leaves, spec = tree_flatten(params)
        shapes = [leaf.shape for leaf in leaves]
        for name, value in self.hyperparameters.items():
            check_fits(name, value, tree_names(params), shapes)
        device = leaves[0].device if leaves else None
        return OptState(
            step=torch.zeros((), dtype=torch.int64, device=device),
            hyperparameters=dict(self.hyperparameters),
            slots={slot: tree_unflatten(spec, [torch.zeros_like(leaf) for leaf in leaves]) for slot in self.slots},
        )

    def step(self, params: Tree, grads: Tree, state: OptState) -> tuple[Tree, OptState]:
        leaves, spec = tree_flatten(params)
        try:
            gradients = flatten_up_to(spec, grads)
        except ValueError:
            raise TreeError(
                f"`params` and `grads` have different structures: {first_difference(spec, tree_flatten(grads)[1])}"
            ) from None
        slots = {slot: tree_leaves(tree) for slot, tree in state.slots.items()}
        prepared: dict[int, Any] = {}
        new_leaves: list[Tensor] = []
        new_slots: dict[str, list[Tensor]] = {slot: [] for slot in slots}
        shapes = [leaf.shape for leaf in leaves]
        self._check_slots(params, slots, shapes)
        values = per_leaf(state.hyperparameters, state.step, lambda: tree_names(params), shapes)
        for index, (leaf, gradient, value) in enumerate(zip(leaves, gradients, values, strict=True)):
            value = tree_map(_on_pairs, value) if leaf.is_complex() else value
            if id(value) not in prepared:
                prepared[id(value)] = value, self.prepare(value, state.step)
            own = {slot: column[index] for slot, column in slots.items()}
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            new, own = _on_reals(self.update, leaf, gradient, own, value, prepared[id(value)][1])
            new_leaves.append(new)
            for slot, tensor in own.items():
                new_slots[slot].append(tensor)
        return tree_unflatten(spec, new_leaves), OptState(
            step=state.step + 1,
            hyperparameters=state.hyperparameters,
            slots={slot: tree_unflatten(spec, column) for slot, column in new_slots.items()},
        )

    def _check_slots(self, params: Tree, slots: dict[str, list[Any]], shapes: list[torch.Size]) -> None:
        if slots.keys() != set(self.slots):
            raise TreeError(
                f"the state has the slots {listed(slots)}, but this optimizer has {listed(self.slots)}; pass the state "
                "of an optimizer of the same kind and options"
            )
        for slot, column in slots.items():
            found = [getattr(tensor, "shape", None) for tensor in column]
            if found != shapes:
                raise ShapeError(
                    f"slot `{slot}` of the state does not fit the parameters {listed(tree_names(params))}: it has "
                    f"{list(map(_words, found))}, they have {list(map(_words, shapes))}; pass a state of these "
                    "parameters (with `in_dims=0`, both per task)"
                )


def _words(shape: torch.Size | None) -> str:
    return "no shape" if shape is None else str(tuple(shape))


def _on_reals(
    update: Update, leaf: Tensor, gradient: Tensor, slots: dict[str, Tensor], value: dict[str, Any], prepared: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Complex parameters are pairs of reals, as in torch.optim."""
    if not leaf.is_complex():
        return update(leaf, gradient, slots, tree_map(partial(_like, leaf), value), prepared)
    pairs = {slot: _as_real(tensor) for slot, tensor in slots.items()}
    reals = _as_real(leaf)
    new, pairs = update(reals, _as_real(gradient), pairs, tree_map(partial(_like, reals), value), prepared)
    return torch.view_as_complex(new), {slot: torch.view_as_complex(tensor) for slot, tensor in pairs.items()}


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


def _on_pairs(value: Any) -> Any:
    """A hyperparameter of a complex parameter, broadcast over its real and imaginary parts."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) and value.ndim else value


def _like(leaf: Tensor, value: Any) -> Any:
    """A hyperparameter in the parameter's dtype and on its device: it never promotes it."""
    return value.to(leaf.device, leaf.dtype) if isinstance(value, Tensor) else value


def elementwise(
    hyperparameters: dict[str, Any],
    ranges: dict[str, Range],
    slots: tuple[str, ...],
    update: Update,
    prepare: Callable[[dict[str, Any], Tensor], Any] = lambda values, step: None,
    pairs: tuple[str, ...] = (),
) -> Optimizer:
    """An optimizer of an elementwise rule, its numbers checked."""
    for name, spec in hyperparameters.items():
        check_ranges(name, spec, ranges.get(name, Range()), name in pairs)
    rule = Rule(hyperparameters, slots, update, prepare)
    return Optimizer(rule.init, rule.step, elementwise=True)


def is_zero(spec: Any) -> bool:
    """Whether a hyperparameter is the number zero (a tensor that happens to be zero may still need a gradient)."""
    return isinstance(spec, (int, float)) and spec == 0


def safe_sqrt(x: Tensor) -> Tensor:
    """``sqrt(x)`` with slope 0 at 0, so that no product with an infinite derivative becomes NaN.

    Exact for ``g / (sqrt(g * g) + eps)``, whose derivative at ``g = 0`` is ``1 / eps``.
    """
    positive = x > torch.finfo(x.dtype).tiny  # below it the second derivative overflows
    return torch.where(positive, torch.sqrt(torch.where(positive, x, 1.0)), 0.0)
