"""Modules whose code is known well enough that little of what a call does has to be looked at."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn
from torch.nn.modules import module as hooks

from ._reads import is_inert, is_torchs, mentioned, only_reads
from ._structure import named_parts
from .rules._registry import FUNCTIONS, rule_of_class

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


def may_meet_rules(module: nn.Module) -> bool:
    """Whether a call may reach a function with a rule that holds always, be it in a branch not taken so far.

    The functions of our own rules are reached by their names. The user's rules may be for any function, which torch's
    code may call too.
    """
    functions = FUNCTIONS["always"]
    names = mentioned(module)
    if names is None or any(call.__module__.partition(".")[0] != _OURS for call in functions.values()):
        return True
    for _, part in named_parts(module):
        rule = rule_of_class(type(part))
        code = getattr(type(part).forward, "__code__", None)
        if code is not None and (rule is None or rule.when != "always"):
            names.update(code.co_names)
    called = {function.__name__ for function in functions}
    return not names.isdisjoint(called | {name.strip("_") for name in called})


GLOBAL_HOOKS: Any = (
    cast("Any", hooks._global_forward_hooks),
    cast("Any", hooks._global_forward_pre_hooks),
    cast("Any", hooks._global_backward_hooks),
    cast("Any", hooks._global_backward_pre_hooks),
)
"""Code that runs around the forward of each module that there is."""
