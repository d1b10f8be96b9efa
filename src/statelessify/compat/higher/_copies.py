"""Patched copies of modules: the module's own attributes, with slots of their own for weights and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Set
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..._skeleton import MODULE_ATTRIBUTES, check_is_module, check_supported
from ..._structure import ATOMIC, copy_structure, leads_back, named_parts, reachable, slot_values, target_of, walk
from ..._tree import copied
from ..._vacant import storage_of, vacancies, views_of
from ...errors import FastWeightsError, ModuleError
from ...rules._registry import Watched
from ._classes import MonkeyPatchBase, as_patched
from ._differences import differs
from ._weights import FastWeights

__all__: list[str] = []

_RNN_LISTS = ("_flat_weights", "_flat_weight_refs")  # which the classes of patched RNNs make of their weights
_PLAIN = frozenset(ATOMIC)
_LATE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.ParameterList, nn.ParameterDict)


def patched_copy(
    module: nn.Module, policy: str | None, device: torch.device | str | None = None
) -> tuple[Any, list[Tensor]]:
    """A patched module, and the module's own weights in the order of the patched one's.

    Whatever leads to a part, weight or buffer of the module leads to the copy's instead; everything else (data,
    configuration, a recorder) is shared with the module, as it is in higher.

    `policy` makes the initial weights of the module's own; None: there are none yet.
    """
    check_is_module(module)
    if isinstance(module, MonkeyPatchBase):
        raise FastWeightsError(
            f"`module` is patched already ({type(module).__name__}); patch the module that it was made of"
        )
    named = list(named_parts(module))
    check_supported(named)
    _note_differences(named)
    parts = [part for _, part in named]
    weights: dict[str, Tensor] = {}
    index: dict[int, int] = {}
    buffers: dict[int, Tensor] = {}
    for prefix, part in named:
        for name, weight in part._parameters.items():
            if weight is not None and id(weight) not in index:
                index[id(weight)] = len(index)
                weights[f"{prefix}.{name}" if prefix else name] = weight
        for buffer in part._buffers.values():
            if isinstance(buffer, Tensor) and id(buffer) not in buffers:
                buffers[id(buffer)] = own_buffer(buffer, device)
    own = list(weights.values())
    target = None if device is None else torch.empty(0, device=device).device
    initial = [] if policy is None else [copied(weight, policy, target) for weight in own]
    inside = _Inside(parts, index.keys() | buffers.keys(), own)
    simple = {**dict(zip(index, initial, strict=False)), **buffers} if policy else {**vacancies(weights), **buffers}
    copies = _simple_copies(parts, simple, inside)
    if copies is None:
        copies = _any_copies(module, parts, {**vacancies(weights), **buffers}, inside, weights)
    copy = copies[0]
    fast = FastWeights(list(weights), [weight.shape for weight in own], copy, _watched(module))
    for part, patched in zip(parts, copies, strict=True):
        indices = {name: index[id(weight)] for name, weight in part._parameters.items() if weight is not None}
        fast.add_places(patched, indices)
        as_patched(patched, patched is copy, fast, indices)
    if policy is not None:
        fast.begin(initial)
    return copy, own


def own_buffer(buffer: Tensor, device: Any = None) -> Tensor:
    """A copy of a buffer for a patched module."""
    own = buffer.detach().clone()
    return own if device is None else own.to(device)


_WATCHED: weakref.WeakKeyDictionary[nn.Module, Watched] = weakref.WeakKeyDictionary()


def _watched(module: nn.Module) -> Watched:
    """What calls of its patched copies have shown: each inner loop makes a copy, and its first call would be slow."""
    try:
        return _WATCHED.setdefault(module, Watched())
    except TypeError:  # a class with `__eq__` and without `__hash__`
        return Watched()


def _note_differences(parts: list[tuple[str, nn.Module]]) -> None:
    for _, part in parts:
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            differs("hooks")
        if isinstance(part, _LATE):
            differs("late", kind=type(part).__name__)


def _any_copies(
    module: nn.Module, parts: list[nn.Module], replaced: dict[int, Any], inside: _Inside, weights: dict[str, Tensor]
) -> list[nn.Module]:
    """A copy of each part, where attributes lead back to the module."""
    shared = {id(value): value for part in parts for value in _held(part) if not inside.leads(value)}
    copy = copy_structure(module, {**shared, **replaced, **views_of(weights, reachable(module))})
    back = leads_back(copy, module, state=False)
    if back is not None:
        raise ModuleError(
            f"`{back}` of `{type(module).__name__}` cannot be copied, and leads to the module's own parts; hold the "
            "part itself, or in a list or a dict with names as keys"
        )
    return [part for _, part in named_parts(copy)]


class _Inside:
    """What belongs to a module, to tell which attributes lead to it."""

    def __init__(self, parts: list[nn.Module], tensors: Set[int], weights: list[Tensor]) -> None:
        self._own = {*map(id, parts), *tensors}
        self._weights = weights
        self._storages: set[int | None] | None = None

    def leads(self, value: Any) -> bool:
        """Whether a value holds a part, a weight, a view of one, or a buffer."""
        if isinstance(value, ATOMIC):
            return False
        if type(value) in (list, tuple, set, frozenset) and _PLAIN.issuperset(map(type, value)):
            return False
        return any(self._is_own(item) for item in walk(value, lambda item: True))

    def _is_own(self, item: Any) -> bool:
        if isinstance(item, weakref.ref):
            item = target_of(cast("weakref.ref[Any]", item))[0]
        return id(item) in self._own or (isinstance(item, Tensor) and self._is_view(item))

    def _is_view(self, tensor: Tensor) -> bool:
        if self._storages is None:
            self._storages = {storage_of(weight) for weight in self._weights} - {None}
        return storage_of(tensor) in self._storages


def _held(part: nn.Module) -> Iterator[Any]:
    """What a part holds beside its tensors and parts: its attributes, its hooks."""
    for name, value in part.__dict__.items():
        if name in MODULE_ATTRIBUTES:
            yield from cast("Any", value).values() if isinstance(value, dict) else ()
        else:
            yield value
    yield from (value for _, value in slot_values(part))


def _simple_copies(parts: list[nn.Module], replaced: dict[int, Any], inside: _Inside) -> list[nn.Module] | None:
    """The copies, where no attribute leads back to the module: an inner loop makes them each time, so it has to be fast."""
    shells: dict[int, nn.Module] = {id(part): object.__new__(type(part)) for part in parts}
    for part in parts:
        if _has_slots(type(part)):
            return None
        own: dict[str, Any] = shells[id(part)].__dict__
        own.update(part.__dict__)
        for name, value in part.__dict__.items():
            kind = type(value)
            if kind in _PLAIN:
                continue
            if name == "_parameters" or name == "_buffers":
                own[name] = {key: replaced.get(id(item), item) for key, item in value.items()}
            elif name == "_modules":
                own[name] = {key: item if item is None else shells[id(item)] for key, item in value.items()}
            elif name in MODULE_ATTRIBUTES:
                if value and inside.leads(value):
                    return None
                own[name] = value.copy() if value else kind()
            elif name in _RNN_LISTS and isinstance(part, nn.RNNBase):
                del own[name]
            elif inside.leads(value):
                return None
            elif kind is Tensor and not value.requires_grad:
                own[name] = value.detach().clone()
    return list(shells.values())


@lru_cache(maxsize=1024)
def _has_slots(kind: type) -> bool:
    return any(cls.__dict__.get("__slots__") for cls in kind.__mro__)
