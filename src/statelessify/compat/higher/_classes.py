"""The classes of patched modules: subclasses of each module's own class, so that all of its methods work."""

from __future__ import annotations

import copy
import copyreg
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch._C import _current_graph_task_id as running_backward

from ..._structure import copy_structure, named_parts
from ..._transforms import transforming
from ...errors import DtypeError
from ...rules._registry import Rule, Watched, holds, rule_of_class
from ._base import MonkeyPatchBase, weights_of
from ._differences import differs
from ._pure import call_purely
from ._weights import FastWeights

__all__: list[str] = []


class Patch(NamedTuple):
    """What a class of patched modules is made of.

    Attributes:
        kind: the module's own class.
        as_root: whether it is for roots; otherwise for parts.
        call: what a call of the module's own class runs, hooks and all.
        rule: what is computed instead of its forward, on its occasion.
    """

    kind: type[nn.Module]
    as_root: bool
    call: Callable[..., Any]
    rule: Rule | None


def class_of(kind: type[nn.Module], as_root: bool) -> type[MonkeyPatchBase]:
    """The class of patched modules that were of `kind`, with the rule that holds for it now."""
    return patched_class(kind, as_root, rule_of_class(kind))


@lru_cache(maxsize=1024)
def patched_class(kind: type[nn.Module], as_root: bool, rule: Rule | None) -> type[MonkeyPatchBase]:
    """The class of patched modules that were of `kind`."""
    call = cast("Any", nn.Module)._call_impl if kind.__call__ is nn.Module.__call__ else kind.__call__
    members: dict[str, Any] = {**_OF_ALL, **(_OF_ROOTS if as_root else {})}
    members["__call__"] = _call_root if as_root else _call_part
    if not as_root and kind.__call__ is not nn.Module.__call__:
        members["__call__"] = _call_part_of_own_call
    members["_statelessify"] = Patch(kind, as_root, call, rule)
    if as_root or rule is not None:
        members["forward"] = _forward_of_root if as_root else _own_forward
    if kind.__getattr__ is not nn.Module.__getattr__:
        del members["__getattr__"]
    if hasattr(kind, "flatten_parameters"):
        members["flatten_parameters"] = _flatten_nothing
    if issubclass(kind, (nn.ParameterList, nn.ParameterDict)):
        members["__setitem__"] = _setitem
    if issubclass(kind, nn.RNNBase):
        members["_flat_weights"], members["_flat_weight_refs"] = _FLAT_WEIGHTS, _FLAT_WEIGHT_REFS
    name = ("Functional" if as_root else "InnerFunctional") + kind.__name__
    members |= {"__module__": kind.__module__, "__qualname__": name, "__doc__": kind.__doc__}
    bases = (MonkeyPatchBase,) if kind is nn.Module else (kind, MonkeyPatchBase)
    return cast("Any", types.new_class(name, bases, exec_body=lambda namespace: namespace.update(members)))


def _takes_params(kind: type[nn.Module]) -> bool:
    try:
        return "params" in inspect.signature(kind.forward).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


# Calls -------------------------------------------------------------------------------------------------------------


