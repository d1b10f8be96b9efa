"""The state of an optimizer of many tasks: what of it is shared, and what each task has of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._task_trees import Mark, Tasks, all_marked, count_tasks, from_marks, joined, marked, shared
from ._tasks import Mapper
from ._transforms import transforming
from ._tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from .optim import Optimizer, OptState
from .optim._checked import is_rule
from .optim._hyperparameters import PerTask, has, is_schedule

__all__: list[str] = []


class Together(NamedTuple):
    """The state of one of our own rules, shared but for slots that are like the parameters: its step keeps it so."""

    state: OptState

    def expanded(self, tasks: int) -> OptState:
        common = shared(self.state._replace(slots={})).expanded(tasks)
        return common._replace(slots=self.state.slots)


def together(optimizer: Optimizer, opt_state: Tasks, params: Any) -> Tasks | Together:
    """The state as one for all tasks, where each step of the optimizer can be one for all tasks."""
    state, marks = opt_state.tree, marked(opt_state)
    if not isinstance(marks, OptState) or not optimizer.elementwise or not is_rule(optimizer) or schedules_of(state):
        return opt_state
    own = True in opt_state.mapped and any(m.mapped for m in tree_leaves((marks.step, marks.hyperparameters)))
    fits = like_parameters(state.slots, [leaf.shape for leaf in tree_leaves(params)])
    return Together(state) if fits and not own else opt_state


def schedules_of(state: Any) -> list[str]:
    """The hyperparameters that a callable of the step gives, in whole or for some parameters."""
    if not isinstance(state, OptState):
        return []
    return [name for name, spec in state.hyperparameters.items() if has(spec, is_schedule)]


def same_leaves(tree: Any, other: Any) -> bool:
    (leaves, spec), (others, other_spec) = tree_flatten(tree), tree_flatten(other)
    return spec == other_spec and all(a is b for a, b in zip(leaves, others, strict=True))


def like_parameters(slots: Any, shapes: list[torch.Size]) -> bool:
    """Whether each slot has one tensor for each parameter, of its shape."""
    return isinstance(slots, dict) and all(
        [getattr(leaf, "shape", None) for leaf in tree_leaves(tree)] == shapes for tree in cast("Any", slots).values()
    )


class HandingOn:
    """A step of an optimizer, for one task, which notes what of the state it hands on as it is."""

    def __init__(self, step: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
        self._step = step
        self._same: list[bool] | None = None

    def __call__(self, params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        new_params, new_state = self._step(params, grads, state)
        if not torch.compiler.is_compiling():
            (old, spec), (new, other) = tree_flatten(state), tree_flatten(new_state)
            same = [a is b for a, b in zip(old, new, strict=True)] if spec == other else []
            self._same = same if self._same is None else [a and b for a, b in zip(same, self._same, strict=False)]
        return new_params, new_state

    def kept(self, old: Tasks, new: Tasks) -> Tasks:
        """The new state of all tasks, with the old tensors where each task has handed them on: modes know them so."""
        if not self._same or len(self._same) != len(new.leaves) or old.spec != new.spec:
            return new
        pairs = zip(self._same, marks_of(old), marks_of(new), strict=True)
        chosen = [before if same else after for same, before, after in pairs]
        return Tasks([mark.leaf for mark in chosen], [mark.mapped for mark in chosen], new.spec)


def marks_of(tasks: Tasks) -> list[Mark]:
    return [Mark(*pair) for pair in zip(tasks.leaves, tasks.mapped, strict=True)]


def unwrapped(tasks: Tasks) -> Tasks:
    """`per_task` hyperparameters as leaves with a task dimension."""
    if not any(isinstance(leaf, PerTask) for leaf in tasks.leaves):
        return tasks
    marks = [
        all_marked(leaf.tree, True) if isinstance(leaf, PerTask) else Mark(leaf, mapped)
        for leaf, mapped in zip(tasks.leaves, tasks.mapped, strict=True)
    ]
    return from_marks(tree_unflatten(tasks.spec, marks))


def shared_step(tasks: Tasks) -> Tasks:
    """The step count as one number where all tasks agree on it, as they do in the state of an earlier run."""
    if True not in tasks.mapped:
        return tasks
    state = marked(tasks)
    mark: Any = state.step if isinstance(state, OptState) else None
    if mark is None or not mark.mapped or transforming() or not bool((mark.leaf == mark.leaf[0]).all()):
        return tasks
    return from_marks(state._replace(step=Mark(mark.leaf[0], False)))


def initial_state(optimizer: Optimizer, params: Tasks) -> Tasks:
    """The state of parameters that have a task dimension."""
    count = count_tasks(params=params)
    if count is None:  # `init` made no state of shared ones
        return shared(None)
    return unwrapped(Mapper(count)(optimizer.init, joined(params), optimizer.init))


def expanded_slots(opt_state: Tasks, tasks: int) -> Tasks:
    """The state with its slots per task; what an unknown state holds is per task altogether."""
    state = marked(opt_state)

    def expanded(mark: Mark) -> Mark:
        if mark.mapped or not isinstance(mark.leaf, Tensor):
            return mark
        return Mark(mark.leaf.expand(tasks, *mark.leaf.shape), True)

    if isinstance(state, OptState):
        return from_marks(state._replace(slots=tree_map(expanded, state.slots)))
    return from_marks(tree_map(expanded, state))
