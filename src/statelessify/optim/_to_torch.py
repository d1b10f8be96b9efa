"""The state of a pure optimizer, written back into a torch one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._tree import tree_leaves, tree_names
from .._words import listed
from ..errors import HyperparameterError, NamesError, ShapeError, TreeError
from ._foreign import put_back_
from ._from_torch import rule_of, same
from ._held import Group, groups_of
from ._hyperparameters import at_step, by_parameter
from ._optimizer import OptState

__all__ = ["to_torch_"]


def to_torch_(optimizer: torch.optim.Optimizer, state: OptState, *, module: nn.Module | None = None) -> None:
    """Write the state of a pure optimizer into a live torch one, which goes on from there.

    Slots, step counts and hyperparameters are written; parameters are not (`load_` writes them into a module). Layout,
    devices and dtypes of the state that the optimizer has are kept.

    Args:
        optimizer: of the class that the state is for.
        state: of one task (`tree_unstack` takes the states of many apart).
        module: as for `from_torch`.

    Raises:
        TreeError: the state is that of another rule.
        NamesError: a parameter without a name, or without a state.
        ShapeError: a slot that does not fit its parameter.
        HyperparameterError: a hyperparameter that a parameter group of torch cannot hold.

    Example:
        >>> from statelessify import optim, stateless
        >>> net = torch.nn.Linear(2, 1)
        >>> live = torch.optim.Adam(net.parameters())
        >>> optim.to_torch_(live, optim.adam(lr=0.5).init(stateless(net).params), module=net)
        >>> live.param_groups[0]["lr"]
        0.5
    """
    if not isinstance(state, OptState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TreeError(f"the state is {type(state).__name__}, not an `OptState`; pass what `init` or `step` gave")
    make = rule_of(type(optimizer))
    name, given = type(optimizer).__name__, getattr(state.hyperparameters, "rule", "")
    if given and given != (name if make is None else make.__name__):
        raise TreeError(
            f"the state is one of `{given}`, which {name} cannot go on from; pass an optimizer of its class"
        )
    if state.step.ndim:
        raise ShapeError(
            f"the state is that of {state.step.shape[0]} tasks; a live optimizer holds one: `tree_unstack(state)[0]`"
        )
    groups = groups_of(optimizer, module)
    with torch.no_grad():
        if make is None:
            put_back_(optimizer, groups, state)
            return
        slots = {slot: _by_name(tree) for slot, tree in state.slots.items()}
        values = _values_of(state, groups)
        for group, live in zip(groups, optimizer.param_groups, strict=True):
            _write_options(group, live, values)
            for name, p in zip(group.names, group.params, strict=True):
                if p.requires_grad:
                    _write_state(optimizer, p, live, _of_parameter(name, slots, state), values[name])


def _by_name(tree: Any) -> dict[str, Tensor]:
    return dict(zip(tree_names(tree), tree_leaves(tree), strict=True))


def _values_of(state: OptState, groups: list[Group]) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each parameter at the step of the state."""
    names = [name for group in groups for name, p in zip(group.names, group.params, strict=True) if p.requires_grad]
    now = {name: at_step(spec, state.step) for name, spec in state.hyperparameters.items()}
    return dict(zip(names, by_parameter(now, lambda: names, len(names)), strict=True))


def _of_parameter(name: str, slots: dict[str, dict[str, Tensor]], state: OptState) -> tuple[int, dict[str, Tensor]]:
    """The step count and the slots of one parameter."""
    for slot, column in slots.items():
        if name not in column:
            raise NamesError(f"slot `{slot}` of the state has {listed(column)}, but no `{name}`; pass its own state")
    own = {slot: column[name] for slot, column in slots.items()}
    return int(own.pop("step", state.step)), own


def _write_options(group: Group, live: dict[str, Any], values: dict[str, dict[str, Any]]) -> None:
    names = [name for name in group.names if name in values]
    for key in [key for key in (values[names[0]] if names else ()) if key in live]:
        first = values[names[0]][key]
        if not all(same(values[name][key], first) for name in names):
            raise HyperparameterError(
                f"`{key}` differs between {listed(names)}, which are one parameter group in torch; make the optimizer "
                "with a group for each value"
            )
        live[key] = _plain(key, first, live[key])


def _plain(key: str, value: Any, old: Any) -> Any:
    """A value as a parameter group holds it, a tensor only where one stood."""
    if isinstance(value, tuple):
        olds = cast("Any", old) if isinstance(old, (tuple, list)) else (old,) * len(cast("Any", value))
        return tuple(_plain(key, *pair) for pair in zip(cast("Any", value), olds, strict=True))
    if not isinstance(value, Tensor):
        return torch.full_like(old, value, requires_grad=False) if isinstance(old, Tensor) else value
    if value.numel() != 1:
        raise HyperparameterError(
            f"`{key}` is a tensor of shape {tuple(value.shape)}, but a parameter group of torch holds one number"
        )
    return value.detach().to(old).reshape(old.shape).clone() if isinstance(old, Tensor) else value.item()


def _write_state(
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    live: dict[str, Any],
    given: tuple[int, dict[str, Tensor]],
    values: dict[str, Any],
) -> None:
    count, slots = given
    own: dict[str, Any] = optimizer.state[p]
    if isinstance(optimizer, torch.optim.ASGD):
        slots["mu"] = torch.tensor(1 / max(1.0, count - float(values["t0"])), dtype=torch.float64)
    if count == 0 and not isinstance(optimizer, torch.optim.Adagrad):
        optimizer.state.pop(p)  # torch makes it at the first step
        return
    if count == 0:  # here torch makes it with the optimizer
        initial = float(values["initial_accumulator_value"])
        slots["sum"] = torch.full_like(p, complex(initial, initial) if p.is_complex() else initial)
    for slot, value in slots.items():
        old = own.get(slot)
        if slot in ("eta", "mu", "mu_product"):
            own[slot] = _scalar(value, old, p, slot in ("eta", "mu") or _on_device(live), live)
        elif value.numel() or not p.numel():
            own[slot] = _written(slot, value, old, p)
    if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Muon)):
        on_device = isinstance(optimizer, torch.optim.ASGD) or _on_device(live)
        own["step"] = _scalar(torch.tensor(float(count), dtype=torch.float64), own.get("step"), p, on_device, live)


def _on_device(live: dict[str, Any]) -> bool:
    return bool(live.get("capturable") or live.get("fused"))


def _written(slot: str, value: Tensor, old: Any, p: Tensor) -> Tensor:
    if value.shape == p.shape:
        target = old if isinstance(old, Tensor) and old.shape == value.shape else torch.empty_like(p)
    elif (isinstance(old, Tensor) and old.shape == value.shape) or value.ndim == p.ndim:  # rows and columns of a matrix
        target = old if isinstance(old, Tensor) else p.new_empty(value.shape)
    else:
        raise ShapeError(f"slot `{slot}` has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}")
    return target.copy_(value)


def _scalar(value: Tensor, old: Any, p: Tensor, on_device: bool, live: dict[str, Any]) -> Any:
    if value.numel() != 1:
        raise HyperparameterError(
            "a hyperparameter has one value for each entry of a parameter, which the state of torch cannot hold"
        )
    if isinstance(old, Tensor):
        return old.copy_(value.reshape(old.shape))
    if old is not None:  # a plain number, as old checkpoints have it
        return type(old)(value.item())
    wide = torch.get_default_dtype() == torch.float64 and not live.get("fused")
    return value.to(p.device if on_device else "cpu", torch.float64 if wide else torch.float32).reshape(()).clone()
