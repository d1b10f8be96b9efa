"""`implicit.custom_root`: the derivative of any solver's result, by the condition that it fulfils."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import IGNORE_SCRIPT, assert_close, positive
from sklearn.linear_model import Ridge
from torch import Tensor

from statelessify import errors, implicit

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = st.integers(0, 2**31 - 1)
SOLVES = pytest.mark.parametrize("solve", [implicit.cg, implicit.dense], ids=["cg", "dense"])
custom_root = implicit.custom_root


def newton(condition: Callable[..., Tensor], init: Tensor, *args: Any) -> Tensor:
    """The root of a function of one vector."""
    x = init
    for _ in range(30):
        x = x - torch.linalg.solve(torch.func.jacrev(condition)(x, *args), condition(x, *args))
    return x


def slope(x: Tensor, theta: Tensor) -> Tensor:
    """The gradient of a strictly convex function of x: it has one root."""
    return 2 * x + x**3 / 4 + torch.tanh(x.sum()) / 2 - theta * torch.cos(theta)


def skewed(x: Tensor, theta: Tensor) -> Tensor:
    """No gradient of anything: its Jacobian is not symmetric."""
    turn = torch.tensor([[0.0, 2.0], [-0.5, 0.0]])
    return 3 * x + turn @ torch.tanh(x) - theta * x.sin() - theta


def minimizer(solve: Any = implicit.cg, condition: Any = slope) -> Callable[..., Tensor]:
    return custom_root(condition, solve=solve)(partial_solver(condition))


def partial_solver(condition: Any) -> Callable[..., Tensor]:
    def solver(init: Tensor, *args: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not any(tensor.requires_grad for tensor in (init, *args))
        return newton(condition, init, *args)

    return solver


# The derivative ----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=SEEDS, size=st.integers(1, 5))
def test_a_quadratic_has_a_closed_form(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    matrix, b = positive(size).requires_grad_(), torch.randn(size, requires_grad=True)
    solution = custom_root(lambda x, matrix, b: matrix @ x - b)(lambda init, matrix, b: torch.linalg.solve(matrix, b))
    weight = torch.randn(size)
    found = solution(torch.zeros(size), matrix, b)
    expected = torch.linalg.solve(matrix, b)
    assert_close(found.detach(), expected.detach())
    grads = torch.autograd.grad((weight * found**2).sum(), (matrix, b), create_graph=True)
    by_hand = torch.autograd.grad((weight * expected**2).sum(), (matrix, b), create_graph=True)
    # cg takes the matrix for symmetric, and so it is.
    assert_close([g.detach() for g in grads], [g.detach() for g in by_hand], 1e-7)
    second = torch.autograd.grad((grads[1] ** 2).sum(), (matrix, b))
    assert_close(second[1], torch.autograd.grad((by_hand[1] ** 2).sum(), (matrix, b))[1], 1e-7)


@SOLVES
def test_finite_differences_of_first_and_second_order(solve: Any) -> None:
    solution = minimizer(solve)
    theta = torch.randn(3, requires_grad=True)
    torch.autograd.gradcheck(partial(solution, torch.zeros(3)), theta)
    torch.autograd.gradgradcheck(partial(solution, torch.zeros(3)), theta)


def test_a_jacobian_that_is_not_symmetric() -> None:
    """A product that is not transposed gives another number."""
    solution = minimizer(implicit.dense, skewed)
    theta = torch.randn(2, requires_grad=True)
    x = solution(torch.zeros(2), theta).detach()
    by_x, by_theta = torch.func.jacrev(skewed, (0, 1))(x, theta.detach())
    expected = -torch.linalg.solve(by_x, by_theta)
    assert (by_x - by_x.T).abs().max() > 0.5
    assert_close(torch.autograd.functional.jacobian(partial(solution, torch.zeros(2)), theta), expected)
    torch.autograd.gradcheck(partial(solution, torch.zeros(2)), theta)
    torch.autograd.gradgradcheck(partial(solution, torch.zeros(2)), theta)


@SOLVES
def test_the_same_numbers_in_every_context(solve: Any) -> None:
    solution = minimizer(solve)
    outer = lambda theta: (solution(torch.zeros(3), theta) ** 3).sum()
    thetas = torch.randn(4, 3)
    leaf = thetas.clone().requires_grad_()
    first = torch.stack([torch.autograd.grad(outer(each), each)[0] for each in leaf.unbind()])
    hessians = torch.stack([torch.autograd.functional.hessian(outer, each) for each in thetas])
    assert_close(torch.func.grad(outer)(thetas[0]), first[0], 1e-8)
    assert_close(torch.vmap(torch.func.grad(outer))(thetas), first, 1e-8)
    assert_close(torch.func.grad(lambda t: torch.vmap(outer)(t).sum())(thetas), first, 1e-8)
    assert_close(torch.autograd.grad(torch.vmap(outer)(leaf).sum(), leaf)[0], first, 1e-8)
    assert_close(torch.func.jacrev(torch.func.grad(outer))(thetas[0]), hessians[0], 1e-7)
    assert_close(torch.vmap(torch.func.jacrev(torch.func.jacrev(outer)))(thetas), hessians, 1e-7)
    by_grad = torch.func.grad(lambda t: torch.func.grad(outer)(t) @ torch.ones(3))(thetas[0])
    assert_close(by_grad, hessians[0].sum(0), 1e-7)
    third = torch.func.grad(lambda t: (torch.func.jacrev(torch.func.grad(outer))(t)).sum())(thetas[0])
    by_differences = torch.autograd.functional.jacobian(
        lambda t: torch.autograd.functional.hessian(outer, t, create_graph=True).sum(), thetas[0]
    )
    assert_close(third, by_differences, 1e-6)


@pytest.mark.parametrize("solve", [implicit.cg, implicit.dense, implicit.neumann])
def test_trees_in_and_out(solve: Any) -> None:
    """The cotangent of a leaf goes to that leaf, also where some of them have none."""

    def condition(x: Any, theta: Any, scale: Tensor) -> Any:
        a, (b, _) = x["a"], x["rest"]
        return {"a": a - theta["p"][0] * scale, "rest": [b + a.sum() / 10 - theta["q"], x["rest"][1] - scale * a[0]]}

    @custom_root(condition, solve=solve)
    def solver(init: Any, theta: Any, scale: Tensor) -> Any:
        a = theta["p"][0] * scale
        return {"a": a, "rest": [theta["q"] - a.sum() / 10, scale * a[0]]}

    if solve is implicit.cg:  # not symmetric
        solver = custom_root(condition, solve=implicit.dense)(solver.__wrapped__)
    theta = {"p": [torch.randn(2, requires_grad=True)], "q": torch.randn(2, 2, requires_grad=True)}
    scale = torch.tensor(1.5, requires_grad=True)
    leaves = [theta["p"][0], theta["q"], scale]
    for pick in (lambda x: (x["a"] ** 2).sum() + (x["rest"][0] ** 3).sum() + x["rest"][1], lambda x: x["rest"][1] ** 2):
        found = torch.autograd.grad(pick(solver({}, theta, scale)), leaves, materialize_grads=True, allow_unused=True)
        by_hand = pick(solver.__wrapped__({}, theta, scale))
        assert_close(found, torch.autograd.grad(by_hand, leaves, materialize_grads=True, allow_unused=True), 1e-8)


def test_a_complex_solution() -> None:
    theta = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    scale = torch.rand(3) + 0.5
    solution = custom_root(lambda z, theta: scale * z - theta * theta.abs())(lambda _, t: t * t.abs() / scale)
    torch.autograd.gradcheck(partial(solution, None), theta)
    torch.autograd.gradgradcheck(partial(solution, None), theta)


# What the condition closes over ------------------------------------------------------------------------------------


@SOLVES
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "no leaf"])
def test_closed_over_tensors_get_their_gradient(solve: Any, leaf: bool) -> None:
    """One of them depends on another, and one is an argument as well."""

    def run(a: Tensor, b: Tensor, closed: bool) -> Tensor:
        if not leaf:
            a, b = a * 1.5, b.exp()
        both = a * b
        full = lambda x, a, b, both: 2 * x + x**3 * b**2 - a - torch.tanh(both)
        x = newton(lambda x: full(x, a, b, both), torch.zeros(3)).detach()
        if closed:
            return custom_root(lambda x, a: full(x, a, b, both) + 0 * b, solve=solve)(lambda init, a: x)(x, a)
        return custom_root(full, solve=solve)(lambda init, *rest: x)(x, a, b, both)

    point = torch.randn(3), torch.rand(3)
    leaves = [t.clone().requires_grad_() for t in point]
    expected = torch.autograd.grad((run(*leaves, False) ** 2).sum(), leaves)
    assert_close(torch.autograd.grad((run(*leaves, True) ** 2).sum(), leaves), expected, 1e-8)
    assert_close(torch.func.grad(lambda *t: (run(*t, True) ** 2).sum(), (0, 1))(*point), expected, 1e-8)
    difference = torch.autograd.gradcheck(lambda *t: run(*t, True), leaves)
    assert difference


def test_a_condition_may_be_a_gradient_itself() -> None:
    frozen = torch.randn(3, requires_grad=True)
    energy = lambda x, theta: ((x - theta) ** 2).sum() + (frozen * x**2).sum() ** 2 / 10
    condition = torch.func.grad(energy)
    solution = minimizer(implicit.cg, condition)
    theta = torch.randn(3, requires_grad=True)
    found = torch.autograd.grad(solution(torch.zeros(3), theta).sum(), (theta, frozen))
    x = solution(torch.zeros(3), theta).detach()
    hessian, by_theta = torch.func.jacrev(condition, (0, 1))(x, theta.detach())
    u = torch.linalg.solve(hessian.detach(), torch.ones(3))
    by_frozen = torch.autograd.grad(-(condition(x, theta.detach()) @ u.detach()), frozen)[0]
    assert_close(found, (-u @ by_theta.detach(), by_frozen), 1e-8)


# The solver --------------------------------------------------------------------------------------------------------


def test_a_solver_of_another_library() -> None:
    """scikit-learn's ridge regression, in numpy, differentiated with respect to strength and data."""

    def condition(w: Tensor, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        return x.T @ (x @ w - y) + strength * w

    @custom_root(condition)
    def ridge(init: None, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        model = Ridge(alpha=strength.item(), fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy())
        return torch.as_tensor(np.asarray(model.coef_))

    inputs = [t.requires_grad_() for t in (torch.randn(8, 3), torch.randn(8), torch.tensor(0.7))]
    x, y, strength = inputs
    closed = torch.linalg.solve(x.T @ x + strength * torch.eye(3), x.T @ y)
    found = ridge(None, *inputs)
    assert_close(found, closed, 1e-8)
    grads = torch.autograd.grad((found**3).sum(), inputs, create_graph=True)
    expected = torch.autograd.grad((closed**3).sum(), inputs, create_graph=True)
    assert_close(grads, expected, 1e-8)
    assert_close(torch.autograd.grad(grads[2], inputs), torch.autograd.grad(expected[2], inputs), 1e-7)


def test_the_start_gets_no_gradient_and_nothing_is_recorded_without_need() -> None:
    solution = minimizer()
    init, theta = torch.zeros(3, requires_grad=True), torch.randn(3, requires_grad=True)
    found = solution(init, theta)
    assert torch.autograd.grad(found.sum(), (init, theta), allow_unused=True)[0] is None
    assert solution(init, theta.detach()).grad_fn is None
    with torch.no_grad():
        assert not solution(init, theta).requires_grad
    assert_close(torch.func.grad(lambda init: solution(init, theta.detach()).sum())(torch.ones(3)), torch.zeros(3))


def test_memory_is_freed() -> None:
    alive: list[Any] = []

    def condition(x: Tensor, theta: Tensor) -> Tensor:
        hidden = torch.tanh(x)
        alive.append(weakref.ref(hidden.untyped_storage()))
        return 2 * x + hidden - theta

    solution = custom_root(condition)(lambda init, theta: newton(lambda x: 2 * x + torch.tanh(x) - theta, init))
    theta = torch.randn(3, requires_grad=True)
    found = solution(torch.zeros(3), theta)
    gc.collect()
    assert alive
    assert not any(ref() for ref in alive)
    found.sum().backward()
    del found
    gc.collect()
    assert not any(ref() for ref in alive)


def test_names_are_the_solvers_own() -> None:
    solution = custom_root(slope)(newton)
    assert solution.__name__ == "newton"
    assert solution.__doc__ == newton.__doc__


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_errors_are_named() -> None:
    theta = torch.ones(3, requires_grad=True)
    wrong = custom_root(lambda x, t: [x - t])(lambda init, t: t)
    with pytest.raises(errors.TreeError, match="optimality"):
        wrong(None, theta)
    concave = custom_root(lambda x, t: t - x)(lambda init, t: t)(None, theta)
    with pytest.raises(errors.ConvergenceError, match="positive definite"):
        concave.sum().backward()
    flat = custom_root(lambda x, t: 0 * x + t - t.detach(), solve=implicit.dense)(lambda init, t: t)(None, theta)
    with pytest.raises(errors.ConvergenceError, match="singular"):
        flat.sum().backward()
    other = custom_root(lambda x, t: x - t, solve=lambda matvec, b: [b])(lambda init, t: t)(None, theta)
    with pytest.raises(errors.TreeError, match="`solve` returned"):
        other.sum().backward()
    shorter = custom_root(lambda x, t: x - t, solve=lambda matvec, b: b[:1])(lambda init, t: t)(None, theta)
    with pytest.raises(errors.ShapeError, match="`solve` returned"):
        shorter.sum().backward()
    smaller = custom_root(lambda x, t: (x - t)[:1])(lambda init, t: t)
    with pytest.raises(errors.ShapeError, match="`optimality` returned"):
        smaller(None, theta)
    with pytest.raises(errors.DtypeError, match="solver's result"):
        custom_root(lambda x, t: x - t)(lambda init, t: t.numpy())(None, theta)
    with pytest.raises(errors.DerivativeError, match="forward"):
        torch.func.jvp(lambda t: minimizer()(torch.zeros(3), t), (theta.detach(),), (torch.ones(3),))
