"""Modules that run no code but torch's own, of which is known what it does to a module: nothing."""

from __future__ import annotations

import sys
import types
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as hooks

from ._structure import ATOMIC, named_parts
from .rules._registry import rule_of_class

__all__: list[str] = []


def is_known(module: nn.Module) -> bool:
    """Whether every part is an instance of a class of `torch.nn`, without hooks, that only reads its attributes.

    Such a forward neither writes into a parameter nor binds one anew, keeps no state in Python, asks no tensor whether
    it is a parameter, and nothing of the module outlives the call.
    """
    return all(_is_known(part) for _, part in named_parts(module))


_WRITING = (nn.RNNBase, nn.SyncBatchNorm)  # an RNN puts its weights into a list
_HOOKS = frozenset(name for name in nn.Module().__dict__ if name.endswith("_hooks") and "state_dict" not in name)
_OURS = __name__.partition(".")[0]


def _is_known(part: nn.Module) -> bool:
    kind = type(part)
    place = sys.modules.get(kind.__module__)
    torchs = kind.__module__.startswith("torch.nn.modules.") and getattr(place, kind.__name__, None) is kind
    if not torchs or isinstance(part, _WRITING):
        return False
    if getattr(part, "max_norm", None) is not None:  # an embedding that rescales its weight
        return False
    rule = rule_of_class(kind)
    if rule is not None and rule.call.__module__.partition(".")[0] != _OURS:
        return False
    own = part.__dict__
    if any(own.get(name) for name in _HOOKS):
        return False
    return all(
        _is_inert(value)
        for name, value in own.items()
        if name not in _DICTS and name not in ("register_parameter", *(("forward",) if rule else ()))
    )


_DICTS = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


def _is_inert(value: Any) -> bool:
    """Whether a value is fixed, or a function of torch's."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_inert, cast("Any", value)))
    if isinstance(value, types.FunctionType):
        return value.__module__.partition(".")[0] == torch.__name__
    return isinstance(value, ATOMIC)


def global_hooks() -> bool:
    """Whether code runs around the forward of each module that there is."""
    return any(_GLOBAL_HOOKS)


_GLOBAL_HOOKS: Any = (
    cast("Any", hooks._global_forward_hooks),
    cast("Any", hooks._global_forward_pre_hooks),
    cast("Any", hooks._global_backward_hooks),
    cast("Any", hooks._global_backward_pre_hooks),
)
