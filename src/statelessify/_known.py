"""Modules whose code is known well enough that little of what a call does has to be looked at."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks

from ._reads import is_inert, is_torchs, mentioned, only_reads
from ._structure import named_parts
from .rules._registry import FUNCTIONS, When, rule_of_class

__all__: list[str] = []

Conduct = Literal["writes buffers", "only reads", "unknown"]


def conduct_of(module: nn.Module) -> Conduct:
    """What the forward of a module is known to do to the module.

    "writes buffers": no code runs but torch's own. It writes into registered buffers, in place, and that is all: it
    keeps no state in Python, binds no attribute anew, asks no tensor whether it is a parameter, and nothing of the
    module outlives the call. "only reads": neither does the user's code, as far as can be seen, but it may write into
    any tensor, and hand out a part.
    """
    if not all(_is_simple(part) for _, part in named_parts(module)):
        return "unknown"
    if all(is_torchs(type(part)) for _, part in named_parts(module)):
        return "writes buffers"
    return "only reads" if only_reads(module) else "unknown"


_WRITING = (nn.RNNBase, nn.SyncBatchNorm)  # an RNN puts its weights into a list
_NEW = nn.Module().__dict__
_HOOKS = frozenset(name for name in _NEW if name.endswith("_hooks") and "state_dict" not in name)
_DICTS = frozenset(name for name, value in _NEW.items() if isinstance(value, (dict, set)))
_OURS = __name__.partition(".")[0]


def _is_simple(part: nn.Module) -> bool:
    """Whether a part has no hooks, nothing but fixed values as attributes, and no forward that writes into weights."""
    rule = rule_of_class(type(part))
    if isinstance(part, _WRITING) or (rule is not None and rule.call.__module__.partition(".")[0] != _OURS):
        return False
    own = part.__dict__
    if own.get("max_norm") is not None or any(own.get(name) for name in _HOOKS):  # max_norm: rescales its weight
        return False
    ours = {*_DICTS, "register_parameter", *(("forward",) if rule else ())}
    return all(is_inert(value) for name, value in own.items() if name not in ours)


def may_meet_rules(module: nn.Module, when: When = "always") -> bool:
    """Whether a call may reach a function with a rule that holds then, be it in a branch not taken so far.

    The functions of our own rules are reached by their names. The user's rules may be for any function, which torch's
    code may call too.
    """
    functions = FUNCTIONS[when]
    names = mentioned(module)
    if names is None or any(call.__module__.partition(".")[0] != _OURS for call in functions.values()):
        return True
    for kind in {type(part) for _, part in named_parts(module)}:
        rule = rule_of_class(kind)
        if rule is None or rule.when != "always":
            names |= _in_methods(kind)
        elif when != "always":
            return True  # by the rule's own code
    called = {function.__name__ for function in functions}
    return not _with_torchs(names).isdisjoint(called | {name.strip("_") for name in called})


def _in_methods(kind: type[nn.Module]) -> set[str]:
    """The names that the methods of torch's modules mention, as far as a class is one of them."""
    owners = [owner for owner in kind.__mro__ if is_torchs(owner) and owner is not nn.Module]
    codes = [getattr(method, "__code__", None) for owner in owners for method in vars(owner).values()]
    return {name for code in codes if code is not None for name in code.co_names}


def _with_torchs(names: set[str]) -> set[str]:
    """These names, and those that torch's functions of such a name mention in turn."""
    found, todo = set(names), [*names]
    while todo:
        name = todo.pop()
        for code in (getattr(vars(place).get(name), "__code__", None) for place in (F, torch)):
            if code is not None:
                todo += {*code.co_names} - found
                found.update(code.co_names)
    return found


GLOBAL_HOOKS: Any = (
    cast("Any", hooks._global_forward_hooks),
    cast("Any", hooks._global_forward_pre_hooks),
    cast("Any", hooks._global_backward_hooks),
    cast("Any", hooks._global_backward_pre_hooks),
)
"""Code that runs around the forward of each module that there is."""
