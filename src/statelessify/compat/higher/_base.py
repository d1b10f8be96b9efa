"""What all patched modules share: a base class, with higher's properties."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from ...errors import FastWeightsError
from ._weights import FastWeights

__all__: list[str] = []


class Member(property):
    """A property of patched modules that gives way to what the module itself has under that name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, part: Any, owner: type | None = None) -> Any:
        for entries in () if part is None else _own_entries(part):
            if self.name in entries:
                return entries[self.name]
        return super().__get__(part, owner)

    def __set__(self, part: Any, value: Any) -> None:
        if self.fset is None or any(self.name in entries for entries in _own_entries(part)):
            part.__dict__[self.name] = value
        else:
            super().__set__(part, value)


def _own_entries(part: nn.Module) -> list[dict[str, Any]]:
    own: dict[str, Any] = part.__dict__
    return [own, *(own[kind] for kind in ("_parameters", "_buffers", "_modules") if kind in own)]


def weights_of(part: nn.Module) -> FastWeights:
    """The weights that a patched module shares with all of its parts."""
    return part.__dict__["_statelessify_weights"]


def _of_root(part: nn.Module, name: str) -> FastWeights:
    if not cast("Any", type(part))._statelessify.as_root:
        raise AttributeError(f"`{name}` is the root's: this is a part of a patched module")
    return weights_of(part)


class MonkeyPatchBase(nn.Module):
    """What every patched module, and every part of one, is an instance of, beside its own class."""

    @Member
    def fast_params(self) -> list[Tensor] | None:
        """The latest weights in the order of ``module.parameters()``, the list itself; None before there are any."""
        fast = weights_of(self)
        return fast.history[-1] if fast.history else None

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        weights_of(self).store(value)

    @Member
    def init_fast_params(self) -> list[Tensor]:
        """The first weights."""
        fast = weights_of(self)
        if not fast.tracking:
            raise FastWeightsError("with `track_higher_grads=False` the initial weights are not kept")
        return fast.at(0)

    @Member
    def track_higher_grads(self) -> bool:
        """Whether the history of the weights is kept; switching it off keeps the latest ones."""
        return weights_of(self).tracking

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        weights_of(self).track(value)

    @Member
    def _fast_params(self) -> list[list[Tensor]] | None:
        """All weights over time, the list itself, which programs shorten."""
        return weights_of(self).history

    @_fast_params.setter
    def _fast_params(self, value: list[list[Tensor]] | None) -> None:
        weights_of(self).history = value

    @_fast_params.deleter
    def _fast_params(self) -> None:
        weights_of(self).history = None

    @Member
    def update_params(self) -> Callable[[Iterable[Tensor]], None]:
        """``update_params(params)`` makes these the latest weights; it is the root's."""
        return _of_root(self, "update_params").store

    @Member
    def boxed_forward(self) -> Callable[..., Any]:
        """The forward of the module's own class, with the weights that are in place."""
        _of_root(self, "boxed_forward")
        return partial(cast("Any", type(self))._statelessify.kind.forward, self)

    @Member
    def is_root(self) -> bool:
        """Whether this is the patched module itself, not a part of it."""
        return cast("Any", type(self))._statelessify.as_root

    @Member
    def root(self) -> nn.Module | None:
        """The patched module that this is a part of."""
        found = weights_of(self).root
        return None if found is None else found()

    @Member
    def direct_submodule_call(self) -> bool:
        """Whether no call of the root is in progress."""
        return not weights_of(self).calling
