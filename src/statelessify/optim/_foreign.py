"""Third-party optimizers: their real step, run on substituted tensors, and watched for derivatives that it loses."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .._transforms import transforming, unwrapped
from .._tree import same_static, tree_detach, tree_leaves, tree_map
from .._words import listed, nearest
from ..errors import DerivativeError, HyperparameterError, HyperparameterNameError, OptimizerError
from ._container import Hyperparameters, replaced
from ._held import Group, Held, trainable
from ._hyperparameters import PerTask, at_step, by_parameter, check_fits, has, is_schedule
from ._optimizer import Optimizer, OptState
from ._watch import Watch, carries

__all__: list[str] = []

_REST = "(optimizer)"  # the slot for what an optimizer keeps beside the states of its parameters
_COMMON = frozenset({"state", "param_groups", "_zero_grad_profile_name", "_warned_capturable_if_run_uncaptured"})


class _Group(NamedTuple):
    names: list[str]
    options: dict[str, Any]


class _Parts(NamedTuple):
    """What an optimizer consists of: groups, states by parameter, and its other attributes."""

    groups: list[_Group]
    states: dict[str, dict[str, Any]]
    rest: dict[str, Any]


@dataclass(frozen=True)
class _Partition:
    """Which parameters stand in one group; no tree."""

    groups: tuple[tuple[str, ...], ...]


def foreign(
    cls: type[torch.optim.Optimizer], live: tuple[torch.optim.Optimizer, list[Group]] | None, options: dict[str, Any]
) -> Optimizer:
    """Any `torch.optim.Optimizer` as a pure one."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OptimizerError(
            f"{cls.__name__} has no pure form: its step needs a closure that evaluates the loss, and a pure step is "
            "given gradients; use a rule of `statelessify.optim`"
        )
    if live is None:
        parameters = inspect.signature(cls).parameters
        open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        _refuse_unknown(cls, options, () if open_ended else parameters)
        inner, shapes = _Foreign(cls, options, None), None
    else:
        optimizer, groups = live
        _refuse_unknown(cls, options, groups[0].options if groups else ())
        named = {id(p): name for group in groups for name, p in zip(group.names, group.params, strict=True)}
        inner, shapes = _Foreign(cls, options, _copied(_taken_apart(optimizer, named))), trainable(groups)
    return Held(shapes, inner.init, inner.step).optimizer(elementwise=False)


def _refuse_unknown(cls: type, options: Iterable[str], known: Iterable[str]) -> None:
    for name in options:
        if known and name not in known:
            raise HyperparameterNameError(
                f"{cls.__name__} has no `{name}`{nearest(name, known)}; it has {listed(known)}"
            )


def put_back_(optimizer: torch.optim.Optimizer, groups: list[Group], state: OptState) -> None:
    """Write a state into the live optimizer that it came from."""
    columns = {slot: column for slot, column in state.slots.items() if slot != _REST}
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        for name, p in zip(group.names, group.params, strict=True):
            own = {slot: _copied(tree_detach(column[name])) for slot, column in columns.items() if name in column}
            if own or p in optimizer.state:
                optimizer.state[p] = own
        for key, spec in state.hyperparameters.items():
            value = spec
            if isinstance(spec, dict) and group.names:
                value = cast("dict[str, Any]", spec).get(group.names[0], live.get(key))
            if key in live and not is_schedule(value):
                live[key] = _copied(tree_detach(value))
    vars(optimizer).update(_copied(tree_detach(state.slots.get(_REST, {}).get("attributes", {}))))


