"""Solutions of linear systems, differentiated: by the equation, not through iterations that may end early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_close, positive, times
from torch import Tensor

from statelessify.implicit import cg, dense, neumann

pytestmark = pytest.mark.usefixtures("float64")
ALL = pytest.mark.parametrize("solve", [cg, neumann, dense], ids=["cg", "neumann", "dense"])


@ALL
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_solution_is_differentiable_twice(solve: Any, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(3, 3).requires_grad_(), torch.randn(3).requires_grad_(), torch.rand(()).requires_grad_()]

    def solution(root: Tensor, b: Tensor, ridge: Tensor, by: Any = solve) -> Tensor:
        matrix = torch.eye(3) / 2 + 0.1 * root @ root.T / (root.detach() ** 2).sum()
        if by is None:
            return torch.linalg.solve(matrix + ridge * torch.eye(3), b)
        return by(times(matrix), b, ridge=ridge)

    def outer(by: Any) -> list[Tensor]:
        first = torch.autograd.grad((solution(*inputs, by) ** 3).sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), inputs)]

    assert_close(outer(solve), outer(None), 1e-6)
    point = [t.detach() for t in inputs]
    expected = torch.func.jacrev(lambda *t: solution(*t, None), (0, 1, 2))(*point)
    assert_close(torch.func.jacrev(solution, (0, 1, 2))(*point), expected, 1e-6)


@ALL
@pytest.mark.parametrize("entries", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 2.0, 0.0)])
def test_the_derivative_where_the_iterations_end_early(solve: Any, entries: tuple[float, ...]) -> None:
    """At zero they take no step, at an eigenvector only one: neither has seen the other directions."""
    diagonal = torch.tensor([0.5, 0.8, 1.25])
    jacobian = torch.func.jacrev(lambda b: solve(lambda x: diagonal * x, b))
    assert_close(jacobian(torch.tensor(entries)), torch.diag(1 / diagonal), 1e-8)
    b = torch.tensor(entries).requires_grad_()
    by_b = torch.autograd.grad(solve(lambda x: diagonal * x, b).sum(), b)[0]
    assert_close(by_b, 1 / diagonal, 1e-8)
    many = torch.vmap(jacobian)(torch.stack([torch.tensor(entries), torch.ones(3)]))
    assert_close(many, torch.diag(1 / diagonal).expand(2, 3, 3), 1e-8)


@ALL
def test_influence_by_hessian_products_of_autograd(solve: Any) -> None:
    """A product that builds a graph of its own, as influence functions do."""
    matrix, w = positive(4), torch.randn(4, requires_grad=True)

    def product(v: Tensor) -> Tensor:
        first = torch.autograd.grad(w @ matrix @ w / 2 + w.sum(), w, create_graph=True)[0]
        return torch.autograd.grad(first, w, v)[0]

    b = torch.randn(4)
    found = solve(product, b)
    assert not found.requires_grad
    assert_close(found, torch.linalg.solve(matrix, b), 1e-8)
    with torch.no_grad():
        assert not solve(times(matrix * w**0), b).requires_grad
