"""`adapt_tasks`: the inner loop of many tasks at once.

Only the forward loss is mapped over tasks. Its gradient is the ordinary gradient of the *summed* loss with respect to
the per-task parameters: tasks do not interact, so that is every task's own gradient. One vmap level and no functorch
gradient level: faster than ``vmap(grad(loss))``, and right to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._adapt import Adapted, apart, check_loop, gradient_of, loss_options, outside_inference, scalar_loss
from ._attach import Function
from ._budget import Chunks, check_chunks
from ._compile import compiled_step, plain, refuse_measuring
from ._gradient import value_and_grad
from ._loop import Gradient, State, Step
from ._one_task import adapt_one, alone, lined_up
from ._task_states import (
    HandingOn,
    Together,
    expanded_slots,
    initial_state,
    like_parameters,
    same_leaves,
    schedules_of,
    shared_step,
    together,
    unwrapped,
)
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
from ._tasks import Mapper, check_choices
from ._transforms import unseen
from ._tree import require_floating, tree_detach, tree_flatten, tree_leaves, tree_map, tree_names
from ._unroll import Unroll
from .errors import LateUseError, TaskError
from .optim import Optimizer, OptState
from .optim._checked import checked
from .optim._container import replaced
from .optim._hyperparameters import at_step, check_fits
from .typing import Backend, Batch, ChunkSize, GradTransform, InDims, Loss, Randomness, Tree

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
    chunk_size: ChunkSize = None,
    memory_budget: int | None = None,
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
        chunk_size: at most so many tasks at once in each step, for less memory; ``"auto"``: as many as
            `memory_budget` lets, which the first step finds out.
        memory_budget: for ``"auto"``, the bytes that the gradients of one step may take, as for `over_tasks`. On top
            come what earlier steps' graphs keep for a meta-gradient (`checkpoint_every` lowers that), its backward
            pass, and the optimizer's update and state: some copies of all tasks' parameters.
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
    check_choices(backend, randomness)
    check_chunks(chunk_size, memory_budget)
    refuse_measuring(loss, chunk_size)
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
        if opt_state is None and follow is shared:
            opt_state = optimizer.init(initial.tree)
        if opt_state is None:
            known["opt_state"] = initial_state(optimizer, initial)
        else:
            known["opt_state"] = unwrapped(follow(own(opt_state)))
        count = count_tasks(**known)
        state = shared_step(known["opt_state"])
        first: list[Tasks] = []
        if count is None and callable(batches) and steps > 0:
            first = [as_tasks(own(batches(0, tree_detach(params))), batches_dim, "batches")]
            count = count_tasks(batches=first[0])
        if count is None:
            raise TaskError(
                "nothing says how many tasks there are: no tensor of `batches` has a task dimension; map something in "
                "`in_dims`, or use `adapt`"
            )
        mapper = Mapper(count, backend, randomness, chunk_size, memory_budget)

        def batch_at(index: int, state: State) -> Tasks:
            if fixed is not None:
                return fixed
            if index == 0 and first:
                return first[0]
            found = as_tasks(own(batches(index, tree_detach(state.params))), batches_dim, "batches")
            count_tasks(params=per_task(state.params), batches=found)
            return found

        if mapper.one_alone and not schedules_of(state.tree):

            def batch_of_one(index: int, params: Any) -> Any:
                return alone(batch_at(index, State(lined_up(params), state, known["carry"])))

            return adapt_one(
                loss,
                known,
                batch_of_one if fixed is None else None,
                optimizer=optimizer,
                steps=steps,
                gradient=gradient,
                opt_state=alone(state) if any(state.mapped) else opt_state,  # which knows that it has been checked
                grad_transform=grad_transform,
            )
        loop = _Loop(plain(loss), optimizer, grad_transform, mapper, carry is not None, batch_at)
        loop = loop._replace(compiled=compiled_step(loss, loop.step, batches))
        begin = initial.expanded(count)
        if True in initial.mapped:  # what is expanded is a tensor of its own already
            begin = apart(begin)
        start = State(begin, together(optimizer, expanded_slots(state, count), begin), known["carry"])
        final, losses = gradient.run(loop, start, steps) if steps else (start, ())
        values = torch.stack(tuple(losses), 1) if losses else torch.zeros(count, 0, **loss_options(params))
        return Adapted(final.params, final.opt_state.expanded(count), values, final.carry.expanded(count))


class _Loop(NamedTuple):
    """The loop of one call. Of its state the parameters are ``(tasks, ...)``; the rest may have shared leaves."""

    source: Loss
    optimizer: Optimizer
    grad_transform: GradTransform | None
    mapper: Mapper
    with_carry: bool
    batches: Callable[[int, State], Tasks]
    compiled: Step | None = None

    def gradient(self, params: Any, carry: Any, batch: Any) -> Any:
        return gradient_of(self.source, params, carry, batch, self.with_carry)

    def parts(self, carry: Tasks, batch: Tasks) -> tuple[Any, list[bool]]:
        pairs = zip((*carry.leaves, *batch.leaves), (*carry.mapped, *batch.mapped), strict=True)
        return (carry.tree, batch.tree), [mapped for leaf, mapped in pairs if isinstance(leaf, Tensor)]

    def lift(self, fn: Function, mapped: Sequence[bool]) -> Function:
        def over_tasks(tensors: list[Tensor]) -> list[Tensor]:
            spec = tree_flatten((*tensors,))[1]
            args, chunks = Tasks(tensors, list(mapped), spec), self.mapper.chunks(self.source).settled()
            return self.mapper(lambda *each: fn(list(each)), args, self.source, chunks).leaves

        return over_tasks

    def batch_at(self, index: int, state: State) -> Tasks:
        return self.batches(index, state)

    def step(self, state: State, batch: Tasks, differentiable: bool) -> tuple[State, Tensor]:
        values, carry, grads = self._gradients(state, batch, differentiable)
        if self.grad_transform is not None:
            grads = self.mapper(self.grad_transform, per_task((grads,)), self.grad_transform).tree
        params, opt_state = self._update(state.params, grads, state.opt_state)
        return State(params, opt_state, carry), values

    def _gradient(self, params: Any, carry: Tasks, batch: Tasks, differentiable: bool) -> tuple[Tensor, Tasks, Any]:
        call = scalar_loss(self.source, self.with_carry)
        mapped: list[list[bool]] = []

        def evaluate(params: Any) -> tuple[Tensor, Any]:
            with unseen():
                args = joined(per_task(params), carry, batch)
            out = self.mapper(call, args, self.source, Chunks())
            mapped.append(out.mapped[1:])
            return out.tree

        given = {} if differentiable else {"batches": batch.tree, "carry": carry.tree}
        try:
            values, carried, grads = value_and_grad(evaluate, params, differentiable, self.source, given)
        except LateUseError as error:  # backward runs a part of the module again, when vmap is over
            if not self.mapper.fall_back(error, self.source):
                raise
            values, carried, grads = value_and_grad(evaluate, params, differentiable, self.source, given)
        leaves, spec = tree_flatten(carried)
        return values, Tasks(leaves, mapped[-1], spec), grads

    def _gradients(self, state: State, batch: Tasks, differentiable: bool) -> tuple[Tensor, Tasks, Any]:
        """Losses, carries and gradients of all tasks, in chunks."""
        tasks = self.mapper.tasks

        def chunk(here: slice) -> tuple[Tensor, Tasks, Any]:
            if here.stop - here.start == tasks:
                return self._gradient(state.params, state.carry, batch, differentiable)
            params = sliced(per_task(state.params), here).tree
            return self._gradient(params, sliced(state.carry, here), sliced(batch, here), differentiable)

        parts = self.mapper.chunks(self.source).run(chunk, tasks, self.mapper.randomness, state.params)
        if len(parts) == 1:
            return parts[0]
        carries = [carry for _, carry, _ in parts]
        leaves = [
            torch.cat(column) if mapped else column[0]
            for mapped, *column in zip(carries[0].mapped, *(carry.leaves for carry in carries), strict=True)
        ]
        grads = tree_map(lambda *each: torch.cat(each), *(grads for _, _, grads in parts))
        return torch.cat([values for values, _, _ in parts]), carries[0]._replace(leaves=leaves), grads

    def _update(self, params: Any, grads: Any, opt_state: Tasks | Together) -> tuple[Any, Tasks | Together]:
        """The optimizer's step: for all tasks at once where that is right, else mapped over them."""
        if isinstance(opt_state, Together):
            new_params, new_state = self.optimizer.step(params, grads, opt_state.state)
            return new_params, Together(new_state)
        before: Any = marked(opt_state)
        same_step = isinstance(opt_state.tree, OptState) and not before.step.mapped
        state = self._scheduled(params, opt_state) if same_step else opt_state
        done = self._update_all(params, grads, state) if self.optimizer.elementwise else None
        if done is None:
            args = joined(per_task(params), per_task(grads), state)
            step = HandingOn(checked(self.optimizer))
            out = marked(self.mapper(step, args, self.optimizer.step))
            done = from_marks(out[0]).tree, step.kept(state, from_marks(out[1]))
        elif state is opt_state:
            return done
        new_params, new_state = done
        if same_step:  # and so it stays, and the schedules with it
            after = marked(new_state)
            step = Mark(after.step.leaf[0], False) if after.step.mapped else after.step
            schedules = {name: before.hyperparameters[name] for name in schedules_of(opt_state.tree)}
            new_state = from_marks(
                after._replace(step=step, hyperparameters=replaced(after.hyperparameters, schedules))
            )
        return new_params, new_state

    def _scheduled(self, params: Any, opt_state: Tasks) -> Tasks:
        """The state with what its schedules return at this step, which may be one value per task."""
        state, marks = opt_state.tree, marked(opt_state)
        now = {name: at_step(state.hyperparameters[name], state.step) for name in schedules_of(state)}
        if not now:
            return opt_state
        names, shapes = tree_names(params), [leaf.shape[1:] for leaf in tree_leaves(params)]
        for name, spec in now.items():
            check_fits(name, spec, names, shapes)
        known = replaced(marks.hyperparameters, all_marked(now, False))
        found = unwrapped(from_marks(marks._replace(hyperparameters=known)))
        count_tasks(opt_state=found, params=per_task(params))
        return found

    def _update_all(self, params: Any, grads: Any, opt_state: Tasks) -> tuple[Any, Tasks] | None:
        """One call for all tasks; None unless everything is either shared or exactly like a parameter."""
        marks = marked(opt_state)
        shapes = [leaf.shape for leaf in tree_leaves(params)]
        if not isinstance(marks, OptState) or any(m.mapped for m in tree_leaves((marks.step, marks.hyperparameters))):
            return None
        state = opt_state.tree
        if not like_parameters(state.slots, shapes):
            return None
        new_params, new_state = checked(self.optimizer)(params, grads, state)
        if not isinstance(new_state, OptState) or not like_parameters(new_state.slots, shapes):
            return None
        if not same_leaves(new_state.hyperparameters, state.hyperparameters):  # they may have become per task
            return None
        common = all_marked(new_state._replace(slots={}), False)
        slots = all_marked(new_state.slots, True)
        return new_params, from_marks(common._replace(slots=slots))
