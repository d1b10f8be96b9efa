"""Live optimizers of torch beside pure ones: modules, gradients, round trips, and states compared bit for bit."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from statelessify import load_, optim, stateless

# Four leaves of one shape are updated as one.
SHAPES: list[tuple[int, ...]] = [(), (2, 3), (5,), (2, 3), (2, 3), (0,), (2, 3), (2, 1, 3)]
MATRICES: list[tuple[int, ...]] = [(2, 3), (2, 3), (5, 2), (2, 3), (2, 3), (1, 1)]
CLASSES: list[type[torch.optim.Optimizer]] = [
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.Muon,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
]
Gradients = dict[str, Tensor | None]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def module_for(cls: type) -> nn.Module:
    shapes = MATRICES if cls is torch.optim.Muon else SHAPES
    if cls is torch.optim.Adafactor:  # torch's divides by the number of entries
        shapes = [shape for shape in shapes if shape != (0,)]
    return nn.ParameterList([torch.randn(shape) for shape in shapes])


def gradients_for(module: nn.Module, steps: int) -> list[Gradients]:
    return [{name: torch.randn_like(p) for name, p in module.named_parameters()} for _ in range(steps)]


def without(gradients: list[Gradients], *names: str) -> list[Gradients]:
    return [{name: None if name in names else grad for name, grad in each.items()} for each in gradients]


def step(live: torch.optim.Optimizer, module: nn.Module, gradients: list[Gradients]) -> None:
    for each in gradients:
        for name, p in module.named_parameters():
            p.grad = None if each[name] is None or not p.requires_grad else each[name].clone()
        live.step()
        live.zero_grad()


def pure_steps(optimizer: optim.Optimizer, module: nn.Module, gradients: list[Gradients]) -> tuple[Any, Any]:
    """The parameters and the state after steps that begin at those of the module."""
    params = stateless(module, params="detach").params
    state = optimizer.init(params)
    with torch.no_grad():
        for each in gradients:
            params, state = optimizer.step(params, {name: each[name] for name in params}, state)
    return params, state


def detour(
    live: torch.optim.Optimizer, module: nn.Module, gradients: list[Gradients], **options: Any
) -> torch.optim.Optimizer:
    """Export, pure steps, import."""
    params, state = pure_steps(optim.from_torch(live, module=module, **options), module, gradients)
    load_(module, params)
    optim.to_torch_(live, state, module=module)
    return live


def round_trip(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    module: nn.Module,
    gradients: list[Gradients],
    *,
    before: int = 3,
    pure: int = 3,
    tolerance: float = 0.0,
    change: Callable[[torch.optim.Optimizer, nn.Module], Any] = lambda live, module: None,
    state: bool = True,
) -> None:
    """Torch steps, pure ones and torch steps again are as many torch steps; `change` is made before the pure ones."""
    other = copy.deepcopy(module)
    live, reference = make(module), make(other)
    for optimizer, own in ((live, module), (reference, other)):
        step(optimizer, own, gradients[:before])
        change(optimizer, own)
    detour(live, module, gradients[before : before + pure])
    step(reference, other, gradients[before : before + pure])
    assert not state or assert_same(state_of(live), state_of(reference), tolerance) is None
    step(live, module, gradients[before + pure :])
    step(reference, other, gradients[before + pure :])
    assert not state or assert_same(state_of(live), state_of(reference), tolerance) is None
    assert_same(module.state_dict(), other.state_dict(), tolerance)


def state_of(live: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict, without parameters that have nothing in it."""
    found = live.state_dict()
    return {**found, "state": {key: own for key, own in found["state"].items() if own}}


def assert_same(found: Any, expected: Any, tolerance: float = 0.0, where: str = "") -> None:
    """Types, layouts and, up to a tolerance, numbers are the same."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), f"{where}: {list(found)}, not {list(expected)}"
        for key, value in expected.items():
            assert_same(found[key], value, tolerance, f"{where}.{key}")
    elif isinstance(expected, (tuple, list, deque)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, tolerance, f"{where}.{index}")
    elif isinstance(expected, Tensor):
        assert isinstance(found, Tensor), f"{where}: {type(found)}"
        assert (found.dtype, found.requires_grad) == (expected.dtype, expected.requires_grad), where
        if found.shape != expected.shape or not torch.equal(found, expected):  # the usual case is cheap
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}")
    else:
        number = isinstance(expected, (int, float)) and not isinstance(expected, bool)  # 0 and 0.0 are one momentum
        assert number or type(found) is type(expected), f"{where}: {found!r}, not {expected!r}"
        assert found == expected, f"{where}: {found!r}, not {expected!r}"


@contextmanager
def untouched(live: torch.optim.Optimizer, module: nn.Module) -> Iterator[None]:
    """Nothing of a live optimizer and its module changes: not even the objects, or their versions."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held = {id(p): dict(own) for p, own in live.state.items()}
    versions = {name: tensor._version for name, tensor in tensors.items()}
    grads = {name: tensor.grad for name, tensor in tensors.items()}
    before = copy.deepcopy((live.state_dict(), module.state_dict(), grads))
    groups = [dict(group) for group in live.param_groups]
    yield
    assert_same((live.state_dict(), module.state_dict(), {name: t.grad for name, t in tensors.items()}), before)
    assert {name: tensor._version for name, tensor in tensors.items()} == versions
    assert [id(t.grad) for t in tensors.values()] == [id(grad) for grad in grads.values()]
    for p, own in live.state.items():
        assert all(own[slot] is value for slot, value in held[id(p)].items())
    for group, known in zip(live.param_groups, groups, strict=True):
        assert group.keys() == known.keys()
        assert all(group[key] is value for key, value in known.items())


# Torch's own optimizer with the settings of a pure one ---------------------------------------------------------------

RULES = {cls.__name__.lower(): cls for cls in CLASSES}


def rule_of(optimizer: optim.Optimizer) -> Any:
    return optimizer.init.__self__  # type: ignore[attr-defined]


def settings_of(optimizer: optim.Optimizer) -> dict[str, Any]:
    rule = rule_of(optimizer)
    return {**rule.hyperparameters, **rule.switches, **rule.choices}


def plain(value: Any, name: str) -> Any:
    """A setting as torch has it, for one parameter."""
    if isinstance(value, tuple):
        return tuple(plain(each, name) for each in value)
    value = value[name] if isinstance(value, dict) else value
    return value.item() if isinstance(value, Tensor) else value


def live_as(optimizer: optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> torch.optim.Optimizer:
    """One group for each parameter, with its settings, as far as torch knows them."""
    cls = RULES[rule_of(optimizer).name]
    known = inspect.signature(cls).parameters
    given = {name: value for name, value in settings_of(optimizer).items() if name in known}
    groups = [{"params": [(name, p)], **{key: plain(value, name) for key, value in given.items()}} for name, p in named]
    found = cls(groups)
    for group in found.param_groups:  # of Adagrad, the first accumulator is not taken from the group
        for p in group["params"] if "initial_accumulator_value" in group else ():
            found.state[p]["sum"].fill_(group["initial_accumulator_value"])
    return found
