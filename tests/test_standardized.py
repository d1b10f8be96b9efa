"""Standardization with its own backward: every derivative of the elementary operations, alone and for all tasks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import Kernels, close
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from statelessify import adapt_tasks, optim, over_tasks, stateless
from statelessify.rules._standardized import _by_elementary_operations, standardized

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


class Case(NamedTuple):
    args: tuple[Tensor, ...]
    dims: list[int]
    affine: tuple[bool, bool]
    mapped: tuple[bool, ...]

    def call(self, function: Any, args: Any) -> tuple[Tensor, ...]:
        x, *rest = args
        remaining = iter(rest)
        weight, bias = (next(remaining) if there else None for there in self.affine)
        return function(x, self.dims, 1e-3, weight, bias)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """An input, what is standardized together in it, and a weight and a bias that broadcast to it."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    dims = draw(st.lists(st.integers(-len(shape), -1), min_size=1, unique=True))
    affine = draw(st.tuples(st.booleans(), st.booleans()))
    args = [torch.randn(shape)]
    for there in affine:
        if there:
            kept = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
            own = [size if keep else 1 for size, keep in zip(shape, kept, strict=True)]
            args.append(torch.randn(own[draw(st.integers(0, len(own))) :]))
    mapped = (True, *(draw(st.booleans()) for _ in args[1:]))
    return Case(tuple(args), dims, affine, mapped)


def derivatives(outs: tuple[Tensor, ...], leaves: list[Tensor], order: int) -> list[Tensor]:
    """The result, and the gradients of a number made of it, of a number made of these, and so on."""
    found = [outs[0]]
    values: list[Tensor] = [outs[0]]
    for _ in range(order):
        total = sum((v.sin() * torch.linspace(1, 2, v.numel()).view(v.shape)).sum() for v in values)
        values = list(torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True))
        found += values
    return found


@given(cases())
def test_four_derivatives(case: Case) -> None:
    results = []
    for function in (standardized, _by_elementary_operations):
        leaves = [arg.detach().requires_grad_() for arg in case.args]
        results.append(derivatives(case.call(function, leaves), leaves, 4))
    close(*results, 1e-7)


@given(cases(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_only_some_need_a_gradient_and_nothing_is_recorded(case: Case, needed: list[bool]) -> None:
    """The first backward pass may write in place: it does not write into what it returns."""
    results = []
    for function in (standardized, _by_elementary_operations):
        leaves = [arg.detach().requires_grad_(n) for arg, n in zip(case.args, needed, strict=False)]
        out, mean, var = case.call(function, leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(out.sin().sum(), wanted) if wanted else ()
        results.append([out, mean, var, *found])
    close(*results)


@given(cases(), st.integers(1, 3))
def test_all_tasks_at_once(case: Case, tasks: int) -> None:
    pairs = list(zip(case.args, case.mapped, strict=True))
    stacked = [torch.stack([arg * (1 + n) for n in range(tasks)]) if m else arg for arg, m in pairs]
    results = []
    for together in (True, False):
        leaves = [arg.detach().requires_grad_() for arg in stacked]
        if together:
            in_dims = (tuple(0 if m else None for m in case.mapped),)
            outs = vmap(lambda args: case.call(standardized, args), in_dims=in_dims)(tuple(leaves))
        else:
            rows = [[leaf[n] if m else leaf for leaf, m in zip(leaves, case.mapped, strict=True)] for n in range(tasks)]
            columns = [case.call(_by_elementary_operations, row) for row in rows]
            outs = tuple(torch.stack(column) for column in zip(*columns, strict=True))
        results.append([*outs, *derivatives(outs, leaves, 3)])
    close(*results, 1e-8)


@given(cases())
def test_inside_other_transforms(case: Case) -> None:
    number = lambda function: lambda *args: case.call(function, args)[0].sin().sum()
    where = tuple(range(len(case.args)))
    ours, plain = (grad(number(f), where)(*case.args) for f in (standardized, _by_elementary_operations))
    close(ours, plain)
    ours, plain = (jvp(number(f), case.args, case.args) for f in (standardized, _by_elementary_operations))
    close(ours, plain)
    twice = [torch.stack([arg, arg + 1]) for arg in case.args]
    four = [torch.stack([arg, 2 * arg]) for arg in twice]
    ours, plain = (vmap(vmap(number(f)))(*four) for f in (standardized, _by_elementary_operations))
    close(ours, plain)
    ours, plain = (vmap(grad(number(f), where))(*twice) for f in (standardized, _by_elementary_operations))
    close(ours, plain)


def test_fused_once_for_all_tasks() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    apply, params, buffers = stateless(net)
    with Kernels() as kernels:
        adapt_tasks(
            lambda p, x: apply(p, buffers, x)[0].square().mean() ** 2,
            params,
            torch.randn(3, 4, 2),
            optimizer=optim.sgd(lr=0.1),
            steps=1,
        )
    assert len(kernels.names) < 160


def kept_by(function: Any, *args: Tensor) -> int:
    """Bytes that the graph of a gradient holds."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = function(*args).sin().sum()
        grads = torch.autograd.grad(total, args, create_graph=True)
    assert all(gradient.requires_grad for gradient in grads)
    return sum(storage.nbytes() for storage in storages.values())


def test_the_graph_keeps_no_more_than_that_of_the_fused_norm() -> None:
    x, weight, bias = torch.randn(64, 32), torch.randn(32), torch.randn(32)
    args = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    ours = kept_by(lambda x, w, b: standardized(x, [-1], 1e-5, w, b)[0], *args)
    assert ours <= kept_by(lambda x, w, b: F.layer_norm(x, (32,), w, b), *args)


@pytest.mark.parametrize("affine", [True, False])
def test_the_result_may_be_written_into(affine: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=affine), nn.ReLU(inplace=True), nn.Linear(3, 1))
    apply, params, buffers = stateless(net)
    x = torch.randn(4, 5, 2)

    def loss(params: Any, x: Tensor) -> Tensor:
        return apply(params, buffers, x)[0].square().mean()

    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2}
    results = []
    for backend in ("vmap", "loop"):
        adapted = adapt_tasks(loss, params, x, backend=backend, **options)
        total = over_tasks(loss, in_dims=0, backend=backend)(adapted.params, x).sum()
        results.append(torch.autograd.grad(total, list(params.values())))
    close(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    x, w, b = (3 + torch.randn(6, 8)).to(dtype), torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    found = over_tasks(lambda x, w, b: F.layer_norm(x, (8,), w, b), in_dims=(0, None, None), backend="vmap")(
        torch.stack([x, x]), w, b
    )
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[0], F.layer_norm(x, (8,), w, b), rtol=tolerance, atol=tolerance)
