"""`Apply`: the pure function that `stateless` makes of a module."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._functions import norms_for_transforms, per_task_one, transforming
from ._skeleton import Skeleton, Skeletons, Slots
from ._structure import named_parts
from ._tree import tree_leaves
from ._words import listed, nearest
from .errors import DtypeError, MutationError, NamesError, ShapeError
from .typing import Buffers, Params

__all__: list[str] = []


class Apply:
    """``apply(params, buffers, *args, **kwargs) -> (out, new_buffers)``: what `stateless` returns first.

    It pickles and deep-copies whenever its module does. Each submodule keeps the mode it had; `train` and `eval`
    give another apply in that mode.
    """

    def __init__(self, template: nn.Module, slots: Slots) -> None:
        self._name = type(template).__name__
        self._params = slots.params
        self._buffers = slots.buffers
        self._empty = slots.empty
        # The shapes as they were: parameters may be moved and cast later, never reshaped.
        self._shapes = {name: tensor.shape for name, tensor in slots.tensors.items()}
        self._places = {**slots.params, **slots.buffers, **{name: (slot,) for name, slot in slots.empty.items()}}
        self._registered = {name for name, places in self._places.items() if any(p.registered_buffer for p in places)}
        self._skeletons = Skeletons(template, tuple(place for places in self._places.values() for place in places))
        self._resized: set[str] = set()  # buffers that forward has been seen to give another shape
        self._probed = False

    def __call__(self, params: Params, buffers: Buffers, /, *args: Any, **kwargs: Any) -> tuple[Any, Buffers]:
        """Run the module's forward with these tensors in place of its own.

        Args:
            params: tensors by name; together with `buffers` complete and disjoint.
            buffers: tensors by name. A name may stand in either dict.
            *args, **kwargs: what the module's forward takes.

        Returns:
            ``(out, new_buffers)``: what forward returned, and `buffers` as forward left them. In eager code an entry
            that forward did not write is the same object. A slot that was None and got a tensor appears.

        Raises:
            NamesError: names are missing, unknown, or in both dicts.
            ShapeError: a tensor does not have its parameter's shape.
            MutationError: forward writes in place into a parameter.
        """
        self._check(params, buffers)
        if torch.compiler.is_compiling():
            return self._call(self._skeletons.traced, params, buffers, args, kwargs)
        return self._skeletons.run(lambda skeleton: self._call(skeleton, params, buffers, args, kwargs))

    def _call(
        self, skeleton: Skeleton, params: Params, buffers: Buffers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Buffers]:
        given = {**params, **buffers}
        installed = self._installed(given, (args, kwargs), probe=not (self._probed or torch.compiler.is_compiling()))
        flat = {f"inner.{place.path}": installed[name] for name in installed for place in self._places[name]}
        eager = not transforming()
        versions = {name: tensor._version for name, tensor in installed.items()} if eager else {}
        with norms_for_transforms():
            out, values = functional_call(skeleton, flat, args, kwargs, tie_weights=False)
        new_buffers = self._harvest(values, given, installed, versions, params, buffers)
        self._probed = True
        return out, new_buffers

    def _installed(self, given: dict[str, Tensor], inputs: Any, probe: bool) -> dict[str, Tensor]:
        """What goes into the slots: clones of the registered buffers, and everything else as it is.

        The very first call clones everything: should forward write into a parameter, the error comes before the
        caller's tensor is touched.
        """
        one: Tensor | None = None
        if self._registered and transforming():
            one = per_task_one([t for t in (*given.values(), *tree_leaves(inputs)) if isinstance(t, Tensor)])
        installed: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if name in self._registered:
                floating = tensor.is_floating_point() or tensor.is_complex()
                marked = None if one is None or not floating else tensor * one.to(tensor.device, tensor.dtype)
                installed[name] = tensor.clone() if marked is None else marked
            else:
                installed[name] = tensor.clone() if probe else tensor
        return installed

    def _harvest(
        self,
        values: Sequence[Tensor | None],
        given: dict[str, Tensor],
        installed: dict[str, Tensor],
        versions: dict[str, int],
        params: Params,
        buffers: Buffers,
    ) -> Buffers:
        new_buffers: Buffers = {}
        remaining = iter(values)
        for name, places in self._places.items():
            found = [next(remaining) for _ in places]
            before = installed.get(name)
            value = next((new for new in found if new is not before), before)
            written = value is not before
            if before is not None and name in versions:
                written = written or before._version != versions[name]
            if written and name not in self._registered and name not in self._empty:
                raise MutationError(
                    f"`{self._name}` changes its parameter `{name}` in forward, which a pure function cannot do: "
                    "compute the new value out of place, or register the tensor as a buffer"
                    + ("; the tensor that was passed in has been changed" if self._probed else "")
                )
            if value is None or name in params:
                continue
            keep = versions and not written and name in given and not _silently_written(value, given[name])
            new_buffers[name] = given[name] if keep else value
            if name in self._shapes and value.shape != self._shapes[name]:
                self._resized.add(name)
        order = [name for name in buffers if name in new_buffers]
        return {name: new_buffers[name] for name in (*order, *(n for n in new_buffers if n not in buffers))}

    def _check(self, params: Params, buffers: Buffers) -> None:
        for what, tree in (("params", params), ("buffers", buffers)):
            if not isinstance(tree, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DtypeError(
                    f"`{what}` is {type(tree).__name__}, not a dict of tensors; write `apply(params, buffers, ...)`"
                )
            for name, tensor in tree.items():
                shape = self._shapes.get(name)
                if shape is None and name not in self._empty:
                    raise NamesError(
                        f"`{what}` has the unknown name `{name}`{nearest(name, self._shapes)}; "
                        f"`{self._name}` has {listed(self._shapes)}"
                    )
                if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise DtypeError(f"`{what}[{name!r}]` is {type(tensor).__name__}, not a tensor")
                if shape is not None and tensor.shape != shape and name not in self._resized:
                    raise wrong_shape(what, name, tensor, shape)
        self._check_complete(params, buffers)

    def _check_complete(self, params: Params, buffers: Buffers) -> None:
        twice = [name for name in params if name in buffers]
        if twice:
            raise NamesError(f"{listed(twice)} stands in both `params` and `buffers`; give each name once")
        missing = [name for name in self._shapes if name not in params and name not in buffers]
        if missing:
            raise NamesError(
                f"neither `params` nor `buffers` has {listed(missing)}; `{self._name}` needs every name in one of them "
                "(put partial dicts together with `combine`)"
            )

    def train(self, mode: bool = True) -> Apply:
        """An apply whose module is in training mode; this one stays as it is."""
        template = self._skeletons.copy()
        template.train(mode)
        new = copy.copy(self)
        new._skeletons = Skeletons(template, self._skeletons.paths)
        return new

    def eval(self) -> Apply:
        """An apply whose module is in evaluation mode; this one stays as it is."""
        return self.train(False)

    def bind(self, params: Params, buffers: Buffers) -> Any:
        """A module with these tensors in its slots, for methods other than forward, and for submodules.

        Its calls change its own copies of the buffers only. It works under the same transforms as `apply`; inside
        one, bind inside too.

        Example:
            >>> from statelessify import stateless
            >>> apply, params, buffers = stateless(torch.nn.Sequential(torch.nn.Linear(3, 2)))
            >>> apply.bind(params, buffers)[0](torch.ones(3)).shape
            torch.Size([2])
        """
        self._check(params, buffers)
        bound = self._skeletons.copy()
        owners = dict(named_parts(bound))
        for name, tensor in self._installed({**params, **buffers}, None, probe=False).items():
            for place in self._places[name]:
                path, _, attribute = place.path.rpartition(".")
                owner = owners[path]
                entries: dict[str, Any] = owner._buffers if place.registered_buffer else owner._parameters
                entries[attribute] = tensor
        for owner in owners.values():
            _guard_methods(owner)
        return bound

    def __repr__(self) -> str:
        return f"<apply of {self._name}: {len(self._params)} params, {len(self._buffers)} buffers>"


def _silently_written(value: Tensor, given: Tensor) -> bool:
    """Whether a fused batch norm has updated running statistics, which autograd's versions do not count."""
    return value.ndim == 1 and value is not given and (value.is_meta or not torch.equal(value, given))


def wrong_shape(what: str, name: str, tensor: Tensor, shape: torch.Size) -> ShapeError:
    hint = "; map over tasks with `over_tasks` or torch.vmap" if tensor.shape[1:] == shape else ""
    return ShapeError(f"`{what}[{name!r}]` has shape {tuple(tensor.shape)}, but the module's is {tuple(shape)}{hint}")


def _guard_methods(module: nn.Module) -> None:
    """Run the methods of a bound module's classes under the norms that transforms need."""
    for cls in type(module).__mro__:
        if cls is nn.Module:
            break
        for name, function in vars(cls).items():
            if isinstance(function, types.FunctionType) and not name.startswith("__") and name not in module.__dict__:
                module.__dict__[name] = types.MethodType(_guarded(function), module)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        with norms_for_transforms():
            return function(*args, **kwargs)

    return method
