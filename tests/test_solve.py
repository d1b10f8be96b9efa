"""Linear solves on trees: against torch's own solution, per task, and never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_close, positive, times
from torch import Tensor

from statelessify import errors, implicit
from statelessify.implicit import cg, dense, neumann

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = st.integers(0, 2**31 - 1)
SOLVES: dict[str, Callable[..., Any]] = {"cg": cg, "neumann": neumann, "dense": dense}
ALL = pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
ITERATIVE = pytest.mark.parametrize("solve", [cg, neumann], ids=["cg", "neumann"])


# The solution ------------------------------------------------------------------------------------------------------


@ALL
@settings(max_examples=40)
@given(seed=SEEDS, size=st.integers(1, 8), ridge=st.sampled_from([0.0, 0.4]), scale=st.sampled_from([1e-200, 1, 1e200]))
def test_solves_a_positive_definite_system(solve: Any, seed: int, size: int, ridge: float, scale: float) -> None:
    torch.manual_seed(seed)
    matrix, b = positive(size), torch.randn(size)
    expected = torch.linalg.solve(matrix + ridge * torch.eye(size), b)
    found = solve(times(matrix), b * scale, ridge=ridge)
    assert_close(found / scale, expected, 1e-8)
    assert_close(solve(times(matrix), b, ridge=torch.tensor(ridge)), expected, 1e-8)


@given(seed=SEEDS, size=st.integers(1, 8), units=st.floats(-30, 30))
def test_dense_solves_any_regular_system(seed: int, size: int, units: float) -> None:
    """Whatever the units: a row or a column of tiny numbers makes a matrix no less regular."""
    torch.manual_seed(seed)
    u, v = torch.linalg.qr(torch.randn(2, size, size))[0]
    matrix, b = u * (0.1 + torch.rand(size)) @ v, torch.randn(size)
    left, right = torch.ones(2, size)
    left[0], right[-1] = 10**units, 10 ** (-2 * units)
    expected = torch.linalg.solve(matrix, b)
    found = dense(times(left[:, None] * matrix * right), left * b)
    assert_close(found * right, expected, 1e-8)


@ALL
def test_neumann_and_dense_take_matrices_that_are_not_symmetric(solve: Any) -> None:
    matrix, b = torch.eye(4) + torch.triu(torch.randn(4, 4) / 2, 1), torch.randn(4)
    if solve is cg:
        with pytest.raises(errors.ConvergenceError):
            cg(times(matrix - 2 * matrix.T), b)
        return
    assert_close(solve(times(matrix), b), torch.linalg.solve(matrix, b), 1e-8)


def test_neumann_with_a_step_size() -> None:
    matrix, b = 100 * positive(5), torch.randn(5)
    expected = torch.linalg.solve(matrix, b)
    assert_close(neumann(times(matrix), b, step_size=0.01), expected, 1e-8)
    assert_close(neumann(times(matrix), b, step_size=torch.tensor(0.01)), expected, 1e-8)


@ALL
def test_trees_and_complex_numbers(solve: Any) -> None:
    """A complex leaf stands for two real ones, also where it is coupled with a real leaf."""
    hermitian = positive(3, dtype=torch.complex128)
    z, w = torch.randn(3, dtype=torch.complex128), torch.randn(2, 2)
    x = solve(lambda t: {"z": hermitian @ t["z"], "more": [t["more"][0] / 2]}, {"z": z, "more": [w]})
    assert_close(x, {"z": torch.linalg.solve(hermitian, z), "more": [2 * w]}, 1e-8)
    coupled = lambda t: {"z": t["z"] + 0.1 * (1 + 1j) * t["r"], "r": t["r"] + 0.1 * (t["z"].real + t["z"].imag)}
    b = {"z": z, "r": torch.randn(3)}
    assert_close(coupled(solve(coupled, b)), b, 1e-8)


@ALL
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e25])
def test_single_precision_at_any_scale(solve: Any, scale: float) -> None:
    """The squares of these numbers are zero or infinite in float32."""
    matrix, b = positive(6).float(), torch.randn(6).float()
    found = solve(times(matrix), b * scale)
    assert found.dtype == torch.float32
    expected = torch.linalg.solve(matrix.double(), b.double()) * scale
    assert ((found.double() - expected).norm() / expected.norm()) < 1e-4


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(solve: Any, dtype: torch.dtype) -> None:
    b = torch.tensor([300.0, -200.0], dtype=dtype)
    found = solve(lambda x: x * torch.tensor([0.5, 1.25], dtype=dtype), b)
    assert found.dtype == dtype
    torch.testing.assert_close(found, b / torch.tensor([0.5, 1.25], dtype=dtype), rtol=0.1, atol=0)


@ALL
def test_two_precisions_in_one_tree(solve: Any) -> None:
    b = {"low": torch.randn(200).float(), "high": torch.randn(3)}
    found = solve(lambda x: {"low": x["low"] / 1.7, "high": x["high"] * 0.6}, b)
    assert [t.dtype for t in found.values()] == [torch.float32, torch.float64]
    torch.testing.assert_close(found, {"low": b["low"] * 1.7, "high": b["high"] / 0.6}, rtol=1e-4, atol=1e-4)


@ALL
def test_nothing_to_solve(solve: Any) -> None:
    assert_close(solve(times(positive(3)), torch.zeros(3)), torch.zeros(3))
    assert_close(solve(lambda x: x, torch.zeros(0, 3)), torch.zeros(0, 3))


# Many tasks --------------------------------------------------------------------------------------------------------


@ALL
@settings(max_examples=20)
@given(seed=SEEDS, tasks=st.integers(1, 4))
def test_each_task_has_its_own_system_scale_and_end(solve: Any, seed: int, tasks: int) -> None:
    """Among them one whose right-hand side is zero, one that ends at once, one far smaller than the others."""
    torch.manual_seed(seed)
    matrices = torch.cat([torch.eye(5)[None], positive(tasks, 5), positive(2, 5)])
    b = torch.randn(len(matrices), 5)
    b[-1], b[-2] = 0, b[-2] * 1e-12
    b[1, 1:] = 0
    expected = torch.linalg.solve(matrices, b)
    found = torch.vmap(lambda matrix, b: solve(times(matrix), b))(matrices, b)
    alone = torch.stack([solve(times(m), each) for m, each in zip(matrices, b, strict=True)])
    for ours in (found, alone):
        errors = (ours - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
        assert errors.max() < 1e-8
    assert_close(found, alone, 1e-12)


def test_a_task_that_has_ended_rests_while_others_go_on() -> None:
    """Steps after its end would multiply what rounding has left of its residual by a hundred each."""
    entries = ([100.0, 97.0, *[100.0] * 8], [2.0**-i for i in range(10)])
    matrices = torch.stack([torch.diag(torch.tensor(each)) for each in entries])
    b = torch.randn(2, 10)
    found = torch.vmap(lambda matrix, b: cg(times(matrix), b))(matrices, b)
    assert_close(found, torch.linalg.solve(matrices, b), 1e-7)


@ALL
def test_tasks_may_share_the_matrix_or_the_right_hand_side(solve: Any) -> None:
    matrices, b = positive(3, 4), torch.randn(3, 4)
    by_matrix = torch.vmap(lambda m: solve(times(m), b[0]))(matrices)
    assert_close(by_matrix, torch.linalg.solve(matrices, b[0].expand(3, 4)), 1e-8)
    by_b = torch.vmap(lambda b: solve(times(matrices[0]), b))(b)
    assert_close(by_b, torch.linalg.solve(matrices[0], b.T).T, 1e-8)
    grid = torch.vmap(lambda m: torch.vmap(lambda b: solve(times(m), b))(b))(matrices)
    assert_close(grid, torch.stack([torch.linalg.solve(m, b.T).T for m in matrices]), 1e-8)


# Ends --------------------------------------------------------------------------------------------------------------


def products(solve: Any, matrix: Tensor, b: Tensor, **options: Any) -> int:
    count = 0

    def matvec(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return matrix @ x

    solve(matvec, b, **options)
    return count


def test_cg_needs_one_product_for_each_distinct_eigenvalue() -> None:
    assert products(cg, torch.diag(torch.tensor([1.0, 2, 2, 5, 5, 5])), torch.ones(6)) == 3
    assert products(cg, torch.eye(3), torch.zeros(3)) == 0
    assert products(neumann, torch.eye(3), torch.zeros(3)) == 0
    assert products(dense, torch.eye(3), torch.zeros(3)) == 3


@pytest.mark.parametrize(
    ("solve", "size", "most"),
    [(cg, 5, 50), (cg, 6, 60), (cg, 100, 1000), (cg, 101, 1000), (neumann, 3, 1000)],
)
def test_so_many_products_at_most(solve: Any, size: int, most: int) -> None:
    """Of a matrix that is another one each time, by which nothing converges."""
    count = 0

    def matvec(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * 10 ** (-3 * torch.rand(size) if solve is cg else -torch.tensor(9.0))

    with pytest.raises(errors.ConvergenceError, match=f"after {most} products"):
        solve(matvec, torch.ones(size), tol=0.0)
    assert count == most


@ITERATIVE
def test_a_smaller_tolerance_takes_more_products_and_errs_less(solve: Any) -> None:
    matrix, b = positive(30), torch.randn(30)
    before = 0
    for tol in (1e-1, 1e-3, 1e-6):
        count = products(solve, matrix, b, tol=tol)
        residual = (matrix @ solve(times(matrix), b, tol=tol) - b).norm() / b.norm()
        assert count > before
        assert tol * 1e-3 < residual <= tol * (1 + 1e-6)
        before = count


@pytest.mark.parametrize(
    ("dtype", "tol"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 10 * 2**-7), (torch.float16, 10 * 2**-10)],
)
def test_the_tolerance_follows_the_precision(dtype: torch.dtype, tol: float) -> None:
    matrix, b = (torch.eye(3) / 4).to(dtype), torch.ones(3, dtype=dtype)  # each product takes a quarter of the residual
    needed = [products(neumann, matrix, b, **given) for given in ({}, {"tol": tol}, {"tol": 2 * tol}, {"tol": tol / 2})]
    assert needed[0] == needed[1]
    assert needed[2] < needed[0] < needed[3]


@ITERATIVE
def test_without_a_tolerance_exactly_so_many_products_are_taken(solve: Any) -> None:
    matrix, b = positive(9), torch.randn(9)
    assert products(solve, matrix, b, tol=None, maxiter=4) == 4
    assert_close(solve(times(torch.eye(3)), torch.ones(3), tol=None, maxiter=500), torch.ones(3), 1e-12)
    assert_close(solve(times(matrix), b, tol=0.0), torch.linalg.solve(matrix, b), 1e-8) if solve is cg else None
    root = torch.randn(4, requires_grad=True)
    torch.autograd.gradcheck(lambda b: solve(times(positive_constant), b, tol=None, maxiter=2), root)
    series = b + (b - matrix @ b)
    assert_close(neumann(times(matrix), b, tol=None, maxiter=2), series)


positive_constant = torch.tensor([[1.0, 0.2, 0, 0], [0.2, 0.7, 0, 0], [0, 0, 0.5, 0.1], [0, 0, 0.1, 1.2]]).double()

# Errors ------------------------------------------------------------------------------------------------------------


@ITERATIVE
def test_no_convergence_names_the_residual(solve: Any) -> None:
    matrix, b = torch.diag(torch.tensor([1.0, 0.5, 0.25])), torch.ones(3)
    x = solve(times(matrix), b, tol=None, maxiter=2)
    residual = f"{(matrix @ x - b).norm() / b.norm():.2e}"
    with pytest.raises(errors.ConvergenceError, match=rf"relative residual is {residual} after 2 products"):
        solve(times(matrix), b, maxiter=2)
    two = torch.stack([torch.eye(3), matrix])
    with pytest.raises(errors.ConvergenceError, match=residual):
        torch.vmap(lambda m: solve(times(m), b, maxiter=2))(two)


@pytest.mark.parametrize("entry", [-1.0, 0.0])
def test_cg_refuses_a_matrix_that_is_not_positive(entry: float) -> None:
    matrix, b = torch.diag(torch.tensor([1.0, entry])), torch.tensor([0.0, 3.0])
    with pytest.raises(errors.ConvergenceError, match=rf"curvature {entry or '-?0'}"):
        cg(times(matrix), b)
    with pytest.raises(errors.ConvergenceError, match="curvature"):
        torch.vmap(lambda m: cg(times(m), b))(torch.stack([torch.eye(2), matrix]))
    assert_close(cg(times(matrix), b, ridge=2.0), b / (2 + matrix.diagonal()))


def test_neumann_diverges() -> None:
    matrix, b = torch.diag(torch.tensor([1.0, 3.0])), torch.ones(2)
    for options in ({}, {"tol": None, "maxiter": 3}, {"tol": None, "maxiter": 10_000}):
        with pytest.raises(errors.ConvergenceError, match="diverges"):
            neumann(times(matrix), b, **options)
        with pytest.raises(errors.ConvergenceError, match="diverges"):
            torch.vmap(lambda m: neumann(times(m), b, **options))(torch.stack([torch.eye(2), matrix]))  # noqa: B023
    with pytest.raises(errors.ConvergenceError, match="not converged"):
        neumann(times(torch.diag(torch.tensor([1.0, 0.0]))), b)


@settings(max_examples=40)
@given(seed=SEEDS, size=st.integers(2, 6))
def test_dense_refuses_a_singular_matrix_even_where_a_solution_exists(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    factor = torch.randn(size, size - 1)
    matrix = factor @ factor.T
    with pytest.raises(errors.ConvergenceError, match="singular"):
        dense(times(matrix), matrix @ torch.randn(size))
    with pytest.raises(errors.ConvergenceError, match="singular"):
        torch.vmap(lambda m: dense(times(m), torch.ones(size)))(torch.stack([torch.eye(size), matrix]))
    assert dense(times(matrix), torch.ones(size), ridge=0.1).isfinite().all()


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(solve: Any, bad: float) -> None:
    with pytest.raises(errors.ConvergenceError, match="not finite"):
        solve(lambda x: x, torch.tensor([1.0, bad]))
    with pytest.raises(errors.ConvergenceError, match="not finite"):
        solve(lambda x: x * bad, torch.ones(2))


@ALL
def test_arguments_of_the_wrong_kind(solve: Any) -> None:
    b = {"w": torch.ones(2), "v": torch.ones(3)}
    with pytest.raises(errors.TreeError, match="without tensors"):
        solve(lambda x: x, {})
    with pytest.raises(errors.TreeError, match="another structure"):
        solve(lambda x: x["w"], b)
    with pytest.raises(errors.ShapeError, match="shape"):
        solve(lambda x: {"w": x["v"], "v": x["w"]}, b)
    with pytest.raises(errors.DtypeError, match="integer"):
        solve(lambda x: x, torch.tensor([1, 2]))
    with pytest.raises(errors.DtypeError, match="not a tensor"):
        solve(lambda x: x, 1.0)
    assert implicit.__all__ == ["cg", "custom_root", "dense", "neumann"]


@ITERATIVE
@pytest.mark.parametrize(
    "options",
    [{"maxiter": -1}, {"maxiter": 2.0}, {"maxiter": True}, {"tol": -1.0}, {"tol": "small"}],
    ids=str,
)
def test_settings_out_of_range(solve: Any, options: Any) -> None:
    with pytest.raises(errors.HyperparameterError, match="maxiter" if "maxiter" in options else "tol"):
        solve(lambda x: x, torch.ones(2), **options)
    with pytest.raises(errors.HyperparameterError, match="needs `maxiter=`"):
        cg(lambda x: x, torch.ones(2), tol=None)
