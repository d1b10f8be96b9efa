"""Third-party optimizers: their real step, run on substituted tensors, and watched for derivatives that it loses."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .._transforms import transforming, unseen, unwrapped
from .._tree import same_static, tree_detach, tree_leaves, tree_map
from .._words import listed, nearest
from ..errors import (
    DerivativeError,
    HyperparameterError,
    HyperparameterNameError,
    NamesError,
    OptimizerError,
    TreeError,
)
from ._container import Hyperparameters, replaced
from ._given import Names, gradients_of, require_state
from ._held import Group, Held, trainable
from ._hyperparameters import PerTask, at_step, by_parameter, check_fits, has, is_schedule
from ._optimizer import Optimizer, OptState
from ._parts import (
    Options,
    Partition,
    Parts,
    alike,
    assembled,
    changed_options,
    columns_of,
    copied,
    joined,
    put_rest_,
    taken_apart,
    unboxed,
)
from ._tried import require_derivatives
from ._watch import Watch, carries

__all__: list[str] = []

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_REST = "(optimizer)"  # the slot for what an optimizer keeps beside the states of its parameters


def foreign(
    cls: type[torch.optim.Optimizer], live: tuple[torch.optim.Optimizer, list[Group]] | None, options: dict[str, Any]
) -> Optimizer:
    """Any `torch.optim.Optimizer` as a pure one."""
    _, *needed = inspect.signature(inspect.unwrap(cls.step)).parameters.values()
    needed = [each.name for each in needed if each.default is each.empty and each.kind not in _VARIADIC]
    if needed:
        raise OptimizerError(
            f"{cls.__name__} has no pure form: its step needs {listed(needed)}, and a pure step is given gradients; "
            "use a rule of `statelessify.optim`"
        )
    if live is None:
        parameters = inspect.signature(cls).parameters
        open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        _refuse_unknown(cls, options, () if open_ended else list(parameters)[1:])
        inner, shapes = _Foreign(cls, options, None), None
    else:
        optimizer, groups = live
        _refuse_unknown(cls, options, groups[0].options if groups else ())
        named = {id(p): name for group in groups for name, p in zip(group.names, group.params, strict=True)}
        inner, shapes = _Foreign(cls, options, copied(taken_apart(optimizer, named))), trainable(groups)
    return Held(shapes, inner.init, inner.step).optimizer(elementwise=False)


def _refuse_unknown(cls: type, options: Iterable[str], known: Iterable[str]) -> None:
    for name in options:
        if known and name not in known:
            raise HyperparameterNameError(
                f"{cls.__name__} has no `{name}`{nearest(name, known)}; it has {listed(known)}"
            )


def require_own(state: Any, name: str) -> None:
    """Refuse what is not the state of this very foreign optimizer."""
    require_state(state, name)
    if _REST not in state.slots:
        raise TreeError(f"the state is not one of {name}; pass what `init` or `step` gave")


def put_back_(optimizer: torch.optim.Optimizer, groups: list[Group], state: OptState) -> None:
    """Write a state into the live optimizer that it came from."""
    require_own(state, type(optimizer).__name__)
    known = {name for names in state.slots[_REST]["partition"].groups for name in names}
    held = [name for group in groups for name, p in zip(group.names, group.params, strict=True) if p.requires_grad]
    if missing := [name for name in held if name not in known]:
        raise NamesError(f"the state has no {listed(missing)}, which the optimizer holds; pass its own state")
    columns = {slot: column for slot, column in state.slots.items() if slot != _REST}
    for group in groups:
        for name, p in zip(group.names, group.params, strict=True):
            own = {slot: copied(tree_detach(column[name])) for slot, column in columns.items() if name in column}
            if own or p in optimizer.state:
                optimizer.state[p] = own
    put_rest_(optimizer, copied(tree_detach(state.slots.get(_REST, {}).get("attributes", {}))))


def _nothing() -> list[bool]:
    return []


@dataclass(eq=False)
class _Foreign:
    """`init` and `step` on a flat dict of parameters.

    Attributes:
        cls: the class of the optimizer.
        given: hyperparameters of the user, in any form.
        live: what a live optimizer consists of.
        tried: not empty once the derivatives of the step have been tried.
    """

    cls: type[torch.optim.Optimizer]
    given: dict[str, Any]
    live: Parts | None
    tried: list[bool] = field(default_factory=_nothing)

    def init(self, params: dict[str, Tensor]) -> OptState:
        parts = self._constructed(params) if self.live is None else self.live
        options = joined([group for group in parts.groups if any(name in params for name in group.names)], params)
        for key, spec in self.given.items():
            check_fits(key, spec, list(params), [leaf.shape for leaf in params.values()])
            if key not in options and has(spec, is_not_plain):
                raise HyperparameterError(
                    f"{self.cls.__name__} does not keep `{key}` in its parameter groups, so that it has to be plain"
                )
        options |= {key: spec for key, spec in self.given.items() if key in options}
        partition = tuple(tuple(name for name in group.names if name in params) for group in parts.groups)
        states = {name: own for name, own in parts.states.items() if name in params}
        rest = {"partition": Partition(partition), "attributes": parts.rest}
        slots = {**columns_of(states), _REST: rest}
        step = torch.zeros((), dtype=torch.int64)
        return OptState(step, Hyperparameters(options, self.cls.__name__), copied(slots))

    def _trial(self) -> _Foreign:
        """The same, whose steps are not tried again."""
        return _Foreign(self.cls, self.given, self.live, [True])

    def init_with(self, params: dict[str, Tensor], given: dict[str, Any]) -> OptState:
        """The state of an optimizer made with other hyperparameters."""
        return _Foreign(self.cls, {**self.given, **given}, self.live).init(params)

    def _constructed(self, params: dict[str, Tensor]) -> Parts:
        """A new optimizer; what may not be plain now is put into its groups at each step."""
        seen = not any(map(is_functorch_wrapped_tensor, params.values()))
        stand_ins = {name: leaf.detach().clone() if seen else _zeros(leaf) for name, leaf in params.items()}
        optimizer = self.cls(list(stand_ins.values()), **{key: plain(spec) for key, spec in self.given.items()})
        parts = taken_apart(optimizer, {id(leaf): name for name, leaf in stand_ins.items()})
        for key in [key for key, spec in self.given.items() if has(spec, is_not_plain)]:
            self._require_in_groups(key, parts, stand_ins)
        for name, own in parts.states.items():
            held = [value for value in tree_leaves(own) if isinstance(value, Tensor)]
            copies = [value for value in held if value.shape == params[name].shape and value.any()]
            if any(not seen or torch.equal(value, stand_ins[name]) for value in copies):
                raise OptimizerError(
                    f"{self.cls.__name__} copies `{name}` when it is made, and would not see its derivative; make it "
                    "outside of transforms, under `torch.no_grad()`, or use a rule of `statelessify.optim`"
                )
        return parts

    def _require_in_groups(self, key: str, parts: Parts, stand_ins: dict[str, Tensor]) -> None:
        """Refuse what is not plain where the constructor makes something else of it than an option of that name."""
        other = {name: plain(spec) for name, spec in self.given.items()}
        other[key] = tree_map(_nudged, other[key])
        optimizer = self.cls(list(stand_ins.values()), **other)
        nudged = taken_apart(optimizer, {id(leaf): name for name, leaf in stand_ins.items()})
        options = [(a.options, b.options) for a, b in zip(parts.groups, nudged.groups, strict=True)]
        for before, after in [(parts.rest, nudged.rest), *options]:
            for name in [name for name in after if name not in (key, "defaults") and _is_numbers(after[name])]:
                if not same_static(before.get(name), after[name]):
                    raise HyperparameterError(
                        f"{self.cls.__name__} makes `{name}` of `{key}`, where a tensor, a dict or a schedule would "
                        "not be seen; pass one plain number"
                    )

    def _require_fit(self, params: dict[str, Tensor], grads: dict[str, Any], state: OptState) -> None:
        with unseen():
            gradients_of(Names(params), list(params.values()), [leaf.shape for leaf in params.values()], None, grads)
        require_own(state, self.cls.__name__)
        known = {name for group in state.slots[_REST]["partition"].groups for name in group}
        if known != params.keys():
            raise TreeError(
                f"the state is that of the parameters {listed(sorted(known))}, not of {listed(params)}; pass a state "
                "of these parameters"
            )

    def step(
        self, params: dict[str, Tensor], grads: dict[str, Any], state: OptState
    ) -> tuple[dict[str, Tensor], OptState]:
        if forward_ad._current_level >= 0:
            raise DerivativeError(
                f"the step of {self.cls.__name__} is foreign code, through which forward mode is not checked; use "
                "reverse mode, or a rule of `statelessify.optim`"
            )
        self._require_fit(params, grads, state)
        names, specs, rest = list(params), dict(state.hyperparameters), state.slots[_REST]
        for key in [key for key in self.given if key in specs and has(specs[key], is_schedule)]:
            specs[key] = at_step(specs[key], state.step)
            check_fits(key, specs[key], names, [leaf.shape for leaf in params.values()])
        values = dict(zip(names, by_parameter(specs, lambda: names, len(names)), strict=True))
        columns = {slot: column for slot, column in state.slots.items() if slot != _REST}
        recording = torch.is_grad_enabled() and any(
            map(carries, tree_leaves((params, grads, columns, specs, rest["attributes"])))
        )
        if recording and not self.tried:
            given = {key: specs[key] for key in self.given if key in specs}
            require_derivatives(self.cls.__name__, self._trial().step, self._trial().init_with, params, given)
            self.tried.append(True)

        own = {name: leaf.clone() for name, leaf in params.items()}
        for name, leaf in own.items():
            leaf.grad = torch.zeros_like(leaf) if grads[name] is None else grads[name].clone()
        kinds = [kind for part in rest["partition"].groups for kind in alike(part, values)]
        groups = [Options(kind, copied(unboxed(values[kind[0]]))) for kind in kinds]
        attributes = copied(rest["attributes"])
        if "defaults" in attributes:  # where an optimizer may read them too
            known = groups[0].options if len(groups) == 1 else dict.fromkeys(specs, _Several())
            attributes["defaults"].update({key: known[key] for key in self.given if key in known})
        if recording:  # torch's own switch, which its subclasses have
            for options in (attributes.get("defaults", {}), *(group.options for group in groups)):
                options.update({key: True for key in ("differentiable",) if key in values[names[0]]})
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            optimizer = assembled(self.cls, groups, own, columns, attributes)
            if recording and not transforming():  # what is saved may be written in place later: keep a copy of it
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, _as_it_is))
            stack.enter_context(Watch(self.cls.__name__, list(own.values()), recording))
            optimizer.step()
        parts = taken_apart(optimizer, {id(leaf): name for name, leaf in own.items()})
        originals = [values[kind[0]] for kind in kinds]
        changed = [changed_options(*each) for each in zip(parts.groups, groups, originals, strict=True)]
        hyperparameters = replaced(state.hyperparameters, joined(changed, params))
        slots = {**columns_of(parts.states), _REST: {"partition": rest["partition"], "attributes": parts.rest}}
        return own, OptState(state.step + 1, hyperparameters, slots)


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


class _Several:
    """What stands in the defaults of an optimizer whose groups differ; nothing can be computed with it."""


def _is_numbers(value: Any) -> bool:
    values = cast("tuple[Any, ...]", value) if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(each, (int, float)) for each in values)


def _nudged(value: Any) -> Any:
    return value * 0.99 if isinstance(value, float) else value


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def is_not_plain(value: Any) -> bool:
    return isinstance(value, (Tensor, dict, PerTask)) or is_schedule(value)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
