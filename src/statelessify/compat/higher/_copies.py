"""Patched copies of modules: the module's own attributes, with slots of their own for weights and buffers."""

from __future__ import annotations

import operator
import types
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
from ...optim._work import is_uniform
from ...rules._registry import RULES, Watched
from ._base import MonkeyPatchBase
from ._classes import class_of
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
    layout = layout_of(module)
    own = layout.weights()
    target = None if device is None else torch.empty(0, device=device).device
    initial: list[Tensor] = []
    if policy == "clone" and target is None and own and is_uniform(own):
        initial = list(cast("Any", torch)._foreach_clone(own))  # one node of the graph for all
    elif policy is not None:
        initial = [copied(weight, policy, target) for weight in own]
    buffers = layout.own_buffers(device)
    copies = layout.copies(module, initial, buffers)
    copy = copies[0]
    fast = FastWeights(layout.names, [weight.shape for weight in own], copy, layout.watched)
    for patched, indices in zip(copies, layout.indices, strict=True):
        fast.include(patched, indices)
    if policy is not None:
        fast.push(initial)
    return copy, own


def own_buffer(buffer: Tensor, device: Any = None) -> Tensor:
    """A copy of a buffer for a patched module."""
    own = buffer.detach().clone()
    return own if device is None else own.to(device)


# Layouts -----------------------------------------------------------------------------------------------------------


