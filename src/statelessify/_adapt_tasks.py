"""`adapt_tasks`: the inner loop of many tasks at once.

Only the forward loss is mapped over tasks. Its gradient is the ordinary gradient of the *summed* loss with respect to
the per-task parameters: tasks do not interact, so that is every task's own gradient. One vmap level and no functorch
gradient level: faster than ``vmap(grad(loss))``, and right to any order.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._adapt import Adapted, apart, check_loop, loss_options, outside_inference, scalar_loss
from ._compile import compiled_step, plain
from ._gradient import Gradient, Unroll, value_and_grad
from ._task_trees import (
    Mark,
    Tasks,
    all_marked,
    as_tasks,
    count_tasks,
    from_marks,
    joined,
    marked,
    per_task,
    shared,
    sliced,
)
from ._tasks import Mapper, random_state, set_random_state
from ._transforms import transforming
from ._tree import require_floating, tree_detach, tree_flatten, tree_leaves, tree_map, tree_names, tree_unflatten
from .errors import LateUseError, TaskError
from .optim import Optimizer, OptState
from .optim._checked import checked
from .optim._container import replaced
from .optim._hyperparameters import PerTask, at_step, check_fits, has, is_schedule
from .typing import Backend, Batch, GradTransform, InDims, Loss, Randomness, Tree

__all__ = ["adapt_tasks"]


def adapt_tasks(
    loss: Loss,
    params: Tree,
    batches: Batch,
    *,
    optimizer: Optimizer,
    steps: int,
    gradient: Gradient = Unroll(),  # noqa: B008
    opt_state: Any = None,
    carry: Any = None,
    grad_transform: GradTransform | None = None,
    in_dims: InDims = (None, 0),
    chunk_size: int | None = None,
    randomness: Randomness = "different",
    backend: Backend = "auto",
) -> Adapted:
    """`adapt` for many tasks at once; everything is written for one task.

    Args:
        loss: ``loss(params, batch) -> scalar`` of one task; with a carry
            ``loss(params, carry, batch) -> (scalar, carry)``.
        params: the initial parameters, shared by all tasks unless `in_dims` says otherwise.
        batches: a tree with leaves ``(tasks, ...)`` that each step uses, or a callable ``batches(step, params)`` that
            returns one, called exactly once for each step, in order, with all tasks' current parameters
            ``(tasks, ...)``, detached (at step 0 the shared ones, where the number of tasks is not known yet).
        optimizer, steps, gradient: as for `adapt`.
        opt_state: the state to start from; its tensors have the task dimension if the parameters do.
        carry: a tree that goes from step to step; its tensors have the task dimension if the parameters do.
        grad_transform: gradients of one task in, gradients of one task out.
        in_dims: the task dimensions of ``(params, batches)``, in `torch.vmap`'s form. ``0`` for the parameters goes on
            from an earlier result, or trains an ensemble.
        chunk_size: at most so many tasks at once in each step, for less memory.
        randomness, backend: as for `over_tasks`.

    Returns:
        `Adapted`, in which each tensor is ``(tasks, ...)``; `losses` is ``(tasks, steps)``.

    Raises:
        TaskError: leading dimensions differ, there are zero tasks, or nothing says how many there are.
        StatelessifyError: whatever `adapt` raises; all before the first update.

    Example:
        >>> import torch
        >>> from statelessify import adapt_tasks, optim
        >>> start = {"w": torch.zeros(2, requires_grad=True)}
        >>> fit = lambda params, target: ((params["w"] - target) ** 2).sum()
        >>> targets = torch.stack([torch.ones(2), -torch.ones(2)])
        >>> adapt_tasks(fit, start, targets, optimizer=optim.sgd(lr=0.25), steps=1).params["w"].tolist()
        [[0.5, 0.5], [-0.5, -0.5]]
    """
    check_loop(optimizer, steps, gradient)
    require_floating(params, "params")
    if isinstance(in_dims, int):
        in_dims = (in_dims, in_dims)
    if not isinstance(in_dims, (tuple, list)) or len(cast("tuple[Any, ...]", in_dims)) != 2:
        raise TaskError(f"`in_dims={in_dims!r}` is not a pair; write one entry for `params` and one for `batches`")
    params_dim, batches_dim = cast("tuple[Any, Any]", in_dims)
    with outside_inference() as own:
        initial = as_tasks(own(params), params_dim, "params")
        follow = per_task if any(initial.mapped) else shared
        fixed = None if callable(batches) else as_tasks(own(batches), batches_dim, "batches")
        known = {"params": initial, "carry": follow(own(carry))}
        if fixed is not None:
            known["batches"] = fixed
        count_tasks(**known)
        if opt_state is None:
            known["opt_state"] = _initial_state(optimizer, initial)
        else:
            known["opt_state"] = _unwrapped(follow(own(opt_state)))
        count = count_tasks(**known)
        state = _shared_step(known["opt_state"])
        first: list[Tasks] = []
        if count is None and callable(batches) and steps > 0:
            first = [as_tasks(own(batches(0, tree_detach(params))), batches_dim, "batches")]
            count = count_tasks(batches=first[0])
        if count is None:
            raise TaskError(
                "nothing says how many tasks there are: no tensor of `batches` has a task dimension; map something in "
                "`in_dims`, or use `adapt`"
            )
        run = _Run(
            plain(loss), optimizer, grad_transform, Mapper(count, backend, randomness, chunk_size), carry is not None
        )
        begin = Tasks([apart(leaf) for leaf in initial.leaves], initial.mapped, initial.spec).expanded(count)

        def batch_at(index: int, state: _State) -> Tasks:
            if fixed is not None:
                return fixed
            if index == 0 and first:
                return first[0]
            found = as_tasks(own(batches(index, tree_detach(state.params))), batches_dim, "batches")
            count_tasks(params=per_task(state.params), batches=found)
            return found

        final, losses = gradient.run(
            compiled_step(loss, run.step, batches),
            _State(begin, _expanded_slots(state, count), known["carry"]),
            batch_at,
            steps,
        )
        values = torch.stack(losses, 1) if losses else torch.zeros(count, 0, **loss_options(params))
        return Adapted(final.params, final.opt_state.expanded(count), values, final.carry.expanded(count))


class _State(NamedTuple):
    """What goes from step to step: parameters ``(tasks, ...)``, and two trees that may have shared leaves."""

    params: Any
    opt_state: Tasks
    carry: Tasks


class _Run(NamedTuple):
    """One call's choices; `step` is what the gradient mode is handed."""

    loss: Loss
    optimizer: Optimizer
    grad_transform: GradTransform | None
    mapper: Mapper
    with_carry: bool

    def step(self, state: _State, batch: Tasks, differentiable: bool) -> tuple[_State, Tensor]:
        size = self.mapper.chunk_size
        if size is None or size >= self.mapper.tasks:
            values, carry, grads = self._gradient(state.params, state.carry, batch, differentiable)
        else:
            values, carry, grads = self._gradient_in_chunks(state, batch, differentiable, size)
        if self.grad_transform is not None:
            grads = self.mapper(self.grad_transform, per_task((grads,)), self.grad_transform).tree
        params, opt_state = self._update(state.params, grads, state.opt_state)
        return _State(params, opt_state, carry), values

    def _gradient(self, params: Any, carry: Tasks, batch: Tasks, differentiable: bool) -> tuple[Tensor, Tasks, Any]:
        call = scalar_loss(self.loss, self.with_carry)
        mapped: list[list[bool]] = []

        def evaluate(params: Any) -> tuple[Tensor, Any]:
            out = self.mapper(call, joined(per_task(params), carry, batch), self.loss)
            mapped.append(out.mapped[1:])
            return out.tree

        given = {"batches": batch.tree, "carry": carry.tree}
        try:
            values, carried, grads = value_and_grad(evaluate, params, differentiable, self.loss, given)
        except LateUseError as error:  # backward runs a part of the module again, when vmap is over
            if not self.mapper.fall_back(error, self.loss):
                raise
            values, carried, grads = value_and_grad(evaluate, params, differentiable, self.loss, given)
        leaves, spec = tree_flatten(carried)
        return values, Tasks(leaves, mapped[-1], spec), grads

    def _gradient_in_chunks(
        self, state: _State, batch: Tasks, differentiable: bool, size: int
    ) -> tuple[Tensor, Tasks, Any]:
        parts: list[tuple[Tensor, Tasks, Any]] = []
        numbers = random_state() if self.mapper.randomness == "same" else None
        for start in range(0, self.mapper.tasks, size):
            here = slice(start, start + size)
            if numbers is not None:
                set_random_state(numbers)
            params = sliced(per_task(state.params), here).tree
            parts.append(self._gradient(params, sliced(state.carry, here), sliced(batch, here), differentiable))
        carries = [carry for _, carry, _ in parts]
        leaves = [
            torch.cat(column) if mapped else column[0]
            for mapped, *column in zip(carries[0].mapped, *(carry.leaves for carry in carries), strict=True)
        ]
        grads = tree_map(lambda *each: torch.cat(each), *(grads for _, _, grads in parts))
        return torch.cat([values for values, _, _ in parts]), carries[0]._replace(leaves=leaves), grads

    def _update(self, params: Any, grads: Any, opt_state: Tasks) -> tuple[Any, Tasks]:
        """The optimizer's step: for all tasks at once where that is right, else mapped over them."""
        before: Any = marked(opt_state)
        shared_step = isinstance(opt_state.tree, OptState) and not before.step.mapped
        state = self._scheduled(params, opt_state) if shared_step else opt_state
        done = self._update_all(params, grads, state) if self.optimizer.elementwise else None
        if done is None:
            args = joined(per_task(params), per_task(grads), state)
            out = marked(self.mapper(checked(self.optimizer), args, self.optimizer.step))
            done = from_marks(out[0]).tree, from_marks(out[1])
        elif state is opt_state:
            return done
        new_params, new_state = done
        if shared_step:  # and so it stays, and the schedules with it
            after = marked(new_state)
            step = Mark(after.step.leaf[0], False) if after.step.mapped else after.step
            schedules = {name: before.hyperparameters[name] for name in _schedules(opt_state.tree)}
            new_state = from_marks(
                after._replace(step=step, hyperparameters=replaced(after.hyperparameters, schedules))
            )
        return new_params, new_state

    def _scheduled(self, params: Any, opt_state: Tasks) -> Tasks:
        """The state with what its schedules return at this step, which may be one value per task."""
        state, marks = opt_state.tree, marked(opt_state)
        now = {name: at_step(state.hyperparameters[name], state.step) for name in _schedules(state)}
        if not now:
            return opt_state
        names, shapes = tree_names(params), [leaf.shape[1:] for leaf in tree_leaves(params)]
        for name, spec in now.items():
            check_fits(name, spec, names, shapes)
        known = replaced(marks.hyperparameters, all_marked(now, False))
        found = _unwrapped(from_marks(marks._replace(hyperparameters=known)))
        count_tasks(opt_state=found, params=per_task(params))
        return found

    def _update_all(self, params: Any, grads: Any, opt_state: Tasks) -> tuple[Any, Tasks] | None:
        """One call for all tasks; None unless everything is either shared or exactly like a parameter."""
        marks = marked(opt_state)
        shapes = [leaf.shape for leaf in tree_leaves(params)]
        if not isinstance(marks, OptState) or any(m.mapped for m in tree_leaves((marks.step, marks.hyperparameters))):
            return None
        state = opt_state.tree
        if not _like_parameters(state.slots, shapes):
            return None
        new_params, new_state = checked(self.optimizer)(params, grads, state)
        if not isinstance(new_state, OptState) or not _like_parameters(new_state.slots, shapes):
            return None
        if not _same_leaves(new_state.hyperparameters, state.hyperparameters):  # they may have become per task
            return None
        common = all_marked(new_state._replace(slots={}), False)
        slots = all_marked(new_state.slots, True)
        return new_params, from_marks(common._replace(slots=slots))


