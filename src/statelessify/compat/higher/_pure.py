"""Calls of a patched module inside a transform: on a copy, so that nothing of the transform outlives it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..._apply import Apply
from ..._skeleton import find_slots
from ..._structure import copy_structure, named_parts, reachable
from ..._vacant import vacancies, views_of

__all__: list[str] = []


def call_purely(part: nn.Module, params: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a part computes with these weights of its root; weights, buffers and attributes stay as they are."""
    slots = find_slots(part)
    tensors = slots.tensors
    template = copy_structure(part, vacancies(tensors) | views_of(tensors, reachable(part)))
    given: dict[str, Tensor] = dict(tensors)
    for (prefix, own), (_, plain) in zip(named_parts(part), named_parts(template), strict=True):
        for name, index in own.__dict__.get("_statelessify_own", {}).items():
            path = f"{prefix}.{name}" if prefix else name
            if path in given:
                given[path] = params[index]
        if "_statelessify_own" in plain.__dict__:
            del plain.__dict__["_statelessify_own"], plain.__dict__["_statelessify_weights"]
            if isinstance(plain, nn.RNNBase):
                weights = [plain._parameters.get(name) for name in cast("Any", plain)._flat_weights_names]
                plain.__dict__["_flat_weights"] = weights
                plain.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]
            object.__setattr__(plain, "__class__", cast("Any", plain)._statelessify.kind)
    out, _ = Apply(template, slots)({}, given, *args, **kwargs)
    return out
