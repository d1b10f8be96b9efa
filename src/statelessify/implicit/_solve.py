"""Linear solves on trees: ``solve(matvec, b)`` is the `x` with ``matvec(x) = b``.

`matvec` takes a tree like `b` and returns one. Inside `torch.vmap` each task has its own system, and its own end.

A solution is differentiable, by the equation that it fulfils. The iterations say nothing of its derivative: if `b` is
an eigenvector, they end before any other direction was seen. Only those cut by ``tol=None`` are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._transforms import transforming, unwrapped
from .._tree import require_floating, tree_flatten, tree_unflatten
from ..errors import ConvergenceError, HyperparameterError, ShapeError, TreeError
from ..typing import Tree
from ._pullback import Solve, at_root

__all__ = ["cg", "dense", "neumann"]

Matvec = Callable[[Tree], Tree]
Tolerance = float | Literal["auto"] | None

GROWTH = 1e6  # of the squared residual of a Neumann series, above which it is taken to diverge


def cg(
    matvec: Matvec, b: Tree, *, maxiter: int | None = None, tol: Tolerance = "auto", ridge: float | Tensor = 0.0
) -> Tree:
    """Conjugate gradients: solves ``(A + ridge I) x = b`` for a symmetric positive definite ``A``.

    Args:
        matvec: ``x -> A x``, trees like `b`.
        b: the right-hand side, a tree of floating-point tensors.
        maxiter: at most so many products; None: ten times the entries of `b`, at least 50 and at most 1,000.
        tol: stop at a residual ``|b - A x|`` of `tol` times ``|b|``. ``"auto"``: 1e-10 in float64, 1e-5 in float32, ten
            roundings below. None: take all of `maxiter`, however far they come, as iMAML does.
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
            system.require_finite(product)
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
    return system.solution(x, square, partial(cg, maxiter=maxiter, tol=tol))


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
        tol: as for `cg`. None takes all of `maxiter`: the series cut there, if it is no worse than zero.

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
    begin = square = residual @ residual
    end = system.limit(square)
    for _ in range(system.maxiter):
        active = square > end
        if not _any(active):
            break
        step = torch.where(active, torch.as_tensor(step_size).to(residual), 0)
        x = x + step * residual
        residual = residual - step * system.product(residual)
        square = residual @ residual
        if _any(~(square <= GROWTH * begin)):
            break
    most = begin if tol is None else GROWTH * begin
    if _any(~(square <= most)):
        system.require_finite(residual)
        raise ConvergenceError(
            f"the Neumann series diverges (the residual grew to {_worst((square / begin).sqrt())} times the right-hand "
            "side): `step_size` times the largest eigenvalue is above 2, or an eigenvalue is not positive; write a "
            "smaller `step_size=`, add `ridge=`, or use `implicit.cg`"
        )
    return system.solution(x, square, partial(neumann, step_size=step_size, maxiter=maxiter, tol=tol))


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
    size = len(system.b)
    if not size:
        return b
    columns = [system.product(unit) for unit in torch.eye(size, dtype=system.b.dtype, device=system.b.device)]
    matrix = torch.stack(columns, 1)
    system.require_finite(matrix)
    # With rows and columns of one size, so that "singular" does not depend on the units of the parameters.
    rows = _powers(matrix.detach(), 1)
    scaled = matrix / rows[:, None]
    scales = _powers(scaled.detach(), 0)
    scaled = scaled / scales
    linalg: Any = torch.linalg  # half of it is untyped
    inverse = linalg.inv_ex(scaled.detach())[0]
    condition = linalg.matrix_norm(scaled.detach(), 1) * linalg.matrix_norm(inverse, 1)
    if _any(~(condition * size * system.eps < 1)):
        raise ConvergenceError(
            "`dense` met a singular matrix: the solution is not determined there; put a proximal or a decay term in "
            "the loss, or add `ridge=`"
        )
    return system.unscaled(linalg.solve_ex(scaled, system.b / rows)[0] / scales)


