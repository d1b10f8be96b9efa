"""Implicit differentiation: the derivative of a root, whatever has found it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .._attach import detached
from .._split import split
from .._tree import require_floating, tree_flatten, tree_unflatten
from ..errors import TreeError
from ..typing import Tree
from ._pullback import Solve, at_root, require_shapes
from ._solve import cg

__all__ = ["custom_root"]


def custom_root(
    optimality: Callable[..., Tree], *, solve: Solve = cg
) -> Callable[[Callable[..., Tree]], Callable[..., Tree]]:
    """Make the result of any solver differentiable, by the condition that it fulfils.

    At a root ``F(x, theta) = 0`` the implicit function theorem gives ``dx = -(dF/dx)^-1 (dF/dtheta) dtheta``. What the
    solver does is never looked at: it may branch, call another library, or run without a graph.

    Args:
        optimality: ``optimality(solution, *args)``, a tree like the solution that is zero there; for a minimum, the
            gradient of what is minimized. It may close over tensors: they are reached as well.
        solve: ``solve(matvec, b)``, by which the linear system is solved: `cg` where ``dF/dx`` is symmetric and
            positive definite, as at a minimum, else `dense`.

    Returns:
        A decorator for ``solver(init, *args) -> solution``. The solution depends on `args` (trees) and on what
        `optimality` reads, not on `init`.

    Raises:
        ConvergenceError: in the backward pass, where the linear system cannot be solved.
        TreeError, ShapeError: `optimality` returns another structure, or other shapes, than the solution's.
        DtypeError: the solution has a leaf that is not a floating-point tensor.

    Source: Blondel et al., Efficient and modular implicit differentiation (NeurIPS 2022).

    Example:
        >>> import torch
        >>> from statelessify import implicit
        >>> @implicit.custom_root(lambda x, target: 2 * (x - target))
        ... def minimum(init, target):
        ...     return target.detach().clone()  # any way to find it
        >>> target = torch.ones(2, requires_grad=True)
        >>> torch.autograd.grad(minimum(torch.zeros(2), target).sum(), target)[0].tolist()
        [1.0, 1.0]
    """

    def decorate(solver: Callable[..., Tree]) -> Callable[..., Tree]:
        @wraps(solver)
        def solved(init: Tree, *args: Any) -> Tree:
            given = split((init, args))
            with torch.no_grad():
                init, constants = given.joined(detached(given.tensors))
                result = solver(init, *constants)
            require_floating(result, "the solver's result")
            found, spec = tree_flatten(result)
            arguments = split(args)

            def condition(solution: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
                out, other = tree_flatten(optimality(tree_unflatten(spec, solution), *arguments.joined(tensors)))
                if other != spec:
                    raise TreeError(f"`optimality` returned {other}, another structure than the solution's {spec}")
                require_shapes("`optimality` returned", out, solution)
                return out

            return tree_unflatten(spec, at_root(condition, found, arguments.tensors, solve, spec))

        return solved

    return decorate
