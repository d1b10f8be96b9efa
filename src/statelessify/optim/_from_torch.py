"""Optimizers of torch as pure ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import HyperparameterError, OptimizerError
from ._adadelta import adadelta
from ._adafactor import adafactor
from ._adagrad import adagrad
from ._adam import adam, adamw
from ._adamax import adamax
from ._asgd import asgd
from ._foreign import foreign, is_not_plain, plain
from ._held import Group, Held, groups_of, trainable
from ._hyperparameters import has
from ._muon import muon
from ._nadam import nadam
from ._optimizer import Optimizer, OptState
from ._radam import radam
from ._rmsprop import rmsprop
from ._rprop import rprop
from ._rule import Rule
from ._sgd import sgd

__all__ = ["from_torch"]

_RULES: dict[type[torch.optim.Optimizer], Callable[..., Optimizer]] = {
    torch.optim.Adadelta: adadelta,
    torch.optim.Adafactor: adafactor,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adam: adam,
    torch.optim.Adamax: adamax,
    torch.optim.AdamW: adamw,
    torch.optim.ASGD: asgd,
    torch.optim.Muon: muon,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Rprop: rprop,
    torch.optim.SGD: sgd,
}
_REFUSED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "evaluates the loss several times within a step, and a pure step is given one gradient; use "
    "`optim.adam`, or `optim.sgd` with more steps",
    torch.optim.SparseAdam: "is for sparse gradients, and gradients here are dense; use `optim.adam`, which also moves "
    "the entries that have none",
}
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})  # how torch computes, not what


def from_torch(
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer], *, module: nn.Module | None = None, **options: Any
) -> Optimizer:
    """Make a torch optimizer a pure one: a rule of `statelessify.optim` for torch's own, else its own step.

    Args:
        optimizer: a live optimizer, whose state is copied, so that `init` gives the state it has now; or a class.
            Parameters that it does not hold, and frozen ones, stay as they are.
        module: the module whose parameters a live optimizer holds: names come from it by identity. Without it the
            optimizer needs names of its own (one made from `named_parameters`).
        options: hyperparameters for the class, or in place of those that the live optimizer has (a learned `lr`);
            `statelessify.optim` lists what each may be.

    Returns:
        An `Optimizer`. SGD and Muon do not count their steps: with a warm buffer, `step` begins at 1.
        A third-party optimizer runs its real step on substituted tensors. Where that would lose a derivative which is
        asked for (a step under `torch.no_grad`, `.data`, `.item()`), its step raises `DerivativeError`.

    Raises:
        OptimizerError: an optimizer without a pure form, or with step hooks; the message says what to use instead.
        NamesError: a parameter that has no name, or is not the module's.

    Example:
        >>> from statelessify import optim, stateless
        >>> net = torch.nn.Linear(2, 1)
        >>> warm = optim.from_torch(torch.optim.Adam(net.parameters(), lr=0.1), module=net)
        >>> warm.init(stateless(net).params).hyperparameters["lr"]
        0.1
    """
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    if not issubclass(cls, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptimizerError(f"`from_torch` takes an optimizer of torch or a class of them, not {cls.__name__}")
    for refused, reason in _REFUSED.items():
        if issubclass(cls, refused):
            raise OptimizerError(f"{cls.__name__} has no pure form: it {reason}")
    options = {name: value for name, value in options.items() if name not in _IMPLEMENTATION}
    make = rule_of(cls)
    if isinstance(optimizer, type):
        if make is None:
            return foreign(cls, None, options)
        return make(**(options if cls in _RULES else _options_of(cls, make, options)))
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise OptimizerError(
            f"this {cls.__name__} has step hooks, which a pure step does not run; remove them, and do their work in "
            "`grad_transform` or in an `optim.Optimizer` around this one"
        )
    groups = groups_of(optimizer, module)
    if make is None:
        return foreign(cls, (optimizer, groups), options)
    shapes = trainable(groups)
    known = inspect.signature(make).parameters
    states = _snapshot(optimizer, groups)
    if isinstance(optimizer, torch.optim.Adagrad):  # which is given the value beside its groups, and uses it at once
        groups = [group._replace(options=_with_start(group, states)) for group in groups]
    specs = {name: spec for name, spec in _joined(groups, shapes).items() if name in known}
    rule = cast("Rule", cast("Any", make(**{**specs, **options}).init).__self__)
    return Held(shapes, _Warm(rule, states).init, rule.step).optimizer(
        rule.elementwise and not rule.scalars and len({count for count, _ in states.values()}) == 1
    )


def rule_of(cls: type[torch.optim.Optimizer]) -> Callable[..., Optimizer] | None:
    """The rule of a class; also of a subclass that steps as the class does."""
    for base in cls.__mro__:
        if base in _RULES:
            same = all(
                inspect.unwrap(getattr(cls, method)) is inspect.unwrap(getattr(base, method))
                for method in ("step", "_init_group")
            )
            return _RULES[base] if same else None
    return None


def _options_of(cls: type[torch.optim.Optimizer], make: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options of a subclass, whose constructor may have defaults of its own."""
    example = cls([torch.zeros(1, 1)], **{name: plain(spec) for name, spec in options.items()}).param_groups[0]
    known = inspect.signature(make).parameters
    for name, spec in options.items():
        changed = name in example and not same(example[name], plain(spec))
        if (changed or name not in known) and has(spec, is_not_plain):
            raise HyperparameterError(
                f"{cls.__name__} makes something else of `{name}`, where a tensor, a dict or a schedule would not be "
                "seen; pass one plain number"
            )
    special = {name: spec for name, spec in options.items() if has(spec, is_not_plain)}
    return {name: special.get(name, value) for name, value in example.items() if name in known}


