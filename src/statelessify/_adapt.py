"""`adapt`: the inner loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attach import Function
from ._compile import compiled_step, plain
from ._gradient import value_and_grad
from ._loop import Gradient, State, Step
from ._split import split
from ._transforms import OrdinaryTensors, ordinary, transforming, unseen
from ._tree import require_floating, tree_detach, tree_leaves, tree_map
from ._unroll import Unroll
from .errors import HyperparameterError, LossError
from .optim import Optimizer
from .optim._checked import checked
from .typing import Batch, GradTransform, Loss, Tree

__all__ = ["Adapted", "adapt"]


class Adapted(NamedTuple):
    """What an inner loop returns.

    Attributes:
        params: the parameters after the last step.
        opt_state: the optimizer's state; pass it to another `adapt` to go on where this one stopped.
        losses: ``(steps,)``, the loss before each update.
        carry: what the last loss returned beside its value, or None.
    """

    params: Any
    opt_state: Any
    losses: Tensor
    carry: Any


def adapt(
    loss: Loss,
    params: Tree,
    batch: Batch,
    *,
    optimizer: Optimizer,
    steps: int,
    gradient: Gradient = Unroll(),  # noqa: B008
    opt_state: Any = None,
    carry: Any = None,
    grad_transform: GradTransform | None = None,
) -> Adapted:
    """Take `steps` of an optimizer on a loss, differentiably.

    Args:
        loss: ``loss(params, batch) -> scalar``; with a carry ``loss(params, carry, batch) -> (scalar, carry)``.
        params: the initial parameters, any tree of floating-point tensors.
        batch: a tree that each step uses, or a callable ``batch(step, params)`` of the step's number and the current
            parameters (detached), called exactly once for each step, in order.
        optimizer: what `optim.sgd` and its like return.
        steps: how many updates; none is fine.
        gradient: how the meta-gradient is obtained: `Unroll()`, `FirstOrder()`, `Implicit()`, `ForwardMode()`.
        opt_state: the state to start from; None means ``optimizer.init(params)``.
        carry: a tree that goes from step to step through the loss: buffers, a hidden state.
        grad_transform: gradients in, gradients out (clipping), before each update.

    Returns:
        ``Adapted(params, opt_state, losses, carry)``, connected to everything that the loss reads. Under
        `torch.no_grad` nothing is recorded, and memory does not grow with the steps.

    Raises:
        LossError: the loss is not one real number.
        DtypeError: a parameter is not a floating-point tensor.
        StatelessifyError: whatever the optimizer refuses; all before the first update.

    Example:
        >>> import torch
        >>> from statelessify import adapt, optim
        >>> start = {"w": torch.zeros(2, requires_grad=True)}
        >>> fit = lambda params, target: ((params["w"] - target) ** 2).sum()
        >>> adapted = adapt(fit, start, torch.ones(2), optimizer=optim.sgd(lr=0.25), steps=2)
        >>> adapted.params["w"].tolist(), adapted.losses.tolist()
        ([0.75, 0.75], [2.0, 0.5])
    """
    check_loop(optimizer, steps, gradient)
    require_floating(params, "params")
    with outside_inference() as own:
        params, batch, opt_state, carry = own(params), own(batch), own(opt_state), own(carry)
        state = State(params, optimizer.init(params) if opt_state is None else opt_state, carry)
        if steps == 0:
            return Adapted(*state[:2], torch.zeros(0, **loss_options(params)), carry)
        loop = _Loop(plain(loss), optimizer, grad_transform, batch, carry is not None, own)
        loop = loop._replace(compiled=compiled_step(loss, loop.step, batch))
        # A copy of each parameter that autograd can tell from the original: the loss may read the original as well.
        final, losses = gradient.run(loop, state._replace(params=apart(params)), steps)
        return Adapted(final.params, final.opt_state, torch.stack(tuple(losses)), final.carry)


class _Loop(NamedTuple):
    """The loop of one call."""

    source: Loss
    optimizer: Optimizer
    grad_transform: GradTransform | None
    batch: Batch
    with_carry: bool
    own: Callable[[Any], Any]
    compiled: Step | None = None

    def step(self, state: State, batch: Any, differentiable: bool) -> tuple[State, Tensor]:
        params, opt_state, carry = state
        call = scalar_loss(self.source, self.with_carry)

        def evaluate(params: Any) -> tuple[Tensor, Any]:
            return call(params, carry, batch)

        given = {"batch": batch, "carry": carry}
        value, new_carry, grads = value_and_grad(evaluate, params, differentiable, self.source, given)
        if self.grad_transform is not None:
            grads = self.grad_transform(grads)
        params, opt_state = checked(self.optimizer)(params, grads, opt_state)
        return State(params, opt_state, new_carry), value

    def gradient(self, params: Any, carry: Any, batch: Any) -> Any:
        return gradient_of(self.source, params, carry, batch, self.with_carry)

    def parts(self, carry: Any, batch: Any) -> tuple[Any, list[bool]]:
        tree = (carry, batch)
        return tree, [False] * len(split(tree).tensors)

    def lift(self, fn: Function, mapped: Sequence[bool]) -> Function:
        return fn

    def batch_at(self, index: int, state: State) -> Any:
        return self.own(self.batch(index, tree_detach(state.params))) if callable(self.batch) else self.batch


# What `adapt` and `adapt_tasks` share ------------------------------------------------------------------------------


def gradient_of(loss: Loss, params: Any, carry: Any, batch: Any, with_carry: bool) -> Any:
    """The gradient of one task's loss, differentiable."""
    call = scalar_loss(loss, with_carry)

    def evaluate(params: Any) -> tuple[Tensor, Any]:
        return call(params, carry, batch)

    return value_and_grad(evaluate, params, True, loss, {"batch": batch, "carry": carry})[2]