class _System:
    """A linear system on one vector; the entries of complex tensors are two real ones."""

    def __init__(
        self, name: str, matvec: Matvec, b: Tree, maxiter: int | None, tol: Tolerance, ridge: float | Tensor
    ) -> None:
        leaves, self._spec = tree_flatten(b)
        if not leaves:
            raise TreeError(f"`{name}` was given a right-hand side without tensors")
        require_floating(b, "b")
        if tol is None and maxiter is None:
            raise HyperparameterError(f"`{name}` with `tol=None` needs `maxiter=`, the number of products to take")
        if maxiter is not None and (isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HyperparameterError(f"`maxiter={maxiter!r}` is not a number of products; write 0 or more")
        if not (tol is None or tol == "auto" or (isinstance(tol, (int, float)) and tol >= 0)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HyperparameterError(f'`tol={tol!r}` is not a tolerance; write a number, "auto" or None')
        self._name, self._matvec, self._given, self._likes = name, matvec, ridge, leaves
        self._implicit = tol is not None
        self._needed = any(isinstance(t, Tensor) and t.requires_grad for t in (*leaves, ridge))
        self._ridge = ridge.detach() if self._implicit and isinstance(ridge, Tensor) else ridge
        self.eps = max(torch.finfo(like.dtype).eps for like in leaves)
        vector = self._vector(leaves)
        self.require_finite(vector)
        # Squares of very small or large numbers leave the range of float32, and would end the iterations at zero.
        self._scale = _powers(vector.detach()) if len(vector) else vector.new_ones(())
        self.b = vector / self._scale
        self.maxiter = min(max(10 * len(self.b), 50), 1000) if maxiter is None else maxiter
        auto = 1e-10 if self.eps < 1e-10 else 1e-5 if self.eps < 1e-6 else 10 * self.eps
        self._tol = auto if tol == "auto" else tol

    def _vector(self, leaves: list[Tensor]) -> Tensor:
        vector = torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in leaves])
        vector = vector.float() if torch.finfo(vector.dtype).bits < 32 else vector
        return vector.detach() if self._implicit else vector

    def unscaled(self, x: Tensor) -> Tree:
        return self.tree(x * self._scale)

    def tree(self, vector: Tensor) -> Tree:
        parts = cast(
            "tuple[Tensor, ...]", vector.split([like.numel() * (2 if like.is_complex() else 1) for like in self._likes])
        )
        return tree_unflatten(self._spec, [_shaped(*pair) for pair in zip(parts, self._likes, strict=True)])

    def product(self, vector: Tensor) -> Tensor:
        leaves = self._applied(self.tree(vector))
        self._needed |= any(leaf.requires_grad for leaf in leaves)
        return self._vector(leaves) + self._ridge * vector

    def _applied(self, tree: Tree) -> list[Tensor]:
        leaves, spec = tree_flatten(self._matvec(tree))
        if spec != self._spec:
            raise TreeError(f"`matvec` returned {spec}, another structure than the right-hand side's {self._spec}")
        for leaf, like in zip(leaves, self._likes, strict=True):
            if leaf.shape != like.shape or leaf.is_complex() != like.is_complex():
                raise ShapeError(
                    f"`matvec` returned a tensor of shape {tuple(leaf.shape)} and {leaf.dtype} for one of shape "
                    f"{tuple(like.shape)} and {like.dtype}; it returns a tree like the one that it is given"
                )
        return leaves

    def require_finite(self, numbers: Tensor) -> None:
        if _any(~numbers.isfinite()):
            raise ConvergenceError(
                f"`{self._name}` met numbers that are not finite, in the right-hand side or in what `matvec` returned; "
                "look for the inf or nan there"
            )

    def limit(self, square: Tensor) -> Tensor:
        """The square of the residual at which to stop, at the latest where it is rounding error."""
        return square * max(self._tol or 0.0, torch.finfo(square.dtype).eps) ** 2

    def solution(self, x: Tensor, square: Tensor, solve: Solve) -> Tree:
        size = self.b @ self.b
        if self._tol is not None and _any(~(square <= self.limit(size))):
            self.require_finite(square)
            relative = (square / size).sqrt()
            raise ConvergenceError(
                f"`{self._name}` has not converged: the relative residual is {_worst(relative)} after {self.maxiter} "
                f"products, above `tol={self._tol}`; raise `maxiter=`, add `ridge=`, or accept what they give with "
                "`tol=None`"
            )
        found = self.unscaled(x)
        if not self._implicit or not torch.is_grad_enabled() or not (self._needed or transforming()):
            return found
        inputs = [*self._likes, *([self._given] if isinstance(self._given, Tensor) else [])]
        values = at_root(self._equation, tree_flatten(found)[0], inputs, solve, self._spec, recording=nullcontext())
        return tree_unflatten(self._spec, values)

    def _equation(self, x: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        b, (ridge, *_) = inputs[: len(x)], [*inputs[len(x) :], self._given]
        products = self._applied(tree_unflatten(self._spec, x))
        return [p.to(v.dtype) + (ridge * v).to(v.dtype) - r for p, v, r in zip(products, x, b, strict=True)]


def _powers(numbers: Tensor, dim: int | None = None) -> Tensor:
    """Powers of two near the largest absolute values, by which a division is exact; one for zeros."""
    most = numbers.abs().amax() if dim is None else numbers.abs().amax(dim)
    return torch.where(most > 0, most.clamp(min=torch.finfo(most.dtype).tiny).log2().floor().exp2(), 1)


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        part = torch.complex(*part.reshape(-1, 2).unbind(1))
    return part.reshape(like.shape).to(like.dtype)


def _any(flags: Tensor) -> bool:
    """Whether it is so for any task: below all transforms there are plain values to look at."""
    return bool(unwrapped(flags).any())


def _worst(numbers: Tensor, among: Tensor | None = None, sign: float = 1.0) -> str:
    values = unwrapped(numbers.detach())
    if among is not None:
        values = values[unwrapped(among).expand_as(values)]
    return f"{sign * float(values.max()):.2e}"
