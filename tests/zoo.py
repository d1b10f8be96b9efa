"""All members of the zoo, and what an ordinary module of the same values does with the same inputs."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo_modules
import zoo_networks
import zoo_numerics
import zoo_python
import zoo_weights
from torch import Tensor, nn
from zoo_member import Member

ZOO: dict[str, Member] = {}
for file in (zoo_modules, zoo_weights, zoo_python, zoo_networks, zoo_numerics):
    assert not ZOO.keys() & file.MEMBERS.keys()
    ZOO |= file.MEMBERS


def members(keep: Callable[[Member], bool] = lambda member: True) -> pytest.MarkDecorator:
    """Runs a test with each member that `keep` keeps."""
    chosen = [pytest.param(member, id=name) for name, member in ZOO.items() if keep(member)]
    return pytest.mark.parametrize("member", chosen)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a module's output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def total(value: Any) -> Tensor:
    """A number that depends on every tensor of an output, not symmetrically."""
    return sum((t.real * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in tensors_in(value))


def seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function with the same random draws each time."""
    torch.manual_seed(7)
    return function(*args, **kwargs)


def ordinary(member: Member, params: dict[str, Tensor], buffers: dict[str, Tensor], training: bool) -> nn.Module:
    """A module of its own, made anew, that holds these values in the ordinary way."""
    module = member.make(training)
    if member.lazy:
        module.eval()(torch.ones(member.shape))
        module.train(training)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in {**params, **buffers}.items():
            if name in own:
                own[name].copy_(value)
            else:
                path, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(path), attribute, value.clone())
    return module


def fingerprint(value: Any, seen: dict[int, int] | None = None) -> Any:
    """All that an object holds, by value and by identity, in a form that can be compared."""
    seen = {} if seen is None else seen
    if isinstance(value, (bool, int, float, str, bytes, type, type(None), torch.dtype, torch.device, types.ModuleType)):
        return value
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    parts: list[Any] = [type(value).__name__, id(value)]
    if isinstance(value, Tensor):
        if isinstance(value, nn.parameter.UninitializedTensorMixin):
            return tuple(parts)
        holds_values = type(value) in (Tensor, nn.Parameter) and not value.is_meta
        bits = value.detach().numpy().tobytes() if holds_values else b""
        return (*parts, value.shape, value.requires_grad, bits)
    if isinstance(value, torch.Generator):
        return (*parts, value.get_state().numpy().tobytes())
    parts += [fingerprint(item, seen) for item in _inside(value)]
    return tuple(parts)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, item)
    elif isinstance(value, (list, tuple, deque)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from [cell.cell_contents for cell in value.__closure__ or ()]
        yield from (value.__defaults__, value.__kwdefaults__)
    if not isinstance(value, types.FunctionType):
        yield from getattr(value, "__dict__", {}).values()
    for cls in type(value).__mro__:
        names = cls.__dict__.get("__slots__", ())
        yield from [getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)]


def perturbed(tree: dict[str, Tensor], scale: float = 0.1) -> dict[str, Tensor]:
    """Other values of the same shapes, as new leaves; integers stay."""
    return {name: _moved(tensor, scale) for name, tensor in tree.items()}


def _moved(tensor: Tensor, scale: float) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    noise = torch.rand_like(tensor)  # positive: running variances stay so
    return (tensor.detach() + scale * noise).requires_grad_(tensor.requires_grad)
