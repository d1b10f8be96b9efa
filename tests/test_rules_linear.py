"""`linear` with weights per task: the numbers of a loop, in every shape, dtype and derivative, nested too."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import Kernels, close, ruled
from torch import Tensor
from torch.func import grad, vmap

from statelessify import over_tasks
from statelessify.rules import rule

pytestmark = pytest.mark.usefixtures("float64")


class Case(NamedTuple):
    args: list[Tensor]
    in_dims: tuple[int | None, ...]
    tasks: int

    def of_task(self, args: Any, index: int) -> list[Tensor]:
        return [a if dim is None else a.select(dim, index) for a, dim in zip(args, self.in_dims, strict=True)]


@st.composite
def linears(draw: st.DrawFn) -> Case:
    """Arguments of `linear`, some of them per task, in any dimension."""
    sizes = st.integers(1, 3)
    tasks, features, outputs = draw(st.tuples(sizes, sizes, sizes))
    rows = draw(st.lists(st.integers(0, 3), max_size=3))
    shapes = [[*rows, features], [outputs, features], *draw(st.sampled_from([[], [[outputs]], [[1]]]))]
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.complex128]))
    args, dims = [], []
    for shape in shapes:
        dim = draw(st.one_of(st.none(), st.integers(0, len(shape))))
        full = shape if dim is None else [*shape[:dim], tasks, *shape[dim:]]
        expanded = dim is not None and draw(st.booleans())
        value = torch.randn(shape if expanded else full, dtype=dtype)
        args.append(value.unsqueeze(dim).expand(full) if expanded else value)
        dims.append(dim)
    if dims == [None] * len(dims):
        args[1], dims[1] = torch.randn(tasks, outputs, features, dtype=dtype), 0
    return Case(args, tuple(dims), tasks)


def wave(out: Tensor) -> Tensor:
    """A number of which no derivative is zero, and in which each entry counts differently."""
    weights = torch.linspace(1, 2, out.numel()).view(out.shape)
    return ((out * out.conj() + 1) * out * weights).real.sum()


def twice(out: Tensor, args: list[Tensor]) -> list[Tensor]:
    """The first derivatives, and those of a number made of them."""
    leaves = [a for a in args if a.requires_grad]
    first = torch.autograd.grad(wave(out), leaves, create_graph=True, materialize_grads=True)
    total = sum((wave(g) for g in first), torch.zeros(()))
    return [*first, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


@given(linears())
def test_two_derivatives_are_those_of_a_loop(case: Case) -> None:
    def run(together: bool) -> list[Tensor]:
        args = [a.detach().requires_grad_() for a in case.args]
        if together:
            out = vmap(ruled(F.linear), in_dims=case.in_dims)(*args)
        else:
            out = torch.stack([F.linear(*case.of_task(args, index)) for index in range(case.tasks)])
        return [out, *twice(out, args)]

    close(run(True), run(False))


@given(linears(), linears())
def test_nested_levels(outer: Case, inner: Case) -> None:
    """Each argument has the tasks of the inner level, some of the outer level too."""
    pairs = zip(inner.args, outer.in_dims, strict=False)
    sets = [torch.stack([a, 2 * a]) if dim is not None else a for a, dim in pairs]
    sets += inner.args[len(sets) :]
    dims = [0 if dim is not None else None for dim in outer.in_dims[: len(inner.args)]]
    dims += [None] * (len(inner.args) - len(dims))
    if dims == [None] * len(dims):
        sets[0], dims[0] = torch.stack([sets[0], sets[0] + 1]), 0
    found = vmap(vmap(ruled(F.linear), in_dims=inner.in_dims), in_dims=tuple(dims))(*sets)
    rows = [[a if dim is None else a[index] for a, dim in zip(sets, dims, strict=True)] for index in range(2)]
    expected = [torch.stack([F.linear(*inner.of_task(row, task)) for task in range(inner.tasks)]) for row in rows]
    close(found, torch.stack(expected))


@given(linears())
def test_functional_gradients(case: Case) -> None:
    total = lambda *args: wave(ruled(F.linear)(*args))
    where = tuple(range(len(case.args)))
    found = vmap(grad(total, argnums=where), in_dims=case.in_dims)(*case.args)
    rows = [case.of_task(case.args, index) for index in range(case.tasks)]
    expected = [grad(lambda *args: wave(F.linear(*args)), argnums=where)(*row) for row in rows]
    close(list(found), [torch.stack(column) for column in zip(*expected, strict=True)])


def test_one_operation_for_all_tasks() -> None:
    x, w, b = torch.randn(3, 5, 2), torch.randn(3, 4, 2), torch.randn(3, 4)
    with Kernels() as kernels:
        vmap(ruled(F.linear))(x, w, b)
    assert [name for name in kernels.names if "mm" in name or name in ("add", "mul")] == ["baddbmm"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, w, b = ((4 * torch.randn(*shape)).to(dtype) for shape in ([3, 5, 2], [3, 4, 2], [3, 4]))
    found, expected = vmap(ruled(F.linear))(x, w, b), torch.stack([F.linear(*row) for row in zip(x, w, b, strict=True)])
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_autocast_chooses_the_dtype() -> None:
    x, w, b = (torch.randn(*shape, dtype=torch.float32) for shape in ([3, 5, 2], [3, 4, 2], [3, 4]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = vmap(ruled(F.linear))(x, w, b), vmap(F.linear)(x, w, b)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


SHAPES: Any = [
    ([], [4, 2], [4]),  # no features
    ([], [4, 1], [4]),
    ([5, 3], [4, 2], [4]),  # other features
    ([5, 2], [4, 2], [3]),  # another bias
    ([5, 2], [2], None),  # a row of weights
    ([2], [2], []),
    ([5, 2], [4, 2], []),  # a bias without dimensions
    ([3, 2], [4, 2], [3, 4]),  # a bias of more
    ([5, 2], [4, 2, 1], None),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_odd_shapes_are_what_they_are_in_a_loop(shapes: Any) -> None:
    for tasks in (1, 3):
        args = [torch.randn(tasks, *shape) for shape in shapes if shape is not None]
        results: list[Any] = []
        for backend in ("loop", "vmap"):
            try:
                results.append(over_tasks(F.linear, in_dims=0, backend=backend)(*args))
            except RuntimeError as error:
                results.append(error)
        loop, mapped = results
        assert isinstance(mapped, Exception) if isinstance(loop, Exception) else close(mapped, loop) is None


@pytest.mark.usefixtures("registry")
def test_a_rule_of_the_user_replaces_it() -> None:
    rule(F.linear, why="a test")(lambda x, w, b=None: x.sum() + 7)
    assert over_tasks(F.linear, in_dims=0, backend="vmap")(torch.ones(2, 3), torch.ones(2, 1, 3)).tolist() == [10, 10]
