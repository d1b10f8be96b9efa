"""Parts of a module that outlive the call: a bound module, and a skeleton that something still holds.

Activation checkpointing, hooks on tensors, returned closures and generators keep a part of the module and run it
after its call has ended. Its tensors then stay where they were, so that it computes what the call computed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, cast

from torch import Tensor, nn

from ._graph import nodes
from ._skeleton import Skeleton, Slot
from ._structure import named_parts
from .errors import CheckpointError
from .rules._registry import When, rules, rules_of_call

__all__: list[str] = []


def fill(module: nn.Module, places: Mapping[str, tuple[Slot, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the slots of a private copy, for good."""
    owners = dict(named_parts(module))
    for name, tensor in tensors.items():
        for place in places[name]:
            path, _, attribute = place.path.rpartition(".")
            owner = owners[path]
            entries: dict[str, Any] = owner._buffers if place.registered_buffer else owner._parameters
            entries[attribute] = tensor


def keep(
    skeleton: Skeleton,
    places: Mapping[str, tuple[Slot, ...]],
    installed: Mapping[str, Tensor],
    written: Iterable[str],
    when: When | None,
) -> None:
    """Leave the tensors of a call in the skeleton that it ran on.

    A buffer that the call has written stays vacant: what it held when a part ran is not known any more, and to read it
    is a named error. Only the statistics of torch's own norms may hold anything, as they are not read in training.
    """
    written = set(written)
    fill(skeleton.inner, places, {name: tensor for name, tensor in installed.items() if name not in written})
    for prefix, part in named_parts(skeleton.inner):
        if _only_writes_statistics(part):
            names = [f"{prefix}.{name}" if prefix else name for name in part._buffers]
            fill(skeleton.inner, places, {name: installed[name].clone() for name in names if name in installed})
        if when is not None:
            guard_methods(part, when)


def _only_writes_statistics(part: nn.Module) -> bool:
    norm = isinstance(part, nn.modules.batchnorm._NormBase) and type(part).__module__.startswith("torch.nn.")
    return norm and part.training


def guard_methods(module: nn.Module, when: When | None = None) -> None:
    """Run the methods of a module's classes under the rules of an occasion; None: that of the moment."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for name, function in vars(cls).items():
            if isinstance(function, types.FunctionType) and not name.startswith("__") and name not in module.__dict__:
                module.__dict__[name] = types.MethodType(_guarded(function, when), module)
    hooks_too = _guarded(cast("Any", nn.Module)._call_impl, when)
    module.__dict__["_call_impl"] = types.MethodType(hooks_too, module)


def _guarded(function: Callable[..., Any], when: When | None) -> Callable[..., Any]:
    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        with rules_of_call() if when is None else rules(when):
            return function(*args, **kwargs)

    return method


# Activation checkpointing ------------------------------------------------------------------------------------------


def refuse_reentrant(results: Iterable[Tensor], inputs: Iterable[Tensor], name: str) -> None:
    """Refuse reentrant checkpointing, through which torch loses gradients without an error.

    Its node in the graph does not know the parameters: only ``.backward()`` reaches them, only if they are leaves, and
    never a second time.
    """
    for node in nodes(results, inputs):
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise CheckpointError(
                f"`{name}` uses reentrant activation checkpointing, through which `torch.autograd.grad` and second "
                "derivatives lose the parameters; write `checkpoint(..., use_reentrant=False)` in the module"
            )


def is_checkpointing(error: BaseException) -> bool:
    """Whether an error has come from within torch's activation checkpointing."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        trace = trace.tb_next
    return False
