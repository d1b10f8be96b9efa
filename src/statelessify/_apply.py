"""`Apply`: the pure function that `stateless` makes of a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from ._capture import followed, following
from ._effects import (
    Grads,
    Versions,
    check_grads,
    check_new_slots,
    grads_of,
    harvest,
    is_changed,
    version_of,
    versions_of,
    writes_parameter,
)
from ._kept import fill, guard_methods, is_checkpointing, keep, refuse_reentrant
from ._known import GLOBAL_HOOKS
from ._layout import Layout, Tensors
from ._likeness import Call, as_parameter
from ._skeleton import Skeleton, Skeletons, Slots
from ._structure import named_parts
from ._transforms import in_transform, per_task_one, transforming
from ._tree import tree_leaves
from .errors import CheckpointError, ModuleError
from .rules._registry import Hidden, Rules, Watched, active_rules, innermost_rules, rules
from .typing import Buffers, Params

__all__: list[str] = []


class Apply:
    """``apply(params, buffers, *args, **kwargs) -> (out, new_buffers)``: what `stateless` returns first.

    It pickles and deep-copies whenever its module does. Each submodule keeps the mode it had; `train` and `eval`
    give another apply in that mode.
    """

    def __init__(self, template: nn.Module, slots: Slots) -> None:
        self._name = type(template).__name__
        self._layout = Layout(template, slots)
        self._skeletons = Skeletons(template, self._layout.slots)
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
            if following():
                params, buffers = followed(params), followed(buffers)
            with torch._C.DisableTorchFunction():  # no mode needs to see these, and each look takes time
                given, tensors = self._gather(params, buffers)
        else:
            given, tensors = self._gather(params, buffers)
        skeleton = self._skeletons.take()
        if skeleton.known and self._probed and not self._layout.overlapping and not any(GLOBAL_HOOKS):
            return self._known(skeleton, buffers, tensors, args, kwargs)
        return self._unknown(skeleton, params, given, args, kwargs)

    # Modules that bind nothing anew ----------------------------------------------------------------------------------

    def _known(
        self, skeleton: Skeleton, buffers: Buffers, tensors: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Buffers]:
        """A call of a module of which is known that it writes into tensors at most, and keeps nothing."""
        inside, reads, layout = in_transform(), skeleton.conduct == "only reads", self._layout
        installed = self._with_own_buffers(tensors, (args, kwargs)) if layout.registered else tensors
        if layout.packed:
            installed = layout.with_packed(installed)
        before = versions_of(installed, inside) if reads else None
        mode = self._mode(inside, known=True)
        try:
            skeleton.fill(layout.by_slot(installed))
            if mode is None:
                out = skeleton.run(*args, **kwargs)
            else:
                with mode:
                    out = skeleton.run(*args, **kwargs)
        finally:
            skeleton.vacate()
        if before is not None and before != (after := versions_of(installed, inside)):
            self._check_unwritten(before, after)
        new_buffers = {**buffers}
        for index, name in layout.registered:
            own, given = installed[index], tensors[index]
            if name in new_buffers and own is not None and given is not None and (inside or is_changed(own, given)):
                new_buffers[name] = own
        if not reads or not skeleton.is_held():
            self._skeletons.give_back(skeleton)
        elif not inside:
            written = {name for name, tensor in new_buffers.items() if tensor is not buffers[name]}
            self._outlive(skeleton, dict(zip(layout.places, installed, strict=True)), written, mode)
        return out, new_buffers

    def _with_own_buffers(self, tensors: Tensors, inputs: Any) -> Tensors:
        """The registered buffers cloned; inside vmap, floating ones per task."""
        one = per_task_one(_tensors((tensors, inputs))) if transforming() else None
        installed = [*tensors]
        for index, _ in self._layout.registered:
            tensor = installed[index]
            if tensor is not None:
                installed[index] = _own(tensor, one)
        return installed

    def _check_unwritten(self, before: Versions, after: Versions) -> None:
        for name, old, new in zip(self._layout.places, before, after, strict=True):
            if old != new and name not in self._layout.own_buffers:
                raise writes_parameter(self._name, name, touched=True)

    def _mode(self, inside: bool, known: bool = False) -> AbstractContextManager[Any] | None:
        """The rules that a call needs; None where it is known to need none."""
        if inside:
            return None if innermost_rules() == "transforms" else rules("transforms")
        if known and innermost_rules() == "gradients":
            return None if self._skeletons.may_meet("gradients") else Hidden()
        watched = self._watched
        if not watched.entered or watched.met:
            return watched.where_needed()
        return None if not self._skeletons.may_meet("always") or active_rules() is not None else watched

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
        inside, call, layout = transforming(), Call(), self._layout
        with torch._C.DisableTorchFunction():
            installed = self._installed(given, (args, kwargs), call)
            versions = {name: version_of(tensor) for name, tensor in installed.items()}
        grads: Grads = {} if self._probed else grads_of(given)
        mode = self._mode(inside)
        try:
            skeleton.fill(layout.by_slot(layout.in_order(installed)))
            with mode or nullcontext():
                out = skeleton.run(*args, **kwargs)
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
            new_buffers = harvest(layout, values, given, installed, versions, params, self._probed)
        if not self._probed:
            check_grads(given, grads, self._name)
            self._aliased = self._aliased or any(tensor._backward_hooks for tensor in installed.values())
            self._probed = True
        if not skeleton.is_held():
            if not self._skeletons.give_back(skeleton):
                check_new_slots(skeleton, self._layout.places, set(map(id, installed.values())), self._name)
        elif not inside:
            refuse_reentrant(_tensors(out), (*given.values(), *_tensors((args, kwargs))), self._name)
            written = {name for name in installed if name in new_buffers and new_buffers[name] is not given[name]}
            self._outlive(skeleton, installed, written, mode)
        return out, new_buffers

    def _outlive(
        self,
        skeleton: Skeleton,
        installed: Mapping[str, Tensor | None],
        written: set[str],
        mode: AbstractContextManager[Any] | None,
    ) -> None:
        """Leave the tensors in a skeleton of which something holds a part, if it is as it was else."""
        if skeleton.withdraw():
            lasting = {name: self._lasting(name, tensor) for name, tensor in installed.items() if tensor is not None}
            keep(
                skeleton,
                self._layout.places,
                lasting,
                written,
                mode.when if isinstance(mode, Rules) else active_rules(),
            )

    def _traced(
        self, params: Params, buffers: Buffers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Buffers]:
        """A call that dynamo follows."""
        self._check(params, buffers)
        layout = self._layout
        given: dict[str, Tensor] = {**params, **buffers}
        installed = self._installed(given, (args, kwargs))
        flat: dict[str, Any] = {
            f"inner.{place.path}": t for name, t in installed.items() for place in self._layout.places[name]
        }
        for name in layout.expected.emptied.difference(installed):
            flat.update({f"inner.{place.path}": None for place in self._layout.places[name]})
        with rules("transforms"):
            out, values = functional_call(self._skeletons.traced, flat, args, kwargs, tie_weights=False)
        return out, harvest(layout, values, given, installed, {}, params, self._probed)

    def _installed(self, given: dict[str, Tensor], inputs: Any, call: Call | None = None) -> dict[str, Tensor]:
        """What goes into the slots: clones of the registered buffers; parameters as they are, and known as such.

        Everything is cloned until one call in eager code has shown that forward writes into no parameter: should it
        do so, the error comes before the caller's tensor is touched.
        """
        one: Tensor | None = None
        if self._layout.registered and transforming():
            one = per_task_one([*given.values(), *_tensors(inputs)])
        installed: dict[str, Tensor] = {}
        for name, tensor in given.items():
            if name in self._layout.packed:
                tensor = tensor.contiguous()
            if name in self._layout.own_buffers:
                installed[name] = _own(tensor, one)
            elif not self._probed:
                installed[name] = as_parameter(tensor.clone(), self._layout.attributes.get(name, {}))
            elif self._aliased or call is None or name in self._layout.attributes:
                installed[name] = self._lasting(name, tensor)
            else:
                installed[name] = call.mark(tensor)
        return installed

    def _lasting(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter as it is, or another name by which a tensor is known as one for as long as it lives."""
        if name in self._layout.own_buffers or (isinstance(tensor, nn.Parameter) and not self._aliased):
            return tensor
        return as_parameter(tensor, self._layout.attributes.get(name, {}))

    # -----------------------------------------------------------------------------------------------------------------

    def _gather(self, params: Params, buffers: Buffers) -> tuple[dict[str, Tensor], Tensors]:
        if self._parametrized:
            self._check_cache()
        return self._layout.expected.gather(params, buffers)

    def _check(self, params: Params, buffers: Buffers) -> None:
        self._check_cache()
        self._layout.expected.check(params, buffers)

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
        new._layout = self._layout.copy()
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
        fill(bound, self._layout.places, self._installed({**params, **buffers}, None))
        for _, part in named_parts(bound):
            guard_methods(part)
        return bound

    def __repr__(self) -> str:
        return f"<apply of {self._name}: {len(self._layout.params)} params, {len(self._layout.buffers)} buffers>"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _own(tensor: Tensor, one: Tensor | None) -> Tensor:
    if one is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    return tensor * one.to(tensor.device, tensor.dtype)