def _schedules(state: OptState) -> list[str]:
    """The hyperparameters that a callable of the step gives, in whole or for some parameters."""
    return [name for name, spec in state.hyperparameters.items() if has(spec, is_schedule)]


def _same_leaves(tree: Any, other: Any) -> bool:
    (leaves, spec), (others, other_spec) = tree_flatten(tree), tree_flatten(other)
    return spec == other_spec and all(a is b for a, b in zip(leaves, others, strict=True))


def _like_parameters(slots: Any, shapes: list[torch.Size]) -> bool:
    """Whether each slot has one tensor for each parameter, of its shape."""
    return isinstance(slots, dict) and all(
        [getattr(leaf, "shape", None) for leaf in tree_leaves(tree)] == shapes for tree in cast("Any", slots).values()
    )


# The optimizer's state ------------------------------------------------------------------------------------------


def _unwrapped(tasks: Tasks) -> Tasks:
    """`per_task` hyperparameters as leaves with a task dimension."""
    if not any(isinstance(leaf, PerTask) for leaf in tasks.leaves):
        return tasks
    marks = [
        all_marked(leaf.tree, True) if isinstance(leaf, PerTask) else Mark(leaf, mapped)
        for leaf, mapped in zip(tasks.leaves, tasks.mapped, strict=True)
    ]
    return from_marks(tree_unflatten(tasks.spec, marks))


