"""From an update rule for one leaf to an `Optimizer` over trees: checks, hyperparameters, and leaves done together.

Leaves of one shape that share their hyperparameters are stacked and updated as one tensor: for small leaves the cost
of a step is the number of operations, not their size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .._transforms import transforming, unseen
from .._tree import require_floating, tree_flatten, tree_unflatten
from ..errors import TreeError
from ..typing import Tree
from ._arithmetic import wide
from ._container import Hyperparameters, checked
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
from ._work import STACKED, ListedSlots, Slots, Work, by_kind, is_uniform, sharing

__all__: list[str] = []

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

Lists = Callable[[list[Tensor], list[Tensor], ListedSlots, Any], tuple[list[Tensor], ListedSlots]]
"""An `Update` of several leaves of any shapes, where all numbers are plain."""


def _nothing() -> dict[str, Any]:
    return {}


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
        check: ``check(name, leaf)``, if there is one, refuses parameters that the rule has no meaning for.
        lists: the update of many leaves in few operations, bit for bit that of each.
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
    check: Callable[[str, Tensor], None] | None = None
    lists: Lists | None = None

    def __post_init__(self) -> None:
        self._known: tuple[Any, list[Values]] | None = None  # what was checked last, plain numbers only
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
        names, shapes = Names(params), [leaf.shape for leaf in leaves]
        if self.check is not None:
            for name, leaf in zip(names(), leaves, strict=True):
                self.check(name, leaf)
        self._check_fits({**self.hyperparameters, **self.switches}, names, shapes)
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
        with unseen():
            names, shapes = Names(params), shapes_of(params, leaves)
            gradients = gradients_of(names, leaves, shapes, spec, grads)
            slots = self._columns(names, shapes, spec, state)
        values, hyperparameters, plain = self._values(names, shapes, state)
        done = self._advance_lists(leaves, gradients, slots, values[0], state.step) if plain and leaves else None
        if done is None:
            counts = slots.get("step", [state.step] * len(leaves))
            done = self.advance(leaves, gradients, slots, values, counts)
        leaves, slots = done
        return tree_unflatten(spec, leaves), OptState(
            step=state.step + 1,
            hyperparameters=hyperparameters,
            slots={slot: tree_unflatten(spec, column) for slot, column in slots.items()},
        )

    def advance(
        self,
        leaves: list[Tensor],
        gradients: list[Tensor],
        slots: Mapping[str, list[Any]],
        values: list[Values],
        counts: Sequence[Any],
    ) -> tuple[list[Tensor], dict[str, list[Any]]]:
        """One update of leaves that have been checked.

        `slots` are lists of the same length, `values` the hyperparameters and switches of each leaf, `counts` the
        updates that each leaf has seen, ints or tensors.
        """
        work = Work(leaves, gradients, slots)
        scalars = [column for slot, column in slots.items() if slot not in self.slots]
        for members in sharing(values, counts, *scalars):
            first = members[0]
            before = {slot: slots[slot][first] for slot in self.scalars}
            for on_pairs, own in by_kind(leaves, members):
                found = self.prepare(_widened(values[first], on_pairs), _count(counts[first]), before)
                plain = self.lists is not None and not on_pairs and is_plain(values[first]) and not transforming()
                lists = work.lists(own, self.slots) if plain else None
                if self.lists is not None and lists is not None:
                    work.put_lists(own, self.lists(*lists, found.values))
                else:
                    self._advance_each(work, own, found.values)
                work.put_scalars(own, {"step": counts[first] + 1, **found.scalars})
        return work.leaves, work.new_slots

    def _advance_lists(
        self, leaves: list[Tensor], gradients: list[Tensor], slots: ListedSlots, values: Values, step: Tensor
    ) -> tuple[list[Tensor], ListedSlots] | None:
        """`advance` where all leaves share plain numbers: nothing is to be sorted then."""
        if self.lists is None or self.scalars or "step" in slots or transforming():
            return None
        with unseen():
            if any(map(Tensor.is_complex, leaves)) or not all(map(is_uniform, (leaves, gradients, *slots.values()))):
                return None
        return self.lists(leaves, gradients, slots, self.prepare(values, _count(step), {}).values)

    def _advance_each(self, work: Work, members: list[int], coefficients: Any) -> None:
        """Update leaves that share their numbers; as one, where enough of them are alike."""
        stackable = self.elementwise and len(members) >= STACKED and not torch.compiler.is_compiling()
        for alike in work.alike(members) if stackable else [members]:
            if stackable and len(alike) >= STACKED:
                work.put_stack(alike, self._on_reals(*work.stack(alike, self.slots), coefficients))
            else:
                for index in alike:
                    work.put(index, self._on_reals(*work.take(index, self.slots), coefficients))

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

    def _values(
        self, names: Names, shapes: list[torch.Size], state: OptState
    ) -> tuple[list[Values], Hyperparameters, bool]:
        """The hyperparameters and switches of each leaf at this step, the former in their container.

        And whether they are plain numbers, shared by all leaves.
        """
        given = state.hyperparameters
        container = checked(given, self.name, shapes)
        if container is not given:
            self._check(dict(given), names, shapes)
        if self._known is not None and self._known[0] is container.seen:
            return self._known[1], container, True
        specs = {**given, **self.switches, **self.choices}
        if is_plain(specs):
            values = [specs] * len(shapes)
            if torch.compiler.is_compiling():
                return values, container, False
            self._known = container.seen, values
            return values, container, True
        now = {name: at_step(spec, state.step) for name, spec in given.items() if has(spec, is_schedule)}
        if now:
            self._check(now, names, shapes)
        return by_parameter({**specs, **now}, names, len(shapes)), container, False

    def _check(self, specs: dict[str, Any], names: Names, shapes: list[torch.Size]) -> None:
        """Whether these hyperparameters are values that the rule can use on these parameters."""
        self._check_ranges(specs)
        self._check_fits(specs, names, shapes)
        if "momentum_buffer" not in self.slots and has(specs.get("momentum", 0), is_nonzero):
            raise TreeError(
                f"the state has `momentum`, but was made by `{self.name}` without, and has no buffer for it; make the "
                "optimizer with `momentum=`, if only a small one"
            )

    def _check_fits(self, specs: Mapping[str, Any], names: Names, shapes: list[torch.Size]) -> None:
        if not is_plain(specs):  # one number fits all parameters
            for name, spec in specs.items():
                check_fits(name, spec, names(), shapes, name in self.whole)

    def _check_ranges(self, specs: dict[str, Any]) -> None:
        for name, spec in specs.items():
            check_ranges(name, spec, self.ranges.get(name, Range()))


def is_plain(values: Mapping[str, Any]) -> bool:
    """Whether all hyperparameters are numbers, none a tensor."""
    return all(isinstance(value, (bool, int, float)) for value in values.values())


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


def _widened(values: Values, on_pairs: bool) -> Values:
    """Numbers in float64; where a parameter is complex, broadcast over its real and imaginary parts."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, cast("tuple[Any, ...]", value)))
        return value.unsqueeze(-1) if on_pairs and isinstance(value, Tensor) and value.ndim else wide(value)

    return {name: one(value) for name, value in values.items()}


def _count(step: Any) -> Any:
    """The number of the update, from 1: an int where it can be known, else a tensor."""
    if isinstance(step, Tensor) and (torch.compiler.is_compiling() or is_functorch_wrapped_tensor(step)):
        return step.to(torch.float64) + 1
    return int(step) + 1