def _call_root(self: Any, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
    return _run(self, self._statelessify.call, params, args, kwargs)


def _forward_of_root(self: Any, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
    """The forward of the module's own class; `params` as in a call."""
    if params is None and self.__dict__["_statelessify_weights"].calling:
        return _own_forward(self, *args, **kwargs)
    return _run(self, _own_forward, params, args, kwargs)


def _run(
    root: Any,
    call: Callable[..., Any],
    params: Iterable[Tensor] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    fast: FastWeights = root.__dict__["_statelessify_weights"]
    if transforming():
        return _run_purely(root, params, args, kwargs)
    if params is not None:
        fast.store(params)
    else:
        fast.refresh()
    outer, fast.calling = fast.calling, True
    try:
        if fast.watched.entered and not fast.watched.met:  # no function with a rule has been met: no mode is needed
            return call(root, *args, **kwargs)
        with fast.watched.where_needed():
            return call(root, *args, **kwargs)
    finally:
        fast.calling = outer


def _call_part(self: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or not self.__dict__["_statelessify_weights"].calling:
        return _call_part_with(self, args, kwargs)
    return self._call_impl(*args)


def _call_part_of_own_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _call_part_with(self, args, kwargs)


def _call_part_with(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    fast, params = weights_of(self), None
    if "params" in kwargs and fast.calling and _takes_params(self._statelessify.kind):
        differs("nested")
    elif "params" in kwargs:
        params = kwargs.pop("params")
    if transforming():
        return _run_purely(self, params, args, kwargs)
    if params is not None:
        fast.store(_all_weights(self, params))
    elif not fast.calling:
        fast.refresh()
    return self._statelessify.call(self, *args, **kwargs)


def _run_purely(part: nn.Module, params: Iterable[Tensor] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if params is not None:
        differs("pure")
    given = weights_of(part).latest() if params is None else _all_weights(part, params)
    return call_purely(part, given, args, kwargs)


def _all_weights(part: nn.Module, params: Iterable[Tensor]) -> list[Tensor]:
    """The weights of the root, where those of one part alone may be given."""
    fast = weights_of(part)
    if isinstance(params, Tensor):
        return fast.checked(params)
    given = list(params)
    inside = [index for _, own in named_parts(part) for index in own.__dict__.get("_statelessify_own", {}).values()]
    indices = list(dict.fromkeys(inside))
    if len(given) != len(indices) or len(given) == len(fast.names):
        return fast.checked(given)
    new = list(fast.latest())
    for index, tensor in zip(indices, given, strict=True):
        new[index] = tensor
    return fast.checked(new)


def _own_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's own class, or that of its rule where it holds."""
    patch: Patch = self._statelessify
    if patch.rule is not None and holds(patch.rule.when):
        return patch.rule.call(self, *args, **kwargs)
    return cast("Any", patch.kind).forward(self, *args, **kwargs)


# Attributes --------------------------------------------------------------------------------------------------------


def _getattr(self: Any, name: str) -> Any:
    own: dict[str, Any] = self.__dict__
    if "_parameters" in own and name in (weights := own["_parameters"]):
        fast: FastWeights = own["_statelessify_weights"]
        if not fast.calling and running_backward() != -1 and name in own["_statelessify_own"]:
            fast.refuse_late(name)
        return weights[name]
    return nn.Module.__getattr__(self, name)


def _setattr(self: Any, name: str, value: Any) -> None:
    own: dict[str, Any] = self.__dict__
    index = own.get("_statelessify_own", {}).get(name)
    if index is not None:
        own["_statelessify_weights"].replace(index, value)
    elif isinstance(value, nn.Parameter) and name in own["_modules"]:
        raise DtypeError(f"`{name}` is a submodule of `{type(self).__name__}`: assign a module or None to it")
    elif isinstance(value, nn.Parameter) and name in own["_buffers"]:
        own["_buffers"][name] = value
    elif isinstance(value, Tensor) and (isinstance(value, nn.Parameter) or name in own["_parameters"]):
        own[name] = value  # a plain attribute: there is no weight of that name to update
    else:
        self._statelessify.kind.__setattr__(self, name, value)


def _setitem(self: Any, key: Any, value: Any) -> None:
    """As `_setattr`: torch would make a parameter of the tensor, and so cut its graph."""
    name = str(range(len(self))[key]) if isinstance(key, int) else key
    if name in self.__dict__["_statelessify_own"]:
        _setattr(self, name, value)
    else:
        self._statelessify.kind.__setitem__(self, key, value)


def _flatten_nothing(self: Any) -> None:
    """Weights that change in each step are not packed into one buffer."""


def _flat_weights(self: Any) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self.__dict__.get("_flat_weights_names", ())]


def _flat_weight_refs(self: Any) -> list[weakref.ref[Tensor] | None]:
    return [None if weight is None else weakref.ref(weight) for weight in _flat_weights(self)]


def _ignore(self: Any, value: Any) -> None: ...


_FLAT_WEIGHTS = property(_flat_weights, _ignore)
_FLAT_WEIGHT_REFS = property(_flat_weight_refs, _ignore)


# Roots -------------------------------------------------------------------------------------------------------------


def _parameters(self: nn.Module, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:
    """The weights at a time: 0 the initial ones, -1 or None the latest. A step, or any other change, is one time."""
    found = weights_of(self).at(-1 if time is None else time)
    if not recurse:
        warnings.warn(
            "the weights of a patched module are those of its submodules too: `recurse=False` has no effect",
            UserWarning,
            stacklevel=2,
        )
    return iter(found)


def _train(self: Any, mode: bool = True) -> Any:
    """Sets the mode, in which calls may come to other functions."""
    weights_of(self).watched = Watched()
    return self._statelessify.kind.train(self, mode)


# Copies ------------------------------------------------------------------------------------------------------------


def _reduce_ex(self: Any, protocol: Any) -> Any:
    patch: Patch = self._statelessify
    make, args, *state = patch.kind.__reduce_ex__(self, protocol)
    if make is getattr(copyreg, "__newobj__", None) and args[0] is type(self):
        make, args = _restored, (patch.kind, patch.as_root, *args[1:])
    return (make, args, *state)


def _restored(kind: type[nn.Module], as_root: bool, *args: Any) -> nn.Module:
    cls = class_of(kind, as_root)
    return cls.__new__(cls, *args)


def _setstate(self: Any, state: dict[str, Any]) -> None:
    self._statelessify.kind.__setstate__(self, state)
    if self._statelessify.as_root:
        weights_of(self).root = weakref.ref(self)


def _deepcopy(self: Any, memo: dict[int, Any]) -> nn.Module:
    """A patched module with weights of its own, leaves, over all of its time; a part is copied with its root."""
    fast = weights_of(self)
    root = None if fast.root is None else fast.root()
    if root is not None and root is not self and any(part is self for part in root.modules()):
        copy.deepcopy(root, memo)
        return memo[id(self)]
    tensors = {id(t): t for weights in fast.history or () for t in weights}
    own = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in tensors.items()}
    copied = copy_structure(self, {**memo, **own})
    memo.update({id(part): new for part, new in zip(self.modules(), copied.modules(), strict=True)})
    memo.setdefault(id(memo), []).append([*tensors.values(), root])  # what it knows by number has to live on
    weights_of(copied).root = weakref.ref(copied) if self._statelessify.as_root else None
    return copied


_OF_ALL: dict[str, Any] = {
    "__getattr__": _getattr,
    "__setattr__": _setattr,
    "__reduce_ex__": _reduce_ex,
    "__setstate__": _setstate,
    "__deepcopy__": _deepcopy,
}
_OF_ROOTS: dict[str, Any] = {
    "parameters": _parameters,
    "train": _train,
}
