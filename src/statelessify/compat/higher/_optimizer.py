"""`DifferentiableOptimizer`: the step of an optimizer of torch, on the weights of a patched module, on the graph."""

from __future__ import annotations

import abc
import collections
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..._graph import gradients_of
from ..._transforms import transforming
from ...errors import DerivativeError, FastWeightsError, HyperparameterError
from ._base import MonkeyPatchBase, weights_of
from ._differences import differs
from ._weights import FastWeights
from .utils import _is_container, _recursive_copy_and_cast, _recursive_map

__all__ = ["DifferentiableOptimizer"]

Override = dict[str, Sequence[Any]]
"""For each name of a hyperparameter one value for all groups, or one for each."""

GradCallback = Callable[[Any], Sequence[Any]]
"""Takes the tuple of all gradients, None for unused and frozen parameters, and returns as many."""


class DifferentiableOptimizer(abc.ABC):
    """The base of all differentiable optimizers; a subclass writes `_update`.

    Attributes:
        param_groups: as in torch; each ``group["params"]`` has the current weights during a step.
        state: ``state[group][index]`` is the dict of one parameter, a copy of the optimizer's own at first.
    """

    _keeps_shapes = False  # whether what `_update` makes of a weight is known to fit
    param_groups: list[dict[str, Any]]
    state: list[collections.defaultdict[int, dict[str, Any]]]

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Any = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        """Begin where an optimizer stands, which is never changed.

        Args:
            other: the optimizer, whose groups and state are copied.
            reference_params: all parameters of the module, which give the order of every list.
            fmodel: the patched module to update.
            device: where the state is moved to.
            override: name -> list of one value, or of one for each group, in place of the group's; tensors may require
                gradients.
            grad_callback: applied to the tuple of gradients in each step.
            track_higher_grads: with False each update is detached.
            **kwargs: ignored.

        Raises:
            ValueError: a parameter of `other` that is not in `reference_params`; an override of another length.
        """
        reference = list(reference_params)
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._fmodel = fmodel
        self._group_to_param_list: list[list[int]] = []
        self.param_groups, self.state = [], []
        index = {id(p): place for place, p in reversed(list(enumerate(reference)))}
        for group in other.param_groups:
            places = [index.get(id(p)) for p in group["params"]]
            if None in places:
                number = places.index(None)
                raise FastWeightsError(
                    f"parameter {number} of a group of this {type(other).__name__}, of shape "
                    f"{tuple(group['params'][number].shape)}, is none of `reference_params`; pass all parameters of "
                    "the module that the optimizer was made with"
                )
            self._group_to_param_list.append([place for place in places if place is not None])
            state: collections.defaultdict[int, dict[str, Any]] = collections.defaultdict(dict)
            for number, p in enumerate(group["params"] if other.state else ()):
                if p in other.state:
                    state[number] = {k: _recursive_copy_and_cast(v, device) for k, v in other.state[p].items()}
            self.state.append(state)
            self.param_groups.append({name: _own(value) for name, value in group.items() if name != "params"})
            self.param_groups[-1]["params"] = [None] * len(places)
        if override is not None:
            self._apply_override(override)

    def _apply_override(self, override: Override) -> None:
        groups = self.param_groups
        check_lengths(override, len(groups))
        for name, values in override.items():
            for index, group in enumerate(groups):
                group[name] = values[0] if len(values) == 1 else values[index]

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Take the gradient of a loss, and update the weights.

        Args:
            loss: a 0-dim tensor, computed with the latest weights (or with `params`).
            params: weights in the order of `reference_params`; without them the patched module's latest.
            override: as in the constructor; it also holds for later steps.
            grad_callback: in place of the constructor's, for this step.
            **kwargs: ignored.

        Returns:
            All new weights, in the order of `reference_params`; those that the optimizer does not hold, or that have
            no gradient, are the same tensors. A patched module has them as its latest.

        Raises:
            ValueError: there are no weights.
            DerivativeError: inside a transform of torch.func, where the gradient of a computed loss cannot be taken.
        """
        if transforming():
            raise DerivativeError(
                "a step takes the gradient of a loss that has been computed, which torch cannot do inside torch.func "
                "or vmap; write the loss as a function, and use `statelessify.adapt` or `adapt_tasks`"
            )
        fast = weights_of(self._fmodel) if isinstance(self._fmodel, MonkeyPatchBase) else None
        latest = getattr(self._fmodel, "fast_params", None) if fast is None else fast.history and fast.history[-1]
        if params is None and latest is None:
            raise FastWeightsError(
                "there are no weights to update: pass `params=`, or give the optimizer a patched module that has some"
            )
        current: list[Tensor] = list(cast("Any", latest if params is None else params))
        gradients: Any = self._gradients(loss, current, fast)
        callback = self._grad_callback if grad_callback is None else grad_callback
        if callback is not None:
            gradients = callback(gradients)
        groups, states = [group.copy() for group in self.param_groups], self._copied_state()
        try:
            if override is not None:
                self._apply_override(override)
            for group, places in zip(self.param_groups, self._group_to_param_list, strict=True):
                group["params"] = [current[place] for place in places]
            self._update([[gradients[place] for place in places] for places in self._group_to_param_list])
            new = self._collect(current)
        except BaseException:
            self.param_groups[:], self.state[:] = groups, states
            raise
        if fast is not None:
            fast.push(new) if self._keeps_shapes else fast.store(new)
        elif self._fmodel is not None:
            cast("Any", self._fmodel).update_params(new)
        return new

    def _recording(self) -> bool:
        """Whether the step is part of the graph."""
        return self._track_higher_grads and torch.is_grad_enabled()

    def _copied_state(self) -> list[Any]:
        """The state, to go back to should the update fail."""
        copies = [state.copy() for state in self.state]
        for state in copies:
            for index, own in state.items():
                state[index] = own.copy()
        return copies

    def _gradients(self, loss: Tensor, params: list[Tensor], fast: FastWeights | None) -> tuple[Tensor | None, ...]:
        reached = [p for p in params if p.requires_grad]
        if not reached:
            return (None,) * len(params)
        if fast is not None and fast.history and all(map(operator.is_, params, fast.history[-1])):
            fast.stepping = True  # what activation checkpointing reads now are the weights of this loss
        try:
            found = gradients_of(loss, reached, self._recording())
        finally:
            if fast is not None:
                fast.stepping = False
        gradients = found
        if len(reached) < len(params):
            remaining = iter(found)
            gradients = tuple(next(remaining) if p.requires_grad else None for p in params)
        if found[0] is None and all(gradient is None for gradient in found):
            warnings.warn(
                "the loss does not reach the weights that the step is for, which stay as they are: compute it with the "
                "patched module (`fmodel(x)`, not `model(x)`) and after the last change of its weights",
                stacklevel=3,
            )
        return gradients

    def _collect(self, current: list[Tensor]) -> list[Tensor]:
        """All weights after an update."""
        new = list(current)
        recording = self._recording()
        for group, places in zip(self.param_groups, self._group_to_param_list, strict=True):
            for index, place in enumerate(places):
                p, before = group["params"][index], current[place]
                if not recording:
                    if not before.requires_grad:
                        differs("frozen")
                    p = p.detach().requires_grad_(before.requires_grad)
                new[place] = p
            group["params"] = [new[place] for place in places]
        if not recording:
            for state in self.state:
                for index, own in state.items():
                    state[index] = _recursive_map(own, _detached)
        return new

    @abc.abstractmethod
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        """Put a new tensor in place of each weight that moves.

        Args:
            grouped_grads: for each group, the gradient of each of ``group["params"]``, or None.
            **kwargs: nothing.
        """


def check_lengths(override: Override, groups: int) -> None:
    """Refuse an override that has neither one value nor one for each group."""
    for name, values in override.items():
        if len(values) not in (1, groups):
            raise HyperparameterError(
                f"`override[{name!r}]` has {len(values)} values, but the optimizer has {groups} groups: give a list of "
                "one value for all, or of one for each"
            )


def _own(value: Any) -> Any:
    """A tensor that does not change when the optimizer's does, on its graph."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return (
        value.clone() if isinstance(value, Tensor) else _recursive_map(value, _own) if _is_container(value) else value
    )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
