"""The derivative of a root: what `custom_root`, `Implicit` and the solves themselves attach to their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._attach import Function, Tensors, attach, detached, vjp
from .._capture import Captures, Replaced
from .._tree import TreeSpec, tree_flatten, tree_unflatten
from ..errors import ShapeError, TreeError
from ..rules._registry import rules_here
from ..typing import Tree

__all__: list[str] = []

Solve = Callable[[Callable[[Tree], Tree], Tree], Tree]
"""``solve(matvec, b)``, such as `cg`."""

Condition = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""``condition(solution, inputs)``, which is zero."""

Lift = Callable[[Function, Sequence[bool]], Function]
"""Maps a function of one task over tasks; the flags say which of its tensors have a task dimension."""


def for_one(fn: Function, mapped: Sequence[bool]) -> Function:
    """A `Lift` where there are no tasks."""
    return fn


def at_root(
    condition: Condition,
    solution: Tensors,
    inputs: Tensors,
    solve: Solve,
    spec: TreeSpec,
    mapped: Sequence[bool] | None = None,
    lift: Lift = for_one,
    recording: AbstractContextManager[None] | None = None,
) -> list[Tensor]:
    """The solution as a function of the inputs, and of the tensors that `condition` closes over.

    With `lift` all of it is written for one task: `mapped` says which inputs have a task dimension. `recording` is the
    context of the run that finds closed-over tensors; nothing is recorded unless it is given.
    """
    solution, count = [tensor.detach() for tensor in solution], len(solution)
    flags = [True] * count + list(mapped or [False] * len(inputs))
    captures = Captures([*solution, *inputs])

    def plain(tensors: list[Tensor]) -> list[Tensor]:
        return condition(tensors[:count], tensors[count:])

    with recording or torch.no_grad(), captures, rules_here():
        lift(plain, flags)([*solution, *detached(inputs)])
    known = [*inputs, *captures.found.values()]

    def of_tensors(tensors: list[Tensor]) -> list[Tensor]:
        new = dict(zip(map(id, known), tensors[count:], strict=True))
        with Replaced(new):
            return condition(tensors[:count], tensors[count : count + len(inputs)])

    flags += [False] * len(captures.found)
    root = Root(of_tensors, count, flags, solve, spec, lift)
    return attach(solution, known, root, keep_outputs=True)


@dataclass(eq=False)
class Root:
    """The pullback of a root: one linear solve, and one vector-Jacobian product.

    The solution of the linear system is a root itself, which makes the pullback differentiable in turn.
    """

    fn: Function
    count: int
    mapped: list[bool]
    solve: Solve
    spec: TreeSpec
    lift: Lift

    def __call__(
        self, inputs: Tensors, outputs: Tensors, cotangents: Tensors, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        tensors = [*outputs, *inputs]
        with rules_here():
            with torch.no_grad():
                found = self._solved(detached([*tensors, *cotangents]))
            if torch.is_grad_enabled():
                found = attach(found, [*tensors, *cotangents], self._transposed(), keep_outputs=True)
            chosen = [False] * self.count + list(wanted)
            _, pull = vjp(self.lift(self.fn, self.mapped), tensors, chosen, once=True)
            grads = iter(pull([-tensor for tensor in found]))
        return [next(grads) if w else None for w in wanted]

    def _solved(self, tensors: list[Tensor]) -> list[Tensor]:
        """The `u` with ``u^T dF/dx = cotangent^T``, for each task."""
        count = self.count

        def of_one(tensors: list[Tensor]) -> list[Tensor]:
            given, b = tensors[:-count], tensors[-count:]
            _, pull = vjp(self.fn, given, [True] * count + [False] * (len(given) - count))

            def matvec(tree: Tree) -> Tree:
                leaves, spec = tree_flatten(tree)
                if spec != self.spec:
                    raise TreeError(f"`matvec` was given {spec}, another structure than the solution's {self.spec}")
                return tree_unflatten(self.spec, pull(leaves))

            leaves, spec = tree_flatten(self.solve(matvec, tree_unflatten(self.spec, b)))
            if spec != self.spec:
                raise TreeError(f"`solve` returned {spec}, another structure than its right-hand side's {self.spec}")
            require_shapes("`solve` returned", leaves, b)
            return leaves

        return self.lift(of_one, [*self.mapped, *[True] * count])(tensors)

    def _transposed(self) -> Root:
        """The linear system as a root: of ``u^T dF/dx - cotangent^T``."""
        count, fn = self.count, self.fn

        def condition(tensors: list[Tensor]) -> list[Tensor]:
            u, given, b = tensors[:count], tensors[count:-count], tensors[-count:]
            _, pull = vjp(fn, given, [True] * count + [False] * (len(given) - count))
            return [left - right for left, right in zip(pull(u), b, strict=True)]

        flags = [True] * count + self.mapped + [True] * count
        return replace(self, fn=condition, mapped=flags)


def require_shapes(what: str, found: Tensors, likes: Tensors) -> None:
    for tensor, like in zip(found, likes, strict=True):
        if tensor.shape != like.shape:
            raise ShapeError(f"{what} a tensor of shape {tuple(tensor.shape)} in place of one of {tuple(like.shape)}")
