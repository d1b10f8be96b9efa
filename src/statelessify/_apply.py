"""`Apply`: the pure function that `stateless` makes of a module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ._effects import Grads, check_grads, check_new_slots, grads_of, is_changed, is_written, version_of
from ._expected import Expected
from ._kept import fill, guard_methods, is_checkpointing, keep, refuse_reentrant
from ._known import global_hooks
from ._likeness import Call, as_parameter
from ._skeleton import Skeleton, Skeletons, Slots
from ._structure import named_parts
from ._transforms import per_task_one, transforming
from ._tree import tree_leaves
from ._vacant import storage_of
from .errors import CheckpointError, ModuleError, MutationError
from .rules._registry import Watched, active_rules, rules
from .typing import Buffers, Params

__all__: list[str] = []

Tensors = Sequence[Tensor | None]
"""In the order of the slots' names; None for one that is empty."""


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
        self._places = {**slots.params, **slots.buffers, **{name: (slot,) for name, slot in slots.empty.items()}}
        # The shapes as they were: parameters may be moved and cast later, never reshaped.
        shapes = {name: slots.tensors[name].shape for name in (*slots.params, *slots.buffers)}
        self._expected = Expected(self._name, shapes, slots.empty)
        self._spread = [index for index, name in enumerate(shapes) for _ in self._places[name]]
        self._tied = len(self._spread) > len(shapes)
        self._attributes = {name: vars(t).copy() for name, t in slots.tensors.items() if vars(t)}
        storages = [storage_of(tensor) for tensor in slots.tensors.values()]
        self._overlapping = {
            name for name, place in zip(slots.tensors, storages, strict=True) if place and storages.count(place) > 1
        }
        self._registered = [
            (index, name) for index, (name, found) in enumerate(self._places.items()) if any(p[1] for p in found)
        ]
        self._own_buffers = {name for _, name in self._registered}
        self._skeletons = Skeletons(template, tuple(place for places in self._places.values() for place in places))
        self._parametrized = any(parametrize.is_parametrized(part) for _, part in named_parts(template))
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
        if torch.compiler.is_compiling():
            return self._traced(params, buffers, args, kwargs)
        if torch._C._len_torch_function_stack():
            with (
                torch._C.DisableTorchFunction()
            ):  # no mode around the call needs to see these, and each look takes time
                given, tensors = self._gather(params, buffers)
        else:
            given, tensors = self._gather(params, buffers)
        skeleton = self._skeletons.take()
        if skeleton.known and not self._overlapping and not global_hooks():
            return self._known(skeleton, buffers, tensors, args, kwargs)
        return self._unknown(skeleton, params, given, args, kwargs)

    def _known(
        self, skeleton: Skeleton, buffers: Buffers, tensors: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Buffers]:
        """A call of a module of which is known that it writes into registered buffers at most."""
        inside = transforming()
        installed = self._with_own_buffers(tensors, (args, kwargs)) if self._registered else tensors
        mode = self._mode(inside)
        try:
            skeleton.fill(self._by_slot(installed) if self._tied else installed)
            if mode is None:
                out = skeleton.inner(*args, **kwargs)
            else:
                with mode:
                    out = skeleton.inner(*args, **kwargs)
        finally:
            skeleton.vacate()
        self._skeletons.give_back(skeleton)
        new_buffers = {**buffers}
        for index, name in self._registered:
            own, given = installed[index], tensors[index]
            if name in new_buffers and own is not None and given is not None and (inside or is_changed(own, given)):
                new_buffers[name] = own
        return out, new_buffers

    def _with_own_buffers(self, tensors: Tensors, inputs: Any) -> Tensors:
        """The registered buffers cloned; inside vmap, floating ones per task."""
        one = per_task_one(_tensors((tensors, inputs))) if transforming() else None
        installed = [*tensors]
        for index, _ in self._registered:
            tensor = installed[index]
            if tensor is not None:
                installed[index] = _own(tensor, one)
        return installed

    def _by_slot(self, tensors: Tensors) -> Tensors:
        """The tensors by slot, of which a tied weight has several."""
        return [*map(tensors.__getitem__, self._spread), *tensors[len(self._expected.shapes) :]]

    def _mode(self, inside: bool) -> AbstractContextManager[Any] | None:
        """The rules that a call needs; None where it is known to need none."""
        if inside:
            return rules("transforms")
        return None if self._watched.settled else self._watched.where_needed()

    # Modules with code of their own --------------------------------------------------------------------------------

    def _unknown(
        self,
        skeleton: Skeleton,
        params: Params,
        given: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Buffers]:
        """A call after which is looked at everything that it can have done."""
        inside, call = transforming(), Call()
        with torch._C.DisableTorchFunction():
            installed = self._installed(given, (args, kwargs), call)
            versions = {name: version_of(tensor) for name, tensor in installed.items()}
        grads: Grads = {} if self._probed else grads_of(given)
        holders = skeleton.holders()
        occasion = active_rules()
        try:
            skeleton.fill([installed.get(name) for name, places in self._places.items() for _ in places])
            with self._mode(inside) or nullcontext():
                out = skeleton.inner(*args, **kwargs)
                occasion = active_rules()
            values = skeleton.read()
        except RuntimeError as error:
            if inside and is_checkpointing(error):
                raise CheckpointError(
                    f"`{self._name}` uses activation checkpointing, which torch refuses inside its transforms; switch "
                    "it off in the module (`adapt` can recompute whole steps instead), or use `adapt` in eager code"
                ) from error
            raise
        finally:
            skeleton.vacate()
            call.end()
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
                lasting = {name: self._lasting(name, tensor) for name, tensor in installed.items()}
                keep(skeleton, self._places, lasting, written, occasion)
        return out, new_buffers

    def _traced(
        self, params: Params, buffers: Buffers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Buffers]:
        """A call that dynamo follows."""
        self._check(params, buffers)
        given: dict[str, Tensor] = {**params, **buffers}
        installed = self._installed(given, (args, kwargs))
        flat: dict[str, Any] = {
            f"inner.{place.path}": t for name, t in installed.items() for place in self._places[name]
        }
        for name in self._expected.emptied.difference(installed):
            flat.update({f"inner.{place.path}": None for place in self._places[name]})
        with rules("transforms"):
            out, values = functional_call(self._skeletons.traced, flat, args, kwargs, tie_weights=False)
        return out, self._harvest(values, given, installed, {}, params)

    def _installed(self, given: dict[str, Tensor], inputs: Any, call: Call | None = None) -> dict[str, Tensor]:
        """What goes into the slots: clones of the registered buffers; parameters as they are, and known as such.

        Everything is cloned until one call in eager code has shown that forward writes into no parameter: should it
        do so, the error comes before the caller's tensor is touched.
        """
        one: Tensor | None = None
        if self._registered and transforming():
            one = per_task_one([*given.values(), *_tensors(inputs)])
        installed: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if name in self._own_buffers:
                installed[name] = _own(tensor, one)
            elif not self._probed:
                installed[name] = as_parameter(tensor.clone(), self._attributes.get(name, {}))
            elif self._aliased or call is None or name in self._attributes:
                installed[name] = self._lasting(name, tensor)
            else:
                installed[name] = call.mark(tensor)
        return installed

    def _lasting(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter as it is, or another name by which a tensor is known as one for as long as it lives."""
        if name in self._own_buffers or (isinstance(tensor, nn.Parameter) and not self._aliased):
            return tensor
        return as_parameter(tensor, self._attributes.get(name, {}))

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
        shapes = self._expected.shapes
        for name, places in self._places.items():
            found = [next(remaining) for _ in places]
            before = installed.get(name)
            own = name in self._own_buffers
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
                if own and name in shapes:
                    self._expected.emptied.add(name)
                continue
            harvest[name] = given[name] if not written and (not own or (eager and name in versions)) else value
            if name in shapes and value.shape != shapes[name]:
                self._expected.resized.add(name)
        order = [name for name in given if name not in params]
        return {name: harvest[name] for name in (*order, *harvest) if name in harvest}

    # -----------------------------------------------------------------------------------------------------------------

    def _gather(self, params: Params, buffers: Buffers) -> tuple[dict[str, Tensor], Tensors]:
        if self._parametrized:
            self._check_cache()
        return self._expected.gather(params, buffers)

    def _check(self, params: Params, buffers: Buffers) -> None:
        self._check_cache()
        self._expected.check(params, buffers)

    def _check_cache(self) -> None:
        if self._parametrized and parametrize._cache_enabled:
            raise ModuleError(
                f"`{self._name}` has parametrizations and is called inside `parametrize.cached()`, which would give it "
                "the weights of an earlier call; call it outside"
            )

    def train(self, mode: bool = True) -> Apply:
        """An apply whose module is in training mode; this one stays as it is."""
        template = self._skeletons.copy()
        template.train(mode)
        new = copy.copy(self)
        new._expected = self._expected.copy()
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


def _own(tensor: Tensor, one: Tensor | None) -> Tensor:
    if one is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    return tensor * one.to(tensor.device, tensor.dtype)