# From torch --------------------------------------------------------------------------------------------------------


def _joined(groups: list[Group], held: dict[str, Any]) -> dict[str, Any]:
    """The options of all groups: one value where they agree, else one for each parameter that is held."""
    columns: dict[str, dict[str, Any]] = {}
    for group in groups:
        for key, value in group.options.items():
            columns.setdefault(key, {}).update({name: _kept(value) for name in group.names if name in held})
    found: dict[str, Any] = {}
    for key, column in columns.items():
        first = next(iter(column.values()), None)
        if column:
            found[key] = first if all(same(first, value) for value in column.values()) else column
    return found


def _with_start(group: Group, states: dict[str, tuple[int, dict[str, Tensor]]]) -> dict[str, Any]:
    """The options of a group with the accumulator that its parameters begin with."""
    starts = [states[name][1]["sum"] for name in group.names if states[name][0] == 0 and "sum" in states[name][1]]
    values = {start.real.flatten()[0].item() for start in starts if start.numel()}
    return {**group.options, "initial_accumulator_value": values.pop()} if len(values) == 1 else group.options


def _kept(value: Any) -> Any:
    """A tensor that a scheduler may write into is copied, one that is learned is the very same."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_kept, cast("list[Any]", value)))
    if isinstance(value, Tensor) and not value.requires_grad:
        return value.detach().clone().reshape(()) if value.numel() == 1 else value.detach().clone()
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(cast("Any", a)) == len(cast("Any", b)) and all(map(same, cast("Any", a), cast("Any", b)))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and not a.requires_grad and torch.equal(a, b))
    return a is b or bool(a == b)


def _snapshot(optimizer: torch.optim.Optimizer, groups: list[Group]) -> dict[str, tuple[int, dict[str, Tensor]]]:
    """The step count and the slots of each parameter that has a state; those without one have not moved yet."""
    found: dict[str, tuple[int, dict[str, Tensor]]] = {}
    for group in groups:
        for name, p in zip(group.names, group.params, strict=True):
            own = cast("dict[str, Any]", optimizer.state.get(p, {}))
            slots = {
                slot: value.detach().clone()
                for slot, value in own.items()
                if isinstance(value, Tensor) and slot != "step"
            }
            counted = own.get("step", 1 if slots else 0)
            found[name] = int(counted), slots
    return found


@dataclass(eq=False)
class _Warm:
    """A rule that begins where a torch optimizer stood."""

    rule: Rule
    states: dict[str, tuple[int, dict[str, Tensor]]]

    def init(self, params: dict[str, Tensor]) -> OptState:
        state = self.rule.init(params)
        slots: dict[str, dict[str, Tensor]] = {slot: dict(tree) for slot, tree in state.slots.items()}
        shared: dict[tuple[str, float], Tensor] = {}  # scalars that agree are one tensor
        for name, leaf in params.items():
            count, own = self.states[name]
            for slot in own.keys() & slots.keys() if count else ():
                value = own[slot]
                if slot in self.rule.scalars:
                    slots[slot][name] = shared.setdefault((slot, value.item()), value)
                else:
                    slots[slot][name] = value.to(leaf.device, leaf.dtype)
        counts = {name: self.states[name][0] for name in params}
        if len(set(counts.values())) > 1:
            steps = {count: torch.tensor(count) for count in counts.values()}
            slots["step"] = {name: steps[count] for name, count in counts.items()}
        step = torch.tensor(max(counts.values(), default=0))
        return OptState(step, state.hyperparameters, slots)
