"""`Apply`: the pure function that `stateless` makes of a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ._capture import following
from ._effects import Grads, check_grads, check_new_slots, grads_of, is_written, version_of
from ._kept import fill, guard_methods, is_checkpointing, keep, refuse_reentrant
from ._skeleton import Skeletons, Slots
from ._structure import named_parts
from ._transforms import per_task_one, transforming
from ._tree import tree_leaves
from ._vacant import storage_of
from ._words import listed, nearest
from .errors import CheckpointError, DtypeError, ModuleError, MutationError, NamesError, ShapeError
from .rules._registry import Watched, active_rules, rules
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
        self._attributes = {name: vars(t).copy() for name, t in slots.tensors.items() if vars(t)}
        storages = [storage_of(tensor) for tensor in slots.tensors.values()]
        self._overlapping = {
            name for name, place in zip(slots.tensors, storages, strict=True) if place and storages.count(place) > 1
        }
        self._registered = {name for name, places in self._places.items() if any(p.registered_buffer for p in places)}
        self._skeletons = Skeletons(template, tuple(place for places in self._places.values() for place in places))
        self._parametrized = any(parametrize.is_parametrized(part) for _, part in named_parts(template))
        self._resized: set[str] = set()  # buffers that forward has been seen to give another shape,
        self._emptied: set[str] = set()  # and to set to None: from then on they may have, or be missing
        self._probed = False
        self._aliased = False  # whether forward hangs something on its parameters: then it gets other names for them
        self._watched = Watched()

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
        given: dict[str, Tensor] = {**params, **buffers}
        if torch.compiler.is_compiling():
            installed = self._installed(given, (args, kwargs))
            with rules("transforms"):
                out, values = functional_call(
                    self._skeletons.traced, self._flat(installed), args, kwargs, tie_weights=False
                )
            return out, self._harvest(values, given, installed, {}, params)
        return self._eager(params, given, args, kwargs)

    def _eager(
        self,
        params: Params,
        given: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Buffers]:
        inside = transforming()
        # No mode around the call needs to see these, save those that follow a tensor, and each look takes time.
        with torch._C.DisableTorchFunctionSubclass() if following() else torch._C.DisableTorchFunction():
            installed = self._installed(given, (args, kwargs))
        with torch._C.DisableTorchFunction():
            versions = {name: version_of(tensor) for name, tensor in installed.items()}
        grads: Grads = {} if self._probed else grads_of(given)
        skeleton = self._skeletons.take()
        holders = skeleton.holders()
        try:
            with rules("transforms") if inside else self._watched.where_needed():
                out, values = functional_call(skeleton, self._flat(installed), args, kwargs, tie_weights=False)
                occasion = active_rules()
        except RuntimeError as error:
            if inside and is_checkpointing(error):
                raise CheckpointError(
                    f"`{self._name}` uses activation checkpointing, which torch refuses inside its transforms; switch "
                    "it off in the module (`adapt` can recompute whole steps instead), or use `adapt` in eager code"
                ) from error
            raise
        with torch._C.DisableTorchFunction():
            new_buffers = self._harvest(values, given, installed, versions, params)
        if not self._probed:
            check_grads(given, grads, self._name)
            self._aliased = self._aliased or any(tensor._backward_hooks for tensor in installed.values())
            self._probed = True
        if skeleton.holders() == holders:
            if not self._skeletons.give_back(skeleton):
                check_new_slots(skeleton, self._places, set(map(id, installed.values())), self._name)
        elif not inside:
            refuse_reentrant(_tensors(out), (*given.values(), *_tensors((args, kwargs))), self._name)
            if skeleton.pristine.still():
                written = [name for name in installed if name in new_buffers and new_buffers[name] is not given[name]]
                keep(skeleton, self._places, installed, written, occasion)
        return out, new_buffers

    def _flat(self, installed: dict[str, Tensor]) -> dict[str, Any]:
        """The tensors by the path of each slot."""
        flat: dict[str, Any] = {
            f"inner.{place.path}": t for name, t in installed.items() for place in self._places[name]
        }
        for name in self._emptied.difference(installed):
            flat.update({f"inner.{place.path}": None for place in self._places[name]})
        return flat

    def _installed(self, given: dict[str, Tensor], inputs: Any) -> dict[str, Tensor]:
        """What goes into the slots: clones of the registered buffers; parameters as they are, and known as such.

        Everything is cloned until one call in eager code has shown that forward writes into no parameter: should it
        do so, the error comes before the caller's tensor is touched.
        """
        one: Tensor | None = None
        if self._registered and transforming():
            one = per_task_one([*given.values(), *_tensors(inputs)])
        installed: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if name in self._registered:
                floating = tensor.is_floating_point() or tensor.is_complex()
                marked = None if one is None or not floating else tensor * one.to(tensor.device, tensor.dtype)
                installed[name] = tensor.clone() if marked is None else marked
            else:
                as_it_is = self._probed and isinstance(tensor, nn.Parameter) and not self._aliased
                source = tensor if self._probed else tensor.clone()
                installed[name] = tensor if as_it_is else self._as_parameter(name, source)
        return installed

    def _as_parameter(self, name: str, tensor: Tensor) -> Tensor:
        """Another name for a tensor, by which it is known as a parameter, with what hangs on the module's own."""
        if type(tensor) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
            return tensor
        # Not `view_as`, whose backward refuses sparse gradients; no mode sees `as_subclass`.
        named = torch.ops.aten.alias(tensor) if following() else tensor.as_subclass(Tensor)
        for key, value in {**self._attributes.get(name, {}), "_is_param": True}.items():
            setattr(named, key, value)
        return named

    def _harvest(
        self,
        values: Sequence[Tensor | None],
        given: dict[str, Tensor],
        installed: dict[str, Tensor],
        versions: dict[str, tuple[int, ...]],
        params: Params,
    ) -> Buffers:
        """The tensors that stand in the slots after the call; an error where a parameter's has changed."""
        harvest: Buffers = {}
        eager = not transforming()
        remaining = iter(values)
        for name, places in self._places.items():
            found = [next(remaining) for _ in places]
            before = installed.get(name)
            own = name in self._registered
            # A parameter's slot that is empty now was cleared for this call; the parameter itself is as it was.
            value = next((new for new in found if new is not before and (own or new is not None)), before)
            written = value is not before
            if before is not None and not written and name in versions:
                written = is_written(before, versions[name], given[name])
            if written and name in self._overlapping:
                raise MutationError(
                    f"`{self._name}` writes into `{name}`, whose storage another of its tensors shares: the other one "
                    "would not see it; give each a tensor of its own"
                )
            if written and not own and name not in self._empty:
                raise MutationError(
                    f"`{self._name}` changes its parameter `{name}` in forward, which a pure function cannot do: "
                    "compute the new value out of place, or register the tensor as a buffer"
                    + ("; the tensor that was passed in has been changed" if self._probed else "")
                )
            if name in params:
                continue
            if value is None:
                if own and name in self._shapes:
                    self._emptied.add(name)
                continue
            harvest[name] = given[name] if not written and (not own or (eager and name in versions)) else value
            if name in self._shapes and value.shape != self._shapes[name]:
                self._resized.add(name)
        order = [name for name in given if name not in params]
        return {name: harvest[name] for name in (*order, *harvest) if name in harvest}

    def _check(self, params: Params, buffers: Buffers) -> None:
        if self._parametrized and parametrize._cache_enabled:
            raise ModuleError(
                f"`{self._name}` has parametrizations and is called inside `parametrize.cached()`, which would give it "
                "the weights of an earlier call; call it outside"
            )
        for what, tree in (("params", params), ("buffers", buffers)):
            check_tensors(what, tree)
            for name, tensor in tree.items():
                shape = self._shapes.get(name)
                if shape is None and name not in self._empty:
                    raise NamesError(
                        f"`{what}` has the unknown name `{name}`{nearest(name, self._shapes)}; "
                        f"`{self._name}` has {listed(self._shapes)}"
                    )
                if shape is not None and tensor.shape != shape and name not in self._resized:
                    raise wrong_shape(what, name, tensor, shape)
        self._check_complete(params, buffers)

    def _check_complete(self, params: Params, buffers: Buffers) -> None:
        twice = [name for name in params if name in buffers]
        if twice:
            raise NamesError(f"{listed(twice)} stands in both `params` and `buffers`; give each name once")
        missing = [n for n in self._shapes if n not in params and n not in buffers and n not in self._emptied]
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
        new._resized, new._emptied = set(self._resized), set(self._emptied)
        new._probed, new._watched = False, Watched()
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
        fill(bound, self._places, self._installed({**params, **buffers}, None))
        for _, part in named_parts(bound):
            guard_methods(part)
        return bound

    def __repr__(self) -> str:
        return f"<apply of {self._name}: {len(self._params)} params, {len(self._buffers)} buffers>"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def check_tensors(what: str, tree: Any) -> None:
    """Refuse anything but a dict of tensors."""
    if not isinstance(tree, Mapping):
        raise DtypeError(f"`{what}` is {type(tree).__name__}, not a dict of tensors")
    for name, tensor in cast("Mapping[str, Any]", tree).items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"`{what}[{name!r}]` is {type(tensor).__name__}, not a tensor")


def wrong_shape(what: str, name: str, tensor: Tensor, shape: torch.Size) -> ShapeError:
    hint = "; map over tasks with `over_tasks` or torch.vmap" if tensor.shape[1:] == shape else ""
    return ShapeError(f"`{what}[{name!r}]` has shape {tuple(tensor.shape)}, but the module's is {tuple(shape)}{hint}")
