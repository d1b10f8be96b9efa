"""`stateless`: a module as a pure function and two dicts of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._apply import Apply
from ._expected import check_tensors, wrong_shape
from ._skeleton import Slots, check_is_module, check_supported, find_slots
from ._structure import copy_structure, is_uninitialized, leads_back, named_parts, reachable
from ._tree import tree_copy
from ._vacant import vacancies, views_of
from ._words import listed, nearest
from .errors import LazyModuleError, ModuleError, NamesError
from .typing import Buffers, Params, Policy

__all__ = ["Stateless", "load_", "stateless"]


class Stateless(NamedTuple):
    """A module in three parts: ``apply(params, buffers, *args) -> (out, new_buffers)``, and the two dicts."""

    apply: Apply
    params: Params
    buffers: Buffers


def stateless(
    module: nn.Module,
    *,
    params: Policy = "alias",
    buffers: Policy = "alias",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    example_args: Sequence[Any] | None = None,
) -> Stateless:
    """Split a module into a pure function and the tensors that it is a function of.

    No call of the function changes the module, the dicts that are passed to it, or what another thread's call sees.

    Args:
        module: any `torch.nn.Module`; it is left exactly as it is.
        params: copy policy of the trainable parameters. ``"alias"``: the module's own parameters (training them
            trains the module). ``"clone"``: copies in the module's graph. ``"detach"``: new leaves.
        buffers: copy policy of all other tensors: registered buffers and frozen parameters.
        device: moves the copies; with ``"alias"`` a move that needs a copy is an error.
        dtype: the dtype of floating-point and complex copies.
        example_args: positional arguments for one call of a copy, which gives lazy modules their shapes.

    Returns:
        ``Stateless(apply, params, buffers)``. `params` are the unique tensors that require a gradient, under the names
        and in the order of ``module.named_parameters()``.

    Raises:
        ModuleError: a ScriptModule, a DataParallel or DistributedDataParallel wrapper, a compiled module; or one that
            holds parts of itself in an object that cannot be copied.
        LazyModuleError: a lazy module, and no `example_args`.
        PolicyError: an unknown policy, or ``"alias"`` with a move.

    Example:
        >>> import torch
        >>> from statelessify import stateless
        >>> apply, params, buffers = stateless(torch.nn.Linear(3, 2))
        >>> out, buffers = apply(params, buffers, torch.ones(4, 3))
        >>> out.shape, list(params)
        (torch.Size([4, 2]), ['weight', 'bias'])
    """
    check_is_module(module)
    if example_args is not None:
        module = _materialized(module, example_args)
    check_supported(named_parts(module))
    slots = find_slots(module)
    tensors = slots.tensors
    trainable = tree_copy({name: tensors[name] for name in slots.params}, params, device, dtype)
    others = tree_copy({name: tensors[name] for name in slots.buffers}, buffers, device, dtype)
    template = copy_structure(module, vacancies(tensors) | views_of(tensors, reachable(module)))
    back = leads_back(template, module)
    if back is not None:
        raise ModuleError(
            f"`{back}` of `{type(module).__name__}` cannot be copied, and leads to the module's own parts or state: it "
            "is a generator, a dict with tensors as keys, or an object that hides a part of the module from a copy; "
            "hold the part itself, or in a list or a dict with names as keys"
        )
    return Stateless(Apply(template, slots), trainable, others)


def _materialized(module: nn.Module, example_args: Any) -> nn.Module:
    """A copy whose lazy parts have their shapes; every other part is as it was, with the original's own tensors."""
    if not isinstance(example_args, Sequence):  # a tensor is none
        raise LazyModuleError("`example_args` is not a tuple of the call's arguments; write `example_args=(x,)`")
    found = find_slots(module).tensors.values()
    if not any(is_uninitialized(tensor) for tensor in found):
        return module
    trial = copy_structure(module, {id(t): _twin(t) for t in found}).eval()  # shapes only: no statistics are updated
    with torch.no_grad():
        trial(*example_args)
    result = copy_structure(module, {id(t): _twin(t) if is_uninitialized(t) else t for t in found})
    tried = dict(named_parts(trial))
    for path, part in named_parts(result):
        if any(is_uninitialized(t) for t in (*part._parameters.values(), *part._buffers.values())):
            mode, shaped = part.training, tried[path]
            part.__class__, part.__dict__ = shaped.__class__, shaped.__dict__
            part.training = mode
    return result


def _twin(tensor: Any) -> Tensor:
    if is_uninitialized(tensor):
        return type(tensor)(tensor.requires_grad, tensor.data.device, tensor.data.dtype)
    own = tensor.detach().clone()
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


@torch.no_grad()
def load_(module: nn.Module, params: Params | None = None, buffers: Buffers | None = None) -> None:
    """Write tensors back into a module, in place and without a graph.

    Args:
        module: the module; what is not given stays.
        params: all of its trainable parameters by name, or None.
        buffers: all of its other tensors by name, or None. A slot that was None may be filled.

    Raises:
        NamesError: names are unknown or missing. Nothing has been written.
        ShapeError: a parameter has another shape. Nothing has been written.

    Example:
        >>> from statelessify import load_
        >>> net = torch.nn.Linear(1, 1)
        >>> load_(net, {"weight": torch.zeros(1, 1), "bias": torch.ones(1)})
        >>> net.bias.item()
        1.0
    """
    check_is_module(module)
    check_supported(named_parts(module))
    slots = find_slots(module)
    _check_load(slots, params, buffers, type(module).__name__)
    own = {tensor.untyped_storage().data_ptr() for tensor in slots.tensors.values()}
    given = {**(params or {}), **(buffers or {})}
    for name, value in given.items():
        if value.untyped_storage().data_ptr() in own:  # it may be overwritten before it is read
            given[name] = value.clone()
    owners = dict(named_parts(module))
    for name, value in given.items():
        if name in slots.tensors:
            slots.tensors[name].copy_(value)
        else:
            place, new = slots.empty[name], value.detach().clone()
            path, _, attribute = place.path.rpartition(".")
            setattr(owners[path], attribute, new if place.registered_buffer else nn.Parameter(new))


def _check_load(slots: Slots, params: Params | None, buffers: Buffers | None, kind: str) -> None:
    for what, tree in (("params", params), ("buffers", buffers)):
        if tree is not None:
            check_tensors(what, tree)
    both = {**(params or {}), **(buffers or {})}
    if params and buffers and (twice := [name for name in params if name in buffers]):
        raise NamesError(f"{listed(twice)} stands in both `params` and `buffers`; give each name once")
    for what, tree, expected in (("params", params, slots.params), ("buffers", buffers, slots.buffers)):
        if tree is None:
            continue
        missing = [name for name in expected if name not in both]
        if missing:
            raise NamesError(f"`{what}` lacks {listed(missing)} of `{kind}`; pass them all, or None to leave them")
        for name, value in tree.items():
            if name not in slots.tensors and name not in slots.empty:
                raise NamesError(
                    f"`{what}` has the unknown name `{name}`{nearest(name, slots.tensors)}; "
                    f"`{kind}` has {listed(slots.tensors)}"
                )
            if name in slots.tensors and slots.tensors[name].shape != value.shape:
                raise wrong_shape(what, name, value, slots.tensors[name].shape)
