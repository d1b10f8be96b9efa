"""From an update rule for one leaf to an `Optimizer` over trees: checks, hyperparameters, and leaves done together.

Leaves of one shape that share their hyperparameters are stacked and updated as one tensor: for small leaves the cost
of a step is the number of operations, not their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .._transforms import transforming
from .._tree import require_floating, tree_flatten, tree_names, tree_unflatten
from ..errors import TreeError
from ..typing import Tree
from ._arithmetic import wide
from ._container import checked, is_checked
from ._given import Names, gradients_of, leaves_of, require_options, shapes_of
from ._hyperparameters import (
    Range,
    Ranges,
    at_step,
    by_parameter,
    check_fits,
    check_flag,
    check_ranges,
    has,
    is_nonzero,
    is_schedule,
)
from ._optimizer import Optimizer, OptState

__all__: list[str] = []

Slots = dict[str, Tensor]
"""What a rule remembers of one leaf, by slot."""

Values = dict[str, Any]
"""The hyperparameters and switches of one leaf at one step."""


class Coefficients(NamedTuple):
    """What all leaves with the same hyperparameters share in a step.

    Attributes:
        values: what the update reads.
        scalars: the new values of the scalar slots.
    """

    values: Any
    scalars: Slots = {}  # noqa: RUF012


Prepare = Callable[[Values, Any, Slots], Coefficients]
"""``prepare(hyperparameters, t, scalars)`` at step ``t = 1, 2, ...``, an int, or a tensor inside a transform."""

Update = Callable[[Tensor, Tensor, Slots, Any], tuple[Tensor, Slots]]
"""``update(param, grad, slots, coefficients) -> (param, slots)`` for one leaf, or several of one shape, stacked."""

STACKED = 4  # as many leaves are worth the copies into one tensor and out of it
SMALL = 2**14  # entries of a leaf; above, an operation costs more than its launch


def _nothing() -> dict[str, Any]:
    return {}


def _accept(name: str, leaf: Tensor) -> None: ...


@dataclass(eq=False)  # not frozen: dynamo, which may trace its making, cannot follow that
class Rule:
    """An update rule; its `init` and `step` are those of an `Optimizer`.

    Attributes:
        name: as in `statelessify.optim`.
        prepare: the arithmetic on hyperparameters.
        update: the arithmetic on leaves.
        hyperparameters: name -> specification, as the user gave it.
        switches: name -> truth value, or one for each parameter; they choose an arithmetic and are no numbers.
        ranges: the values that a number may have, where these are not just 0 and above.
        slots: the names of the tensors that are like the parameter, zero at first.
        scalars: the names of the 0-dim tensors of each parameter, zero at first.
        choices: name -> what else is chosen for all parameters, such as a dtype.
        whole: the names of hyperparameters that are one number for each parameter, not for each entry.
        elementwise: whether no entry depends on another.
        slot_shape: ``slot_shape(slot, shape)``, for slots that are not like the parameter.
        check: ``check(name, leaf)`` refuses parameters that the rule has no meaning for.
    """

    name: str
    prepare: Prepare
    update: Update
    hyperparameters: dict[str, Any]
    switches: Mapping[str, Any] = field(default_factory=_nothing)
    ranges: Mapping[str, Ranges] = field(default_factory=_nothing)
    slots: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    choices: Mapping[str, Any] = field(default_factory=_nothing)
    whole: frozenset[str] = frozenset()
    elementwise: bool = True
    slot_shape: Callable[[str, torch.Size], Sequence[int]] | None = None
    check: Callable[[str, Tensor], None] = _accept

    def __post_init__(self) -> None:
        self._check_ranges(self.hyperparameters)
        for name, switch in self.switches.items():
            check_flag(name, switch)

    def __repr__(self) -> str:
        given = {**self.hyperparameters, **self.switches, **self.choices}
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def optimizer(self) -> Optimizer:
        return Optimizer(self.init, self.step, self.elementwise and not self.scalars)  # a scalar is for one task

    def init(self, params: Tree) -> OptState:
        require_floating(params, "params")
        leaves, spec = tree_flatten(params)
        names, shapes = tree_names(params), [leaf.shape for leaf in leaves]
        for name, leaf in zip(names, leaves, strict=True):
            self.check(name, leaf)
        self._check(self.hyperparameters, names, shapes)
        for name, value in self.switches.items():
            check_fits(name, value, names, shapes)
        columns = {slot: [torch.zeros_like(leaf) for leaf in leaves] for slot in self.slots}
        for slot, shape in self._other_shapes(shapes).items():
            columns[slot] = [leaf.new_zeros(own) for leaf, own in zip(leaves, shape, strict=True)]
        for slot in self.scalars:  # one and the same tensor for all leaves, which are so known to agree
            columns[slot] = [torch.zeros((), dtype=torch.float64)] * len(leaves)
        return OptState(
            step=torch.zeros((), dtype=torch.int64),  # on the CPU, where it can be read without waiting
            hyperparameters=checked(self.hyperparameters, self.name, shapes),
            slots={slot: tree_unflatten(spec, column) for slot, column in columns.items()},
        )

    def step(self, params: Tree, grads: Tree, state: OptState) -> tuple[Tree, OptState]:
        leaves, spec = tree_flatten(params)
        names, shapes = Names(params), shapes_of(params, leaves)
        gradients = gradients_of(names, leaves, shapes, spec, grads)
        slots = self._columns(names, shapes, spec, state)
        values = self._values(names, shapes, state)
        # Leaves with one key are updated by the same arithmetic; with the same first part, by the same numbers.
        scalars = [column for slot, column in slots.items() if slot not in self.slots]
        shared: Iterable[Any] = zip(*(map(id, column) for column in (values, *scalars)), strict=True)
        if torch.compiler.is_compiling():  # a graph with the number of an object in it would serve that object only
            shared = range(len(leaves))
        alike = [(leaf.dtype, leaf.device, leaf.requires_grad) for leaf in leaves]
        groups: dict[Any, list[int]] = {}
        for index, key in enumerate(zip(shared, alike, shapes, [g.requires_grad for g in gradients], strict=True)):
            groups.setdefault(key, []).append(index)

        work = _Work(leaves, gradients, slots)
        prepared: dict[Any, Coefficients] = {}
        for (common, (dtype, *_), *_), members in groups.items():
            first = members[0]
            known = common, dtype.is_complex
            if known not in prepared:
                count = slots["step"][first] if "step" in slots else state.step
                now = _widened(values[first], dtype.is_complex)
                found = self.prepare(now, _count(count), {slot: slots[slot][first] for slot in self.scalars})
                prepared[known] = found._replace(scalars={"step": count + 1, **found.scalars})
            coefficients = prepared[known]
            small = len(members) >= STACKED and leaves[first].numel() <= SMALL
            if small and self.elementwise and not torch.compiler.is_compiling():
                work.put_stack(members, self._on_reals(*work.stack(members, self.slots), coefficients.values))
            else:
                for index in members:
                    work.put(index, self._on_reals(*work.take(index, self.slots), coefficients.values))
            work.put_scalars(members, coefficients.scalars)
        return tree_unflatten(spec, work.leaves), OptState(
            step=state.step + 1,
            hyperparameters=checked(state.hyperparameters, self.name, shapes),
            slots={slot: tree_unflatten(spec, column) for slot, column in work.new_slots.items()},
        )

    def _on_reals(self, leaf: Tensor, gradient: Tensor, slots: Slots, coefficients: Any) -> tuple[Tensor, Slots]:
        """Complex parameters are pairs of reals, as in torch.optim."""
        if not leaf.is_complex():
            return self.update(leaf, gradient, slots, coefficients)
        pairs = {slot: _as_real(tensor) for slot, tensor in slots.items()}
        new, pairs = self.update(_as_real(leaf), _as_real(gradient), pairs, coefficients)
        return torch.view_as_complex(new), {slot: torch.view_as_complex(tensor) for slot, tensor in pairs.items()}

    def _columns(self, names: Names, shapes: list[torch.Size], spec: Any, state: OptState) -> dict[str, list[Tensor]]:
        """The leaves of each slot."""
        require_options(state, self.name, (*self.slots, *self.scalars), self.hyperparameters)
        wanted = dict.fromkeys(self.slots, shapes) | self._other_shapes(shapes)
        return {slot: leaves_of(names, spec, slot, tree, wanted.get(slot)) for slot, tree in state.slots.items()}

    def _other_shapes(self, shapes: list[torch.Size]) -> dict[str, list[torch.Size]]:
        """The shapes of slots that are not like the parameters."""
        if self.slot_shape is None:
            return {}
        return {slot: [torch.Size(self.slot_shape(slot, shape)) for shape in shapes] for slot in self.slots}

    def _values(self, names: Names, shapes: list[torch.Size], state: OptState) -> list[Values]:
        """The hyperparameters and switches of each leaf at this step."""
        specs: dict[str, Any] = dict(state.hyperparameters)
        if not is_checked(state.hyperparameters, shapes):
            self._check(specs, names(), shapes)
        now = {name: at_step(spec, state.step) for name, spec in specs.items() if has(spec, is_schedule)}
        if now:
            self._check(now, names(), shapes)
        return by_parameter({**specs, **now, **self.switches, **self.choices}, names, len(shapes))

    def _check(self, specs: dict[str, Any], names: list[str], shapes: list[torch.Size]) -> None:
        """Whether these hyperparameters are values that the rule can use on these parameters."""
        self._check_ranges(specs)
        for name, spec in specs.items():
            check_fits(name, spec, names, shapes, name in self.whole)
        if "momentum_buffer" not in self.slots and has(specs.get("momentum", 0), is_nonzero):
            raise TreeError(
                f"the state has `momentum`, but was made by `{self.name}` without, and has no buffer for it; make the "
                "optimizer with `momentum=`, if only a small one"
            )

    def _check_ranges(self, specs: dict[str, Any]) -> None:
        for name, spec in specs.items():
            check_ranges(name, spec, self.ranges.get(name, Range()))


class _Work:
    """The leaves of a step, old and new."""

    def __init__(self, leaves: list[Tensor], gradients: list[Tensor], slots: dict[str, list[Tensor]]) -> None:
        self.leaves, self._gradients, self._slots = list(leaves), gradients, slots
        self.new_slots = {slot: list(column) for slot, column in slots.items()}

    def take(self, index: int, slots: Iterable[str]) -> tuple[Tensor, Tensor, Slots]:
        return self.leaves[index], self._gradients[index], {slot: self._slots[slot][index] for slot in slots}

    def put(self, index: int, new: tuple[Tensor, Slots]) -> None:
        self.leaves[index], slots = new
        for slot, tensor in slots.items():
            self.new_slots[slot][index] = tensor

    def put_scalars(self, members: list[int], scalars: Slots) -> None:
        for slot in scalars.keys() & self.new_slots.keys():
            for index in members:
                self.new_slots[slot][index] = scalars[slot]

    def stack(self, members: list[int], slots: Iterable[str]) -> tuple[Tensor, Tensor, Slots]:
        def stacked(column: list[Tensor]) -> Tensor:
            return torch.stack([column[index] for index in members])

        return stacked(self.leaves), stacked(self._gradients), {slot: stacked(self._slots[slot]) for slot in slots}

    def put_stack(self, members: list[int], new: tuple[Tensor, Slots]) -> None:
        leaf, slots = new
        # Copies: views of one tensor could not be changed in place, and each would keep all of it alive.
        apart = cast("Callable[[Tensor], tuple[Tensor, ...]]", torch.unbind if transforming() else torch.unbind_copy)
        for index, tensor in zip(members, apart(leaf), strict=True):
            self.leaves[index] = tensor
        for slot, stack in slots.items():
            column = self.new_slots[slot]
            for index, tensor in zip(members, stack.unbind(), strict=True):
                column[index] = tensor


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


def _widened(values: Values, on_pairs: bool) -> Values:
    """Numbers in float64; where a parameter is complex, broadcast over its real and imaginary parts."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, cast("tuple[Any, ...]", value)))
        return value.unsqueeze(-1) if on_pairs and isinstance(value, Tensor) and value.ndim else wide(value)

    return {name: one(value) for name, value in values.items()}


def _count(step: Tensor) -> Any:
    """The number of the update, from 1: an int where it can be known, else a tensor."""
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(step):
        return step.to(torch.float64) + 1
    return int(step) + 1
