"""The optimizers of torch.optim as differentiable ones: the rules of `statelessify.optim` on parameter groups."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ... import optim
from ...optim._rule import Lists, Rule, is_plain
from ...optim._work import is_uniform
from ._differences import differs
from ._optimizer import DifferentiableOptimizer
from .utils import flatten

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdafactor",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableMuon",
    "DifferentiableNAdam",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
]


@cache
def _names(make: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(make).parameters)


class RuleOptimizer(DifferentiableOptimizer):
    """A rule of `statelessify.optim`; its hyperparameters are the entries of each group, numbers or tensors."""

    make: ClassVar[Callable[..., optim.Optimizer]]
    _keeps_shapes = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known = _names(type(self).make)
        self._rules: dict[int, tuple[list[Any], tuple[Rule, dict[str, Any], Lists | None]]] = {}

    def _update(self, grouped_grads: Sequence[Sequence[Tensor | None]], **kwargs: Any) -> None:
        with nullcontext() if self._recording() else torch.no_grad():
            for index, grads in enumerate(grouped_grads):
                self._update_group(index, grads)

    def _update_group(self, index: int, grads: Sequence[Tensor | None]) -> None:
        params, states = self.param_groups[index]["params"], self.state[index]
        rule, values, at_once = self._rule(index)
        places = [place for place, grad in enumerate(grads) if grad is not None]
        leaves: list[Tensor] = [params[place] for place in places]
        gradients = [g if g.layout is torch.strided else g.to_dense() for g in grads if g is not None]
        if rule.check is not None:
            for place, leaf in zip(places, leaves, strict=True):
                rule.check(f"{place}` of group `{index}", leaf)
        if at_once is not None and leaves and is_uniform(leaves) and is_uniform(gradients):
            new, _ = at_once(leaves, gradients, {}, values)
            slots, counts = {}, ()
        else:
            known: list[dict[str, Any]] = [states[place] for place in places]
            slots = {
                slot: [_slot(rule, slot, *pair) for pair in zip(known, leaves, strict=True)] for slot in rule.slots
            }
            start = torch.zeros((), dtype=torch.float64)  # one for all: leaves that share it are known to agree
            slots |= {s: [torch.as_tensor(own[s]) if s in own else start for own in known] for s in rule.scalars}
            counts = [_count(rule, own) for own in known]
            new, slots = rule.advance(leaves, gradients, slots, [values] * len(leaves), counts)
        for row, place in enumerate(places):
            params[place] = new[row]
            if slots:
                before = states[place].get("step")
                step = before + 1 if isinstance(before, Tensor) else counts[row] + 1
                count = {} if rule.name in _UNCOUNTED else {"step": step}
                states[place] = {**count, **{slot: column[row] for slot, column in slots.items()}}

    def _rule(self, index: int) -> tuple[Rule, dict[str, Any], Lists | None]:
        """The rule with a group's hyperparameters, and their values; anew only where one of them is another object.

        The last is its update on lists, where nothing is remembered and all numbers are plain.
        """
        group = self.param_groups[index]
        given = [group.get(name) for name in self._known]
        if index in self._rules:
            before, found = self._rules[index]
            if all(map(operator.is_, given, before)):
                return found
        rule = _made(type(self).make, {name: _one_number(group[name]) for name in self._known if name in group})
        values = {**rule.hyperparameters, **rule.switches, **rule.choices}
        if "initial_accumulator_value" in values:
            values["initial_accumulator_value"] = 0  # torch has added it where it made the state
        _note_differences(rule)
        at_once = rule.lists if not rule.slots and is_plain(values) else None
        if not any(map(_is_unsteady, given)):
            self._rules[index] = given, (rule, values, at_once)
        return rule, values, at_once


def _is_unsteady(value: Any) -> bool:
    """Whether a hyperparameter may become another one and stay the same object: a list, or what a view is taken of."""
    if isinstance(value, (list, tuple)):
        return isinstance(value, list) or any(map(_is_unsteady, cast("tuple[Any, ...]", value)))
    return isinstance(value, Tensor) and value.ndim > 0


def _made(make: Callable[..., Any], options: dict[str, Any]) -> Rule:
    """The rule with these options; the same one again where they are plain, as in most inner loops."""
    if all(value is None or isinstance(value, (bool, int, float, str)) for value in flatten(options)):
        return _made_once(make, *[(name, repr(value), value) for name, value in options.items()])
    return make(**options).init.__self__


@lru_cache(maxsize=128)
def _made_once(make: Callable[..., Any], *options: tuple[str, str, Any]) -> Rule:
    return make(**{name: value for name, _, value in options}).init.__self__


_UNCOUNTED = ("sgd", "muon")  # torch keeps no count of their steps: a momentum buffer says that there has been one


def _count(rule: Rule, state: dict[str, Any]) -> int:
    if rule.name in _UNCOUNTED:
        return int(state.get("momentum_buffer") is not None)
    return int(state.get("step", 0))


def _slot(rule: Rule, slot: str, state: dict[str, Any], leaf: Tensor) -> Tensor:
    if state.get(slot) is not None:
        return state[slot]
    return (
        torch.zeros_like(leaf) if rule.slot_shape is None else leaf.new_zeros(tuple(rule.slot_shape(slot, leaf.shape)))
    )


def _one_number(value: Any) -> Any:
    """A hyperparameter as the rules take it: pairs are tuples, and a tensor with one entry is a number."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_one_number, cast("list[Any]", value)))
    return value.reshape(()) if isinstance(value, Tensor) and value.ndim and value.numel() == 1 else value