def check_loop(optimizer: Any, steps: Any, gradient: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise HyperparameterError(
            f"`optimizer` is {type(optimizer).__name__}, not an `optim.Optimizer`; write `optim.sgd(lr=...)`, or "
            "`optim.Optimizer(init, step)`"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise HyperparameterError(f"`steps={steps!r}` is not a number of steps; write an integer, 0 or more")
    if isinstance(gradient, type) or not hasattr(gradient, "run"):
        raise HyperparameterError(f"`gradient={gradient!r}` is not a mode; write `Unroll()` or another one")
    gradient.check(steps)


def loss_options(params: Any) -> Any:
    """The dtype and device of losses where there is no step to take them from."""
    leaves = tree_leaves(params)
    if not leaves:
        return {}
    return {"dtype": leaves[0].real.dtype, "device": leaves[0].device}


def apart(params: Any) -> Any:
    """The parameters as tensors of their own, in the same graph and storage."""
    return params if transforming() else tree_map(_apart, params)


def _apart(param: Tensor) -> Tensor:
    return param.view_as(param) if param.requires_grad else param


def scalar_loss(loss: Loss, with_carry: bool) -> Callable[[Any, Any, Any], tuple[Tensor, Any]]:
    """The loss in one form, ``(params, carry, batch) -> (scalar, carry)``, its value checked."""

    def call(params: Any, carry: Any, batch: Any) -> tuple[Tensor, Any]:
        if with_carry:
            out = loss(params, carry, batch)
            if not isinstance(out, tuple) or len(out) != 2:  # pyright: ignore[reportUnknownArgumentType]
                raise LossError(
                    f"with `carry=` the loss returns a pair `(value, carry)`, not {_kind(out)}; return both, or leave "
                    "`carry` out"
                )
            value, carry = out  # pyright: ignore[reportUnknownVariableType]
        else:
            value, carry = loss(params, batch), None
        with unseen():
            check_scalar(value)
        return value, carry  # pyright: ignore[reportUnknownVariableType]

    return call


def check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor):
        hint = "pass `carry=` where it returns more than the value" if isinstance(value, tuple) else "return a tensor"
        raise LossError(f"the loss returned {_kind(value)}, not a scalar tensor; {hint}")
    if value.ndim != 0:
        raise LossError(
            f"the loss of one task is a tensor of shape {tuple(value.shape)}, not a scalar; reduce it, for instance "
            "with `.mean()`"
        )
    if not value.is_floating_point():
        raise LossError(
            f"the loss is a {value.dtype} number, which has no gradient here; return a real floating-point one"
        )


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"  # pyright: ignore[reportUnknownArgumentType]
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class outside_inference(AbstractContextManager[Callable[[Any], Any]]):
    """Leaves inference mode, in which no inner gradient can be taken; nothing is recorded all the same.

    It gives a function that copies the inference tensors of a tree; those that a loss closes over are copied too.
    """

    def __enter__(self) -> Callable[[Any], Any]:
        self._stack: ExitStack | None = None
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return _same
        self._stack = ExitStack()
        self._stack.enter_context(torch.inference_mode(False))
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(OrdinaryTensors())
        return lambda tree: tree if callable(tree) else tree_map(ordinary, tree)

    def __exit__(self, *error: Any) -> None:
        if self._stack is not None:
            self._stack.close()


def _same(tree: Any) -> Any:
    return tree
