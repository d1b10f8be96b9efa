"""The weights of one patched module: all that it has had, and the slots in which the latest of them stand."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from ...errors import CheckpointError, DtypeError, FastWeightsError, FastWeightsIndexError, ShapeError
from ...rules._registry import Watched
from ._differences import differs

__all__: list[str] = []


Place = tuple[dict[str, Any], str, int]
"""The ``_parameters`` of some part, a name in them, and the index of the weight that stands there."""


class FastWeights:
    """What all parts of a patched module share; it holds their dicts and not the parts, so that no cycle arises.

    Attributes:
        names: the first name of each weight, in the order of ``module.parameters()``.
        shapes: their shapes.
        places: every slot that a weight stands in; tied weights have several.
        history: the weights over time, the latest last; None before there are any.
        tracking: whether the history grows; otherwise it is the latest weights alone.
        calling: whether a call of the root is in progress.
        stepping: whether an optimizer is taking a gradient.
        moves: how often the weights have changed since the first.
        root: the root module.
        watched: the rules that its calls need, as far as that is known.
    """

    def __init__(self, names: list[str], shapes: list[torch.Size], root: nn.Module, watched: Watched) -> None:
        self.names, self.shapes = names, shapes
        self.places: list[Place] = []
        self.history: list[list[Tensor]] | None = None
        self.tracking, self.calling, self.stepping, self.moves = True, False, False, 0
        self.root: weakref.ref[nn.Module] | None = weakref.ref(root)
        self.watched = watched
        self._installed: list[Tensor] = []

    def include(self, part: nn.Module, indices: dict[str, int]) -> None:
        """Make a copy a part of the patched module; `indices` are those of its own weights, by attribute."""
        own: dict[str, Any] = part.__dict__
        own.pop("_compiled_call_impl", None)  # it would run with the weights of the module that was compiled
        own["_statelessify_weights"], own["_statelessify_own"] = self, indices
        entries = own["_parameters"]
        for name, index in indices.items():
            self.places.append((entries, name, index))

    def latest(self) -> list[Tensor]:
        if not self.history:
            raise FastWeightsError(
                "the patched module has no weights yet: pass them as `params=` in the call, or set `fast_params`; "
                "`monkeypatch` gives it copies of the module's, `make_functional` none"
            )
        return self.history[-1]

    def at(self, time: int) -> list[Tensor]:
        """The weights of one time: 0 the first, -1 the latest."""
        self.latest()
        assert self.history is not None
        if not self.tracking and time not in (-1, 0):
            raise FastWeightsError(
                f"`time={time}` was asked for, but with `track_higher_grads=False` only the latest weights are kept"
            )
        if not -len(self.history) <= time < len(self.history):
            raise FastWeightsIndexError(f"`time={time}` was asked for, but the weights have {len(self.history)} times")
        return self.history[time]

    def store(self, params: Iterable[Tensor]) -> None:
        """Make these the latest weights, and put them into their slots."""
        new = self.checked(params)
        if any(map(is_functorch_wrapped_tensor, new)):
            raise FastWeightsError(
                "weights of a torch.func transform would outlive it in the history of the patched module; pass them "
                "to the call (`fmodel(x, params=...)`), which leaves nothing behind"
            )
        self.push(new)

    def push(self, new: list[Tensor]) -> None:
        """`store` weights that are known to fit."""
        self.moves += self.history is not None
        if self.tracking and self.history is not None:
            self.history.append(new)
        elif self.history is not None:
            self.history[:] = [new]
        else:
            self.history = [new]
        self.install(new)

    def refresh(self) -> None:
        """Put the latest weights into their slots, whose list may have been written into."""
        latest = self.latest()
        if not all(map(operator.is_, latest, self._installed)):
            latest = self.checked(latest)
            self.moves += 1
        self.install(latest)

    def install(self, params: Sequence[Tensor]) -> None:
        self._installed = list(params)
        for entries, name, index in self.places:
            entries[name] = params[index]

    def replace(self, index: int, value: Any) -> None:
        """Make one tensor the latest weight of its name, and of those that are tied to it."""
        if not isinstance(value, Tensor):
            raise DtypeError(f"`{self.names[index]}` is a weight: assign a tensor to it, not {type(value).__name__}")
        new = list(self.latest())
        new[index] = value
        self.store(new)

    def track(self, tracking: Any) -> None:
        if not isinstance(tracking, bool):
            raise FastWeightsError(f"`track_higher_grads` is True or False, not {tracking!r}")
        if not tracking and self.history is not None and len(self.history) > 1:
            differs("untracked")
            self.history[:] = self.history[-1:]
        self.tracking = tracking

    def checked(self, params: Iterable[Any]) -> list[Tensor]:
        """As many tensors as there are weights, of their shapes."""
        if isinstance(params, Tensor):
            raise DtypeError("`params` is one tensor; pass a list of them, in the order of `module.parameters()`")
        new = list(params)
        if len(new) != len(self.names):
            raise FastWeightsIndexError(
                f"`params` has {len(new)} tensors, but the module has {len(self.names)} weights: pass all of them, in "
                "the order of `module.parameters()`"
            )
        for name, shape, tensor in zip(self.names, self.shapes, new, strict=True):
            if not isinstance(tensor, Tensor):
                raise DtypeError(f"in `params`, what stands for `{name}` is {type(tensor).__name__}, not a tensor")
            if tensor.shape != shape:
                raise ShapeError(
                    f"in `params`, what stands for `{name}` has shape {tuple(tensor.shape)}, but the weight has "
                    f"{tuple(shape)}; the order is that of `module.parameters()`"
                )
        return new

    def refuse_late(self, name: str) -> None:
        """Refuse a weight that is read while a gradient is taken, if it may have been another one in forward.

        Activation checkpointing runs forward again then. Only the step of an optimizer is known to take the gradient of
        a loss of the latest weights.
        """
        if self.moves and not self.stepping:
            raise CheckpointError(
                f"`{name}` is read in backward, by activation checkpointing or a hook, after the weights of the "
                "patched module have changed: it would see other weights than forward did; switch checkpointing off "
                "in the module (`statelessify.adapt` can recompute whole steps instead)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "root": None, "watched": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, watched=Watched())