def _note_differences(rule: Rule) -> None:
    values = rule.hyperparameters
    if rule.switches.get("maximize") is True:
        differs("maximize")
    if rule.name == "adam":
        differs("eps")
        if any(isinstance(beta, Tensor) for beta in values["betas"]):
            differs("betas")
    if rule.name == "asgd" and any(isinstance(values[name], Tensor) for name in ("lr", "lambd", "alpha")):
        differs("asgd")
    if isinstance(values.get("momentum"), Tensor) and float(values["momentum"].detach()) == 0:
        differs("momentum")


class DifferentiableSGD(RuleOptimizer):
    """`torch.optim.SGD`, differentiable; see `statelessify.optim.sgd`."""

    make = staticmethod(optim.sgd)


class DifferentiableAdam(RuleOptimizer):
    """`torch.optim.Adam`, differentiable; see `statelessify.optim.adam`."""

    make = staticmethod(optim.adam)


class DifferentiableAdamW(RuleOptimizer):
    """`torch.optim.AdamW`, differentiable; see `statelessify.optim.adamw`."""

    make = staticmethod(optim.adamw)


class DifferentiableNAdam(RuleOptimizer):
    """`torch.optim.NAdam`, differentiable; see `statelessify.optim.nadam`."""

    make = staticmethod(optim.nadam)


class DifferentiableRAdam(RuleOptimizer):
    """`torch.optim.RAdam`, differentiable; see `statelessify.optim.radam`."""

    make = staticmethod(optim.radam)


class DifferentiableAdamax(RuleOptimizer):
    """`torch.optim.Adamax`, differentiable; see `statelessify.optim.adamax`."""

    make = staticmethod(optim.adamax)


class DifferentiableAdagrad(RuleOptimizer):
    """`torch.optim.Adagrad`, differentiable; see `statelessify.optim.adagrad`."""

    make = staticmethod(optim.adagrad)


class DifferentiableAdadelta(RuleOptimizer):
    """`torch.optim.Adadelta`, differentiable; see `statelessify.optim.adadelta`."""

    make = staticmethod(optim.adadelta)


class DifferentiableRMSprop(RuleOptimizer):
    """`torch.optim.RMSprop`, differentiable; see `statelessify.optim.rmsprop`."""

    make = staticmethod(optim.rmsprop)


class DifferentiableASGD(RuleOptimizer):
    """`torch.optim.ASGD`, differentiable; see `statelessify.optim.asgd`."""

    make = staticmethod(optim.asgd)


class DifferentiableRprop(RuleOptimizer):
    """`torch.optim.Rprop`; its steps depend on the signs of gradients alone, and have no derivative by them."""

    make = staticmethod(optim.rprop)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warnings.warn(
            "Rprop uses the signs of gradients only: second-order gradients through it are zero", stacklevel=2
        )


class DifferentiableAdafactor(RuleOptimizer):
    """`torch.optim.Adafactor`, differentiable; see `statelessify.optim.adafactor`."""

    make = staticmethod(optim.adafactor)


class DifferentiableMuon(RuleOptimizer):
    """`torch.optim.Muon`, differentiable; see `statelessify.optim.muon`."""

    make = staticmethod(optim.muon)