class Layout:
    """Where a module's weights and buffers stand, and how it is copied.

    It holds none of the module's parts and tensors, so that it may be kept as long as the module lives.

    Attributes:
        names: the first name of each weight, in the order of ``module.parameters()``.
        indices: for each part, the index of each of its own weights.
        watched: what calls of patched copies have shown; an inner loop makes a new one, whose first call would be slow.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(named_parts(module))
        check_supported(named, "call the module once first")
        for path, part in named:
            if isinstance(part, MonkeyPatchBase):
                where = f"submodule `{path}`" if path else "`module`"
                raise FastWeightsError(
                    f"{where} is patched already ({type(part).__name__}); patch the module that it was made of"
                )
        _note_differences(named)
        self.watched = Watched()
        self.names: list[str] = []
        self.indices: list[dict[str, int]] = []
        weights: dict[int, Tensor] = {}
        buffers: dict[int, Tensor] = {}
        index: dict[int, int] = {}
        for prefix, part in named:
            own = {name: weight for name, weight in part._parameters.items() if weight is not None}
            for name, weight in own.items():
                if id(weight) not in index:
                    index[id(weight)], weights[id(weight)] = len(index), weight
                    self.names.append(f"{prefix}.{name}" if prefix else name)
            self.indices.append({name: index[id(weight)] for name, weight in own.items()})
            buffers.update({id(b): b for b in part._buffers.values() if isinstance(b, Tensor)})
        parts = [part for _, part in named]
        self._weights = [weakref.ref(weight) for weight in weights.values()]
        self._buffers = [weakref.ref(buffer) for buffer in buffers.values()]
        places: dict[int, list[int]] = {}
        for number, buffer in enumerate(buffers.values()):
            if (place := storage_of(buffer)) is not None:
                places.setdefault(place, []).append(number)
        self._shared = [numbers for numbers in places.values() if len(numbers) > 1]
        self._below = [weakref.ref(part) for part in parts[1:]]
        self._classes = [class_of(type(part), part is module) for part in parts]
        self._known_rules = len(RULES)
        inside = _Inside(parts, weights.keys() | buffers.keys(), list(weights.values()))
        self._simple = all(_is_simple(part, inside) for part in parts)
        self._lasting = self._simple and all(map(_is_lasting, parts))
        self._held = [Snapshot(part) for part in parts] if self._lasting else []

    def weights(self) -> list[Tensor]:
        return cast("list[Tensor]", [weight() for weight in self._weights])

    def own_buffers(self, device: torch.device | str | None) -> dict[int, Tensor]:
        """A copy of each buffer by the number of the original; buffers that share values go on to share them."""
        found = cast("list[Tensor]", [buffer() for buffer in self._buffers])
        own = {id(buffer): own_buffer(buffer, device) for buffer in found}
        for shared in self._shared:
            storage = found[shared[0]].untyped_storage().clone()
            for buffer in (found[index] for index in shared):
                if own[id(buffer)].device != buffer.device:
                    raise ModuleError("buffers that share their values cannot be moved: move the module first")
                new = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
                own[id(buffer)] = new.set_(storage, buffer.storage_offset(), buffer.size(), buffer.stride())
        return own

    def _parts(self, module: nn.Module) -> list[nn.Module]:
        return [module, *cast("list[nn.Module]", [part() for part in self._below])]

    def still(self, module: nn.Module) -> bool:
        """Whether the module is as it was when this was made."""
        if not self._lasting or self._known_rules != len(RULES):
            return False
        return all(map(Snapshot.still, self._held, self._parts(module)))

    def copies(self, module: nn.Module, initial: list[Tensor], buffers: dict[int, Tensor]) -> list[nn.Module]:
        """A patched copy of each part, the module itself first; weights are vacant where there are no initial ones."""
        own, parts = self.weights(), self._parts(module)
        named = dict(zip(self.names, own, strict=True))
        if self._simple:
            new = dict(zip(map(id, own), initial, strict=True)) if initial else vacancies(named)
            return _simple_copies(parts, self._classes, {**new, **buffers})
        inside = _Inside(parts, {*map(id, own), *buffers}, own)
        shared = {id(value): value for part in parts for value in _attributes(part) if not inside.leads(value)}
        views = views_of(named, reachable(module))
        copy = copy_structure(module, {**shared, **vacancies(named), **buffers, **views})
        back = leads_back(copy, module, set(map(id, parts)))
        if back is not None:
            raise ModuleError(
                f"`{back}` of `{type(module).__name__}` cannot be copied, and leads to the module's own parts; hold "
                "the part itself, or in a list or a dict with names as keys"
            )
        copies = [part for _, part in named_parts(copy)]
        for part, cls in zip(copies, self._classes, strict=True):
            object.__setattr__(part, "__class__", cls)
        return copies


_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout_of(module: nn.Module) -> Layout:
    """The layout of a module, from before if nothing has changed: each inner loop asks for it."""
    check_is_module(module)
    try:
        known = _LAYOUTS.get(module)
    except TypeError:  # a class with `__eq__` and without `__hash__`
        return Layout(module)
    if known is None or not known.still(module):
        known = _LAYOUTS[module] = Layout(module)  # a change of mode may lead calls to other functions
    return known


def _note_differences(parts: list[tuple[str, nn.Module]]) -> None:
    for _, part in parts:
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            differs("hooks")
        if isinstance(part, _LATE):
            differs("late", kind=type(part).__name__)


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


def _attributes(part: nn.Module) -> Iterator[Any]:
    """What a part holds beside its tensors and parts: its attributes, its hooks."""
    for name, value in part.__dict__.items():
        if name in MODULE_ATTRIBUTES:
            yield from cast("Any", value).values() if isinstance(value, dict) else ()
        else:
            yield value
    yield from (value for _, value in slot_values(part))


# Simple parts: copied attribute by attribute -----------------------------------------------------------------------

_TREE = ("_parameters", "_buffers", "_modules")
_OWN_DICTS = [
    name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)) and name not in _TREE
]


def _is_simple(part: nn.Module, inside: _Inside) -> bool:
    """Whether no attribute of a part leads back to the module."""
    rnn = _RNN_LISTS if isinstance(part, nn.RNNBase) else ()
    return not _has_slots(type(part)) and not any(
        inside.leads(value)
        for name, value in part.__dict__.items()
        if type(value) not in _PLAIN and name not in _TREE and name not in rnn
    )


@lru_cache(maxsize=1024)
def _has_slots(kind: type) -> bool:
    return any(cls.__dict__.get("__slots__") for cls in kind.__mro__)


def _simple_copies(
    parts: list[nn.Module], classes: list[type[MonkeyPatchBase]], replaced: dict[int, Any]
) -> list[nn.Module]:
    shells: list[nn.Module] = [object.__new__(cls) for cls in classes]
    of = dict(zip(map(id, parts), shells, strict=True))
    for part, shell in zip(parts, shells, strict=True):
        own: dict[str, Any] = shell.__dict__
        own.update(part.__dict__)
        own.update([(name, own[name].copy() if own[name] else type(own[name])()) for name in _OWN_DICTS])
        for name in ("_parameters", "_buffers"):
            own[name] = {key: replaced.get(id(item), item) for key, item in own[name].items()}
        own["_modules"] = {key: item if item is None else of[id(item)] for key, item in own["_modules"].items()}
        if isinstance(part, nn.RNNBase):
            own.update({name: [] for name in _RNN_LISTS})
        for name in [name for name, value in own.items() if type(value) is Tensor and not value.requires_grad]:
            own[name] = own[name].detach().clone()
    return shells


# Layouts that last: of parts with attributes that are replaced, and never changed ----------------------------------


def _is_lasting(part: nn.Module) -> bool:
    return all(
        not value if name in MODULE_ATTRIBUTES else _never_changes(value)
        for name, value in part.__dict__.items()
        if type(value) not in _PLAIN and name not in _TREE
    )


def _never_changes(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return not (value.__closure__ or value.__dict__ or value.__defaults__ or value.__kwdefaults__)
    return type(value) is tuple and _PLAIN.issuperset(map(type, cast("Any", value)))


class Snapshot:
    """What a part is made of, to compare object by object; parts and tensors are not kept alive."""

    def __init__(self, part: nn.Module) -> None:
        self._plain = _plain_of(part)
        self._tree = [None if item is None else weakref.ref(item) for item in _tree_of(part)]

    def still(self, part: nn.Module | None) -> bool:
        """Whether a part is as it was; None: it is gone."""
        if part is None:
            return False
        plain, tree = _plain_of(part), _tree_of(part)
        pairs = zip(tree, self._tree, strict=False)
        return (
            len(plain) == len(self._plain)
            and all(map(operator.is_, plain, self._plain))
            and len(tree) == len(self._tree)
            and all(item is ref or (ref is not None and item is not None and item is ref()) for item, ref in pairs)
            and not any(part.__dict__[name] for name in _OWN_DICTS)
        )


def _plain_of(part: nn.Module) -> list[Any]:
    """The class of a part, and its names and attributes without tensors and parts."""
    own: dict[str, Any] = part.__dict__
    found = [type(part), *own, *[value for value in own.values() if type(value) is not dict]]
    for name in _TREE:
        found += own[name]
    return found


def _tree_of(part: nn.Module) -> list[Any]:
    return [*part._parameters.values(), *part._buffers.values(), *part._modules.values()]