@dataclass(eq=False)
class _Foreign:
    """`init` and `step` on a flat dict of parameters.

    Attributes:
        cls: the class of the optimizer.
        given: hyperparameters of the user, in any form.
        live: what a live optimizer consists of.
    """

    cls: type[torch.optim.Optimizer]
    given: dict[str, Any]
    live: _Parts | None

    def init(self, params: dict[str, Tensor]) -> OptState:
        parts = self._constructed(params) if self.live is None else self.live
        options = _joined([group for group in parts.groups if any(name in params for name in group.names)], params)
        for key, spec in self.given.items():
            check_fits(key, spec, list(params), [leaf.shape for leaf in params.values()])
            plain = isinstance(spec, (int, float, str, tuple, list)) or spec is None
            if key not in options and not (plain and not has(spec, _is_tensor)):
                raise HyperparameterError(
                    f"{self.cls.__name__} does not keep `{key}` in its parameter groups, so that it has to be plain"
                )
        options |= {key: spec for key, spec in self.given.items() if key in options}
        partition = tuple(tuple(name for name in group.names if name in params) for group in parts.groups)
        states = {name: own for name, own in parts.states.items() if name in params}
        rest = {"partition": _Partition(partition), "attributes": parts.rest}
        slots = {**_columns(states), _REST: rest}
        step = torch.zeros((), dtype=torch.int64)
        return OptState(step, Hyperparameters(options, self.cls.__name__), _copied(slots))

    def _constructed(self, params: dict[str, Tensor]) -> _Parts:
        """A new optimizer; what may not be plain now is put into its groups at each step."""
        seen = not any(map(is_functorch_wrapped_tensor, params.values()))
        stand_ins = {name: leaf.detach().clone() if seen else _zeros(leaf) for name, leaf in params.items()}
        optimizer = self.cls(list(stand_ins.values()), **{key: plain(spec) for key, spec in self.given.items()})
        parts = _taken_apart(optimizer, {id(leaf): name for name, leaf in stand_ins.items()})
        for name, own in parts.states.items():
            held = [value for value in tree_leaves(own) if isinstance(value, Tensor)]
            copies = [value for value in held if value.shape == params[name].shape and value.any()]
            if any(not seen or torch.equal(value, stand_ins[name]) for value in copies):
                raise OptimizerError(
                    f"{self.cls.__name__} copies `{name}` when it is made, and would not see its derivative; make it "
                    "outside of transforms, under `torch.no_grad()`, or use a rule of `statelessify.optim`"
                )
        return parts

    def step(
        self, params: dict[str, Tensor], grads: dict[str, Any], state: OptState
    ) -> tuple[dict[str, Tensor], OptState]:
        if forward_ad._current_level >= 0:
            raise DerivativeError(
                f"the step of {self.cls.__name__} is foreign code, through which forward mode is not checked; use "
                "reverse mode, or a rule of `statelessify.optim`"
            )
        names, specs, rest = list(params), dict(state.hyperparameters), state.slots[_REST]
        for key in [key for key in self.given if key in specs and is_schedule(specs[key])]:
            specs[key] = at_step(specs[key], state.step)
            check_fits(key, specs[key], names, [leaf.shape for leaf in params.values()])
        values = dict(zip(names, by_parameter(specs, lambda: names, len(names)), strict=True))
        columns = {slot: column for slot, column in state.slots.items() if slot != _REST}
        recording = torch.is_grad_enabled() and any(map(carries, tree_leaves((params, grads, columns, specs))))

        own = {name: leaf.clone() for name, leaf in params.items()}
        for name, leaf in own.items():
            leaf.grad = torch.zeros_like(leaf) if grads[name] is None else grads[name].clone()
        kinds = [kind for part in rest["partition"].groups for kind in _alike(part, values)]
        groups = [_Group(kind, _copied(values[kind[0]])) for kind in kinds]
        attributes = _copied(rest["attributes"])
        if recording:  # torch's own switch, which its subclasses have
            for options in (attributes.get("defaults", {}), *(group.options for group in groups)):
                options.update({key: True for key in ("differentiable",) if key in values[names[0]]})
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            optimizer = _assembled(self.cls, groups, own, columns, attributes)
            gradients = [leaf.grad for leaf in own.values()]
            if recording and not transforming():  # what is saved may be written in place later: keep a copy of it
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, _as_it_is))
            watch = stack.enter_context(Watch(self.cls.__name__)) if recording else None
            optimizer.step()
        parts = _taken_apart(optimizer, {id(leaf): name for name, leaf in own.items()})
        if watch is not None and not transforming():
            watch.require_paths([*own.values(), *tree_leaves(parts.states)], gradients)
        changed = [_changed(*pair) for pair in zip(parts.groups, groups, strict=True)]
        hyperparameters = replaced(state.hyperparameters, _joined(changed, params))
        slots = {**_columns(parts.states), _REST: {"partition": rest["partition"], "attributes": parts.rest}}
        return own, OptState(state.step + 1, hyperparameters, slots)


