"""Inner loops as everybody would write them: `torch.autograd.grad`, then the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..._forward_mode import ForwardMode
from ..._implicit import Implicit
from ..._loop import Gradient
from ..._tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..._unroll import FirstOrder, Unroll
from ...errors import DtypeError, HyperparameterError
from ...optim import Optimizer, OptState, from_torch
from ._claims import needing_grad
from ._probe import is_inexact

__all__: list[str] = []

TorchOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
"""What makes an optimizer of torch for a list of parameters: its class, or a function."""


class Inner(NamedTuple):
    """An inner loop, to be run on trees ``{"params", "support", "hyperparameters"}``."""

    loss: Callable[[Any, Any], Tensor]
    optimizer: Optimizer
    steps: int

    def start(self, tree: Any) -> Any:
        """The optimizer's first state, with the tree's hyperparameters."""
        return with_hyperparameters(self.optimizer.init(tree["params"]), tree)

    def options(self, tree: Any, mode: Gradient) -> dict[str, Any]:
        """What `adapt` and `adapt_tasks` are called with beside the loss, the parameters and the data."""
        state = self.start(tree) if "hyperparameters" in tree else None
        return {"optimizer": self.optimizer, "steps": self.steps, "gradient": mode, "opt_state": state}


def is_exact(mode: Gradient) -> bool:
    """Whether a mode promises the exact meta-gradient."""
    return isinstance(mode, ForwardMode) or (isinstance(mode, Unroll) and mode.truncate is None)


def hyperparameters_of(state: Any) -> dict[str, Any]:
    """Those of a state, if a tensor that has a derivative is among them."""
    if isinstance(state, OptState) and any(map(is_inexact, tree_leaves(state.hyperparameters))):
        return state.hyperparameters
    return {}


def with_hyperparameters(state: Any, tree: Any) -> Any:
    if isinstance(state, OptState) and "hyperparameters" in tree:
        return state._replace(hyperparameters=tree["hyperparameters"])
    return state


def batch_at(support: Any, index: int, params: Any) -> Any:
    return support(index, tree_map(torch.Tensor.detach, params)) if callable(support) else support


def slope(loss: Callable[[Any, Any], Tensor], params: Any, batch: Any, differentiable: bool) -> tuple[Tensor, Any]:
    """The value of a loss and its gradient, zero where the loss does not depend on a parameter."""
    leaves, spec = tree_flatten(params)
    with torch.enable_grad():
        inputs = needing_grad(leaves)
        value = loss(tree_unflatten(spec, inputs), batch)
        found: Any = (None,) * len(inputs)
        if value.requires_grad and inputs:
            found = torch.autograd.grad(
                value, inputs, create_graph=differentiable, retain_graph=True, allow_unused=True
            )
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
    return value, tree_unflatten(spec, grads)


def plain_loop(inner: Inner, tree: Any, differentiable: bool = False) -> tuple[Any, list[Tensor]]:
    """The adapted parameters and the losses before each update."""
    params, state, losses = tree["params"], inner.start(tree), list[Tensor]()
    for index in range(inner.steps):
        value, grads = slope(inner.loss, params, batch_at(tree["support"], index, params), differentiable)
        params, state = inner.optimizer.step(params, grads, state)
        losses.append(value)
    return params, losses


def torch_loop(make: TorchOptimizer, loss: Callable[[Any, Any], Tensor], tree: Any, steps: int) -> Any:
    """The parameters that an optimizer of torch arrives at."""
    leaves, spec = tree_flatten(tree["params"])
    leaves = [p.detach().clone().requires_grad_() for p in leaves]
    params, optimizer = tree_unflatten(spec, leaves), make(leaves)
    for index in range(steps):
        grads = tree_leaves(slope(loss, params, batch_at(tree["support"], index, params), False)[1])
        for p, grad in zip(leaves, grads, strict=True):
            p.grad = grad.detach()
        optimizer.step()
    return tree_map(torch.Tensor.detach, params)


class Promised:
    """A plain loop with the derivatives that a mode promises: what the mode takes as constant was noted at one tree.

    Autograd gives these derivatives where `differentiable` loops are called for, and so do differences of values.
    """

    def __init__(self, inner: Inner, mode: Gradient, tree: Any) -> None:
        self.inner, self.mode = inner, mode
        self.steps = inner.steps
        self.base = tree_map(copied, tree["params"])
        state = inner.start(tree)
        known = {id(leaf) for leaf in tree_leaves(state)}
        params: Any = tree_map(copied, tree["params"])
        self.points: list[tuple[Any, Any]] = []
        self.grads: list[Any] = []
        self.losses: list[Tensor] = []
        self.batch: Any = None
        for index in range(inner.steps):
            self.points.append((params, state))
            self.batch = batch_at(tree["support"], index, params)
            value, grads = slope(inner.loss, params, self.batch, False)
            self.grads.append(tree_map(copied, grads))
            self.losses.append(value.detach())
            params, state = inner.optimizer.step(params, self.grads[-1], state)
            params = tree_map(copied, params)
            # What is handed on as it is, such as a closed-over tensor, may be moved later.
            state = tree_map(_copied_unless(known), state)
        self.last = params
        if isinstance(mode, Implicit):
            self.hessian, self.residual = self._at_last()

    def __call__(self, tree: Any, differentiable: bool = False) -> tuple[Any, list[Tensor]]:
        if isinstance(self.mode, FirstOrder):
            return self._with_constant_gradients(tree), self.losses
        if isinstance(self.mode, Implicit):
            return self._at_minimum(tree, differentiable), self.losses
        if isinstance(self.mode, Unroll) and self.mode.truncate is not None and self.mode.truncate < self.steps:
            return self._truncated(tree, self.mode.truncate, differentiable)
        return plain_loop(self.inner, tree, differentiable)

    def _with_constant_gradients(self, tree: Any) -> Any:
        params, state = tree["params"], self.inner.start(tree)
        for grads in self.grads:
            params, state = self.inner.optimizer.step(params, grads, state)
        return params

    def _truncated(self, tree: Any, last: int, differentiable: bool) -> tuple[Any, list[Tensor]]:
        first = self.steps - last
        params, state = self.points[first]
        params = tree_map(_moved, tree["params"], params, self.base)
        state, losses = with_hyperparameters(state, tree), self.losses[:first]
        for index in range(first, self.steps):
            value, grads = slope(self.inner.loss, params, batch_at(tree["support"], index, params), differentiable)
            params, state = self.inner.optimizer.step(params, grads, state)
            losses.append(value)
        return params, losses

    def _at_minimum(self, tree: Any, differentiable: bool) -> Any:
        """One step of Newton's method, with the Hessian at the last parameters."""
        leaves, spec = tree_flatten(self.last)
        support = tree["support"]
        batch = self.batch if callable(support) else support
        grads = tree_leaves(slope(self.inner.loss, self.last, batch, differentiable)[1])
        moved = cast("Tensor", torch.linalg.solve(self.hessian, self.residual - _flat(grads)))
        parts = _split(moved, [leaf.numel() for leaf in leaves])
        return tree_unflatten(spec, [p + part.reshape(p.shape) for p, part in zip(leaves, parts, strict=True)])

    def _at_last(self) -> tuple[Tensor, Tensor]:
        leaves, spec = tree_flatten(self.last)
        if any(leaf.is_complex() for leaf in leaves):
            raise DtypeError("`Implicit()` is checked for real parameters only")
        sizes = [leaf.numel() for leaf in leaves]

        def loss(point: Tensor) -> Tensor:
            parts = zip(_split(point, sizes), leaves, strict=True)
            return self.inner.loss(tree_unflatten(spec, [part.reshape(p.shape) for part, p in parts]), self.batch)

        point = _flat(leaves)
        hessian = cast("Any", torch.autograd.functional).hessian(loss, point)
        grads = slope(self.inner.loss, self.last, self.batch, False)[1]
        return hessian.detach(), _flat(tree_leaves(grads)).detach()


def _copied_unless(known: set[int]) -> Callable[[Any], Any]:
    def own(leaf: Any) -> Any:
        return leaf if id(leaf) in known else copied(leaf)

    return own


def _moved(initial: Tensor, later: Tensor, start: Tensor) -> Tensor:
    """Where parameters were later, moved as far as their initial values have been."""
    return initial + (later - start)


def copied(leaf: Any) -> Any:
    """A leaf with memory of its own, without its graph."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(vector: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return cast("Any", vector).split(sizes)


def pure(optimizer: Any) -> tuple[Optimizer | None, TorchOptimizer | None]:
    """An optimizer as a pure one, and as one of torch; None where it is not to be had.

    Raises:
        HyperparameterError: it is neither an `optim.Optimizer` nor something that makes an optimizer of torch.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer, None
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        return from_torch(optimizer), cast("Any", optimizer)
    if not isinstance(optimizer, type) and callable(optimizer):
        return None, cast("TorchOptimizer", optimizer)
    raise HyperparameterError(
        f"`optimizer={optimizer!r}` is no optimizer; write `optim.sgd(lr=...)`, a class of torch.optim, or "
        "`lambda params: torch.optim.SGD(params, lr=...)`"
    )
