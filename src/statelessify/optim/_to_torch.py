"""The state of a pure optimizer, written back into a torch one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._tree import tree_detach, tree_leaves, tree_names
from .._words import listed
from ..errors import HyperparameterError, NamesError, ShapeError, TreeError
from ._foreign import put_back_
from ._from_torch import rule_of, same
from ._held import Group, groups_of
from ._hyperparameters import at_step, by_parameter
from ._optimizer import OptState
from ._parts import copied, unboxed

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
        values = _values_of(state, groups)
        pairs = list(zip(groups, optimizer.param_groups, strict=True))
        options = [_options(live, group, values, only_known=make is not None) for group, live in pairs]
        if make is None:
            put_back_(optimizer, groups, state)
            plans = []
        else:
            slots = {slot: _by_name(tree) for slot, tree in state.slots.items()}
            plans = [
                entry
                for (group, live), new in zip(pairs, options, strict=True)
                for entry in _entries(optimizer, group, {**live, **new}, slots, values, state)
            ]
        for live, new in zip(optimizer.param_groups, options, strict=True):  # only now is anything written
            live.update(new)
        for p, entry in plans:
            _write(optimizer, p, entry)


def _by_name(tree: Any) -> dict[str, Tensor]:
    return dict(zip(tree_names(tree), tree_leaves(tree), strict=True))


Entry = dict[str, Tensor | float] | None
"""What torch is to hold for one parameter: tensors by slot, step counts as numbers; None for no state yet."""


def _entries(
    optimizer: torch.optim.Optimizer,
    group: Group,
    live: dict[str, Any],
    slots: dict[str, dict[str, Tensor]],
    values: dict[str, dict[str, Any]],
    state: OptState,
) -> list[tuple[Tensor, Entry]]:
    """What each parameter of a group is to have, checked; `live` are the group's options."""
    found: list[tuple[Tensor, Entry]] = []
    for name, p in [pair for pair in zip(group.names, group.params, strict=True) if pair[1].requires_grad]:
        for slot, column in slots.items():
            if name not in column:
                raise NamesError(
                    f"slot `{slot}` of the state has {listed(column)}, but no `{name}`; pass the state of the "
                    "parameters that the optimizer holds"
                )
        own = {slot: column[name] for slot, column in slots.items()}
        count = int(own.pop("step", state.step))
        found.append((p, _entry(optimizer, p, live, count, own, values[name])))
    return found


def _entry(
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    live: dict[str, Any],
    count: int,
    slots: dict[str, Tensor],
    values: dict[str, Any],
) -> Entry:
    needed = {slot for slot in slots if slot not in _OPTIONAL}
    needed |= {slot for slot, is_used in _OPTIONAL.items() if is_used(type(optimizer), live)}
    if missing := needed - slots.keys():
        raise TreeError(
            f"the live {type(optimizer).__name__} needs {listed(missing)}, which the state does not have; make both "
            "with the same options"
        )
    found: dict[str, Tensor | float] = {}
    for slot in [slot for slot in slots if slot in needed]:
        value = slots[slot]
        if slot in _SCALARS:
            if value.numel() != 1:
                raise HyperparameterError(
                    "a hyperparameter has one value for each entry of a parameter, which the state of torch cannot hold"
                )
            found[slot] = value.item()
        elif isinstance(optimizer, torch.optim.Adafactor):
            if value.numel():
                found[slot] = value
        elif value.shape != p.shape:
            raise ShapeError(f"slot `{slot}` has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}")
        else:
            found[slot] = value
    if count == 0 and not isinstance(optimizer, torch.optim.Adagrad):
        return None  # torch makes it at the first step
    if count == 0:  # here torch makes it with the optimizer
        initial = float(values["initial_accumulator_value"])
        found["sum"] = torch.full_like(p, complex(initial, initial) if p.is_complex() else initial)
    if isinstance(optimizer, torch.optim.ASGD):
        found["mu"] = 1 / max(1.0, count - float(values["t0"]))
    if not isinstance(optimizer, (torch.optim.SGD, torch.optim.Muon)):
        found["step"] = float(count)
    return found if found else None


_SCALARS = frozenset({"eta", "mu_product"})
_OPTIONAL: dict[str, Callable[[type, dict[str, Any]], bool]] = {  # slots that torch has with some options only
    "momentum_buffer": lambda cls, live: cls is torch.optim.Muon or bool(live.get("momentum")),
    "max_exp_avg_sq": lambda cls, live: bool(live.get("amsgrad")),
    "grad_avg": lambda cls, live: bool(live.get("centered")),
}


def _write(optimizer: torch.optim.Optimizer, p: Tensor, entry: Entry) -> None:
    if entry is None:
        optimizer.state.pop(p, None)
        return
    group = next(group for group in optimizer.param_groups if any(each is p for each in group["params"]))
    own: dict[str, Any] = optimizer.state[p]
    for slot, value in entry.items():
        old = own.get(slot)
        if isinstance(value, Tensor):
            target = old if isinstance(old, Tensor) and old.shape == value.shape else None
            if target is None:
                target = torch.empty_like(p) if value.shape == p.shape else p.new_empty(value.shape)
            own[slot] = target.copy_(value)
        elif isinstance(old, Tensor):
            old.fill_(value)
        elif old is not None:  # a plain number, as old checkpoints have it
            own[slot] = type(old)(value)
        else:
            wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
            on_device = isinstance(optimizer, torch.optim.ASGD) or group.get("capturable") or group.get("fused")
            dtype, device = torch.float64 if wide else torch.float32, p.device if on_device else "cpu"
            own[slot] = torch.tensor(value, dtype=dtype, device=device)


def _values_of(state: OptState, groups: list[Group]) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each parameter at the step of the state."""
    names = [name for group in groups for name, p in zip(group.names, group.params, strict=True) if p.requires_grad]
    now = {name: at_step(spec, state.step) for name, spec in state.hyperparameters.items()}
    return dict(zip(names, by_parameter(now, lambda: names, len(names)), strict=True))


def _options(live: dict[str, Any], group: Group, values: dict[str, dict[str, Any]], only_known: bool) -> dict[str, Any]:
    """The options of a group at the step of the state."""
    names = [name for name in group.names if name in values]
    own = [unboxed(values[name]) for name in names]
    found: dict[str, Any] = {}
    for key in [key for key in (own[0] if own else ()) if key in live or not only_known]:
        plain = [_plain(key, each[key], live[key]) if key in live else copied(tree_detach(each[key])) for each in own]
        if not all(same(value, plain[0]) for value in plain):
            raise HyperparameterError(
                f"`{key}` differs between {listed(names)}, which are one parameter group in torch; make the optimizer "
                "with a group for each value"
            )
        found[key] = plain[0]
    found.pop("initial_accumulator_value", None)  # of use before the first step only, and torch has used it by then
    return found


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