def _assembled(
    cls: type[torch.optim.Optimizer],
    groups: list[_Group],
    own: dict[str, Tensor],
    columns: dict[str, dict[str, Any]],
    attributes: dict[str, Any],
) -> torch.optim.Optimizer:
    """An optimizer of these parts, made without its constructor."""
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for name, leaf in own.items():
        if entries := {slot: _copied(column[name]) for slot, column in columns.items() if name in column}:
            state[leaf] = entries
    live = [{"params": [own[name] for name in group.names], **group.options} for group in groups]
    optimizer = cls.__new__(cls)
    torch.optim.Optimizer.__setstate__(optimizer, {**attributes, "state": state, "param_groups": live})
    return optimizer


def _taken_apart(optimizer: torch.optim.Optimizer, named: dict[int, str]) -> _Parts:
    rest = {
        key: value for key, value in vars(optimizer).items() if key not in _COMMON and not key.startswith("_optimizer_")
    }
    if inner := [key for key, value in rest.items() if isinstance(value, torch.optim.Optimizer)]:
        raise OptimizerError(
            f"{type(optimizer).__name__} wraps another optimizer (`{inner[0]}`), whose parameters are not substituted; "
            "make a pure one of the inner optimizer, and an `optim.Optimizer` around it"
        )
    groups = [
        _Group(
            [named[id(p)] for p in group["params"]],
            {key: value for key, value in group.items() if key not in ("params", "param_names")},
        )
        for group in optimizer.param_groups
    ]
    states = {named[id(p)]: dict(own) for p, own in optimizer.state.items() if id(p) in named}
    return _Parts(groups, states, rest)


def _columns(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Slots by name, from states by parameter."""
    columns: dict[str, dict[str, Any]] = {}
    for name, own in states.items():
        for slot, value in own.items():
            columns.setdefault(slot, {})[name] = value
    return columns


def _joined(groups: list[_Group], params: dict[str, Tensor]) -> dict[str, Any]:
    """The options of all groups: one value where they agree, else one for each parameter."""
    columns: dict[str, dict[str, Any]] = {}
    for group in groups:
        for key, value in group.options.items():
            columns.setdefault(key, {}).update({name: value for name in group.names if name in params})
    found: dict[str, Any] = {}
    for key, column in columns.items():
        first = next(iter(column.values()))
        agree = all(same_static(value, first) for value in column.values())
        found[key] = first if agree and len(column) == len(params) else column
    return found


def _alike(names: Iterable[str], values: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The parameters of a group by their hyperparameters: each kind is a group of its own."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(id(values[name]), []).append(name)
    return list(found.values())


def _copied(tree: Any) -> Any:
    """Containers and tensors anew, anything else as it is."""
    return tree_map(_own_copy, tree)


def _own_copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _changed(after: _Group, before: _Group) -> _Group:
    """The group with the options only that its optimizer has changed; it may have written into tensors."""

    def untouched(value: Any, old: Any) -> bool:
        return value is old and value._version == 0 if isinstance(value, Tensor) else same_static(value, old)

    options = {key: value for key, value in after.options.items() if not untouched(value, before.options.get(key))}
    return _Group(after.names, options)


def plain(spec: Any) -> Any:
    """A number to construct with, in place of a specification."""
    if isinstance(spec, PerTask):
        return plain(spec.tree)
    if isinstance(spec, dict):
        return plain(next(iter(cast("dict[str, Any]", spec).values())))
    if isinstance(spec, Tensor):
        return unwrapped(spec).detach().flatten()[0].item()
    if isinstance(spec, tuple):
        return tuple(map(plain, cast("tuple[Any, ...]", spec)))
    return plain(spec(torch.zeros((), dtype=torch.int64))) if is_schedule(spec) else spec


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or is_schedule(value) or isinstance(value, (dict, PerTask))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
