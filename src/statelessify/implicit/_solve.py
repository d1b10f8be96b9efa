"""Linear solves on trees: ``solve(matvec, b)`` is the `x` with ``matvec(x) = b``.

`matvec` takes a tree like `b` and returns one. Inside `torch.vmap` each task has its own system, and its own end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._transforms import unwrapped
from .._tree import tree_flatten, tree_unflatten
from ..errors import ConvergenceError, HyperparameterError, ShapeError, TreeError
from ..typing import Tree

__all__ = ["cg", "dense", "neumann"]

Matvec = Callable[[Tree], Tree]
Tolerance = float | Literal["auto"] | None


def cg(
    matvec: Matvec, b: Tree, *, maxiter: int | None = None, tol: Tolerance = "auto", ridge: float | Tensor = 0.0
) -> Tree:
    """Conjugate gradients: solves ``(A + ridge I) x = b`` for a symmetric positive definite ``A``.

    Args:
        matvec: ``x -> A x``, trees like `b`.
        b: the right-hand side, a tree of floating-point tensors.
        maxiter: at most so many products; None: ten times the entries of `b`, at least 50 and at most 1,000.
        tol: stop at a residual ``|b - A x|`` of `tol` times ``|b|``. ``"auto"``: 1e-10 in float64, 1e-5 below. None:
            take all of `maxiter`, however far they come, as iMAML does.
        ridge: added to the diagonal.

    Returns:
        A tree like `b`.

    Raises:
        ConvergenceError: the residual is above `tol` after `maxiter` products, or `A` has a direction in which it is
            not positive.

    Source: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems (1952).

    Example:
        >>> import torch
        >>> from statelessify import implicit
        >>> implicit.cg(lambda x: {"w": 2 * x["w"]}, {"w": torch.tensor([2.0, 4.0])})["w"].tolist()
        [1.0, 2.0]
    """
    system = _System("cg", matvec, b, maxiter, tol, ridge)
    x = torch.zeros_like(system.b)
    residual = direction = system.b
    square = residual @ residual
    end = system.limit(square)
    for _ in range(system.maxiter):
        active = square > end
        if not _any(active):
            break
        product = system.product(direction)
        curvature = direction @ product
        if _any(active & ~(curvature > 0)):
            raise ConvergenceError(
                f"`cg` needs a positive definite matrix, and met a direction of curvature "
                f"{_worst(-curvature / (direction @ direction), active, -1.0)}: at such a point the loss has no strict "
                "minimum; take more inner steps, put a proximal or a decay term in the loss, add `ridge=`, or write "
                "`solve=implicit.dense`"
            )
        step = torch.where(active, square / torch.where(active, curvature, 1), 0)
        x = x + step * direction
        residual = residual - step * product
        before, square = square, torch.where(active, residual @ residual, square)
        direction = residual + torch.where(active, square / torch.where(active, before, 1), 0) * direction
    return system.solution(x, square)


def neumann(
    matvec: Matvec,
    b: Tree,
    *,
    step_size: float | Tensor = 1.0,
    maxiter: int | None = None,
    tol: Tolerance = "auto",
    ridge: float | Tensor = 0.0,
) -> Tree:
    """The Neumann series ``x = step_size * sum_j (I - step_size A)^j b``, for `A` of any kind.

    It converges if all eigenvalues of ``step_size * A`` are within 1 of 1: for a Hessian, a `step_size` below two over
    its largest eigenvalue, such as the learning rate of a gradient descent that converges.

    Args:
        matvec, b, ridge: as for `cg`.
        step_size: the factor above.
        maxiter: at most so many products; None: 1,000.
        tol: as for `cg`. None takes all of `maxiter`: the series cut there.

    Returns:
        A tree like `b`.

    Raises:
        ConvergenceError: the residual is above `tol` after `maxiter` products, or the series diverges.

    Source: Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit differentiation
    (AISTATS 2020).

    Example:
        >>> import torch
        >>> from statelessify import implicit
        >>> round(implicit.neumann(lambda x: 2 * x, torch.tensor([3.0]), step_size=0.4).item(), 4)
        1.5
    """
    system = _System("neumann", matvec, b, 1000 if maxiter is None else maxiter, tol, ridge)
    x = torch.zeros_like(system.b)
    residual = system.b
    square = residual @ residual
    end = system.limit(square)
    diverged = 1e6 * square
    for _ in range(system.maxiter):
        active = square > end
        if not _any(active):
            break
        if _any(~(square <= diverged)):
            raise ConvergenceError(
                f"the Neumann series diverges (the residual grew by a factor of {_worst(square / end.clamp(min=1e-30))}"
                " over the tolerance): `step_size` times the largest eigenvalue is above 2, or an eigenvalue is not "
                "positive; write a smaller `step_size=`, add `ridge=`, or use `implicit.cg`"
            )
        step = torch.where(active, torch.as_tensor(step_size).to(residual), 0)
        x = x + step * residual
        residual = residual - step * system.product(residual)
        square = residual @ residual
    return system.solution(x, square)


def dense(matvec: Matvec, b: Tree, *, ridge: float | Tensor = 0.0) -> Tree:
    """Solve ``(A + ridge I) x = b`` with the whole matrix: one product for each entry of `b`, for any regular `A`.

    Args:
        matvec, b, ridge: as for `cg`.

    Returns:
        A tree like `b`.

    Raises:
        ConvergenceError: the matrix is singular.

    Example:
        >>> import torch
        >>> from statelessify import implicit
        >>> implicit.dense(lambda x: torch.tensor([[0.0, 2.0], [-1.0, 0.0]]) @ x, torch.tensor([2.0, 3.0])).tolist()
        [-3.0, 1.0]
    """
    system = _System("dense", matvec, b, 0, None, ridge)
    columns = [system.product(unit) for unit in torch.eye(len(system.b), dtype=system.b.dtype, device=system.b.device)]
    matrix = torch.stack(columns, 1)
    x = cast("Any", torch.linalg).solve_ex(matrix, system.b)[0]
    missing = matrix @ x - system.b
    size = system.b @ system.b
    if _any(~(missing @ missing <= torch.finfo(size.dtype).eps * size)):
        raise ConvergenceError(
            "`dense` met a singular matrix: the solution is not determined there; put a proximal or a decay term in "
            "the loss, or add `ridge=`"
        )
    return system.tree(x)


class _System:
    """A linear system on one vector; the entries of complex tensors are two real ones."""

    def __init__(
        self, name: str, matvec: Matvec, b: Tree, maxiter: int | None, tol: Tolerance, ridge: float | Tensor
    ) -> None:
        leaves, self._spec = tree_flatten(b)
        if not leaves:
            raise TreeError(f"`{name}` was given a right-hand side without tensors")
        if tol is None and maxiter is None:
            raise HyperparameterError(f"`{name}` with `tol=None` needs `maxiter=`, the number of products to take")
        if maxiter is not None and (isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HyperparameterError(f"`maxiter={maxiter!r}` is not a number of products; write a positive integer")
        if not (tol is None or tol == "auto" or (isinstance(tol, (int, float)) and tol >= 0)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HyperparameterError(f'`tol={tol!r}` is not a tolerance; write a number, "auto" or None')
        self._name, self._matvec, self._ridge = name, matvec, ridge
        self._likes: list[Tensor] = leaves
        self.b = self._vector(leaves)
        self.maxiter = min(max(10 * len(self.b), 50), 1000) if maxiter is None else maxiter
        self._tol = (1e-10 if self.b.dtype == torch.float64 else 1e-5) if tol == "auto" else tol

    def _vector(self, leaves: list[Tensor]) -> Tensor:
        return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in leaves])

    def tree(self, vector: Tensor) -> Tree:
        sizes = [like.numel() * (2 if like.is_complex() else 1) for like in self._likes]
        parts = cast("Any", vector).split(sizes)
        return tree_unflatten(self._spec, [_shaped(*pair) for pair in zip(parts, self._likes, strict=True)])

    def product(self, vector: Tensor) -> Tensor:
        leaves, spec = tree_flatten(self._matvec(self.tree(vector)))
        if spec != self._spec:
            raise TreeError(f"`matvec` returned {spec}, another structure than the right-hand side's {self._spec}")
        found = self._vector(leaves)
        if found.shape != vector.shape:
            raise ShapeError(f"`matvec` returned {len(found)} entries for a vector of {len(vector)}")
        return found + self._ridge * vector

    def limit(self, square: Tensor) -> Tensor:
        """The square of the residual at which to stop."""
        return square * 0 if self._tol is None else square * self._tol**2

    def solution(self, x: Tensor, square: Tensor) -> Tree:
        size = self.b @ self.b
        if self._tol is not None and _any(~(square <= self.limit(size))):
            relative = (square / size).sqrt()
            raise ConvergenceError(
                f"`{self._name}` has not converged: the relative residual is {_worst(relative)} after {self.maxiter} "
                f"products, above `tol={self._tol}`; raise `maxiter=`, add `ridge=`, or accept what they give with "
                "`tol=None`"
            )
        return self.tree(x)


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        part = torch.view_as_complex(part.reshape(*like.shape, 2).contiguous())
    return part.reshape(like.shape).to(like.dtype)


def _any(flags: Tensor) -> bool:
    """Whether it is so for any task: below all transforms there are plain values to look at."""
    return bool(unwrapped(flags).any())


def _worst(numbers: Tensor, among: Tensor | None = None, sign: float = 1.0) -> str:
    values = unwrapped(numbers.detach())
    if among is not None:
        values = values[unwrapped(among).expand_as(values)]
    return f"{sign * float(values.max()):.2e}"