def _shared_step(tasks: Tasks) -> Tasks:
    """The step count as one number where all tasks agree on it, as they do in the state of an earlier run."""
    state = marked(tasks)
    mark: Any = state.step if isinstance(state, OptState) else None
    if mark is None or not mark.mapped or transforming() or not bool((mark.leaf == mark.leaf[0]).all()):
        return tasks
    return from_marks(state._replace(step=Mark(mark.leaf[0], False)))


def _initial_state(optimizer: Optimizer, params: Tasks) -> Tasks:
    if not any(params.mapped):
        return _unwrapped(shared(optimizer.init(params.tree)))
    count = count_tasks(params=params)
    assert count is not None
    return _unwrapped(Mapper(count)(optimizer.init, joined(params), optimizer.init))


def _expanded_slots(opt_state: Tasks, tasks: int) -> Tasks:
    """The state with its slots per task; what an unknown state holds is per task altogether."""
    state = marked(opt_state)

    def expanded(mark: Mark) -> Mark:
        if mark.mapped or not isinstance(mark.leaf, Tensor):
            return mark
        return Mark(mark.leaf.expand(tasks, *mark.leaf.shape), True)

    if isinstance(state, OptState):
        return from_marks(state._replace(slots=tree_map(expanded, state.slots)))
    return from_marks(tree_map(expanded, state))
