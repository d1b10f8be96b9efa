"""Ordinary copies of a module, with which its pure form is compared."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from ..._random import drawn_since, random_state
from ..._skeleton import Slots, find_slots
from ..._structure import copy_structure, is_uninitialized, named_parts
from ..._tree import tree_leaves
from ...typing import Buffers, Params
from ._probe import copies, is_inexact, plain, seeded

__all__: list[str] = []


def copy_of(module: nn.Module) -> nn.Module:
    """An ordinary copy with tensors of its own, whatever the module holds beside them."""
    memo: dict[int, Tensor] = {}
    for tensor in find_slots(module).tensors.values():
        value = tensor if is_uninitialized(tensor) else tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy_structure(module, memo)


@torch.no_grad()
def put(module: nn.Module, slots: Slots, params: Params, buffers: Buffers) -> dict[str, Tensor]:
    """Write values into a copy; its tensors for `params`, which require a gradient."""
    own, parts = find_slots(module).tensors, dict(named_parts(module))
    for name, value in {**params, **buffers}.items():
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)
            if isinstance(own[name], nn.Parameter):
                own[name].requires_grad_(name in params)
            continue
        for place in slots.buffers.get(name) or (slots.empty[name],):
            path, _, attribute = place.path.rpartition(".")
            parts[path]._buffers[attribute] = value.clone()
    return {name: own[name] for name in params}


def read(module: nn.Module, slots: Slots) -> dict[str, Tensor]:
    """All tensors that are no parameters, by the names that they have in `stateless`."""
    parts = dict(named_parts(module))
    places = {name: found[0] for name, found in slots.buffers.items()} | slots.empty
    now: dict[str, Any] = {}
    for name, place in places.items():
        path, _, attribute = place.path.rpartition(".")
        now[name] = parts[path]._buffers.get(attribute, parts[path]._parameters.get(attribute))
    return {name: plain(tensor) for name, tensor in now.items() if tensor is not None}


def grad_of(leaf: Tensor) -> Any:
    return torch.zeros_like(leaf) if leaf.grad is None else plain(leaf.grad)


def scaled(tree: dict[str, Tensor], by: float = 0.1) -> dict[str, Tensor]:
    """Other values with the same signs, so that what may not be negative is not."""

    def other(tensor: Tensor) -> Tensor:
        if not is_inexact(tensor):
            return tensor.clone()
        factors = torch.linspace(1, 1 + by, tensor.numel(), device=tensor.device).reshape(tensor.shape)
        return tensor * factors.to(tensor.dtype)

    return {name: other(tensor) for name, tensor in tree.items()}


# What the module itself does ---------------------------------------------------------------------------------------


def call(module: nn.Module, inputs: Any) -> Any:
    return copy_of(module)(*inputs[0], **inputs[1])


def call_once(module: nn.Module, args: Any, kwargs: Any) -> None:
    with seeded(1), torch.no_grad():
        copy_of(module)(*args, **kwargs)


def works(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether it runs, in the mode that it is in."""
    try:
        call_once(module, *copies((args, kwargs)))
    except Exception:  # whatever it is, the module raises it
        return False
    return True


def keeps_inputs(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether it leaves its inputs as they are."""
    given = copies((args, kwargs))
    call_once(module, *given)
    pairs = zip(tree_leaves(plain(given)), tree_leaves(plain((args, kwargs))), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs if isinstance(a, Tensor))


def draws(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether it draws random numbers."""
    with seeded(1), torch.no_grad():
        before = random_state()
        copy_of(module)(*copies(args), **copies(kwargs))
        return drawn_since(before)


def pickles(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether it comes out of a pickle as a module that runs."""
    try:
        again = pickle.loads(pickle.dumps(copy_of(module)))  # some modules change when they pickle
    except Exception:  # classes may raise anything when they are asked to pickle
        return False
    return works(again, args, kwargs)
