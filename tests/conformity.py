"""What every module must do as a pure function, checked against ordinary modules and eager autograd.

Each check in `CHECKS` takes a `Case`; it returns where the numbers agree, raises an AssertionError (or what the library
raised) where they do not, and `NotApplicable` where eager autograd itself has no such derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from conformance_report import NotApplicable
from eager import (
    STEP,
    dense,
    derivative,
    differentiable,
    direction,
    grads,
    inner,
    moved,
    pushforward,
    scalar,
    where_finite,
)
from ordinary import TASKS, Case, Ordinary, Values, chosen, is_real, leaves_of, seeded, stack, stacked
from torch import Tensor
from torch.func import grad_and_value, jvp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from zoo import fingerprint, tensors_in

from statelessify import over_tasks, stateless

__all__ = ["CHECKS", "Case", "NotApplicable"]


def close(actual: Any, expected: Any, what: str, tolerance: float = 1e-9) -> None:
    """Equal numbers; NaN where the ordinary module gives NaN, and nowhere else."""
    message = lambda text: f"{what}: {text}"
    found = {"rtol": tolerance, "atol": tolerance, "equal_nan": True, "check_stride": False, "msg": message}
    assert_close(actual, expected, **found)


@functools.lru_cache(maxsize=1)
def pure(case: Case) -> Callable[[Values], tuple[list[Tensor], dict[str, Tensor]]]:
    """The module as a function of one flat dict, to the tensors of its output and the new buffers."""
    apply = stateless(case.module).apply

    def call(values: Values) -> tuple[list[Tensor], dict[str, Tensor]]:
        inputs = {n: v.clone() for n, v in values.items() if n.startswith("inputs/")}  # it may write into them
        args, kwargs = case.inputs(inputs)
        out, new_buffers = apply(*trees(values), *args, **kwargs)
        return tensors_in(out), new_buffers

    return call


def trees(values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`params` and `buffers` for `apply`."""
    params, buffers = (
        {n.removeprefix(kind): v for n, v in values.items() if n.startswith(kind)} for kind in ("params/", "buffers/")
    )
    return params, buffers


def mapped(function: Callable[[Values], Any], tasks: list[Values], names: Iterable[str], draws: str = "same") -> Any:
    """`torch.vmap` over these names, as a function of `stacked`."""
    return vmap(function, in_dims=({n: 0 if n in set(names) else None for n in tasks[0]},), randomness=draws)


def loss(case: Case, fixed: Values) -> Callable[[Values], Tensor]:
    """`scalar` of the output, as a function of what is differentiated."""
    return lambda values: scalar(pure(case)(fixed | values)[0])


def of_gradient(case: Case, fixed: Values) -> Callable[[Values], Tensor]:
    """`scalar` of the gradient."""
    return lambda values: scalar(grad_and_value(loss(case, fixed))(values)[0].values())


def agree(case: Case, function: Callable[[Values], Any], at: Values, expected: Any, what: str) -> None:
    """``function(at)``, gradients and values, equals what eager autograd says.

    Dropout fills a mask in the order of memory, and that may differ under a transform: the same seed is another mask.
    Such a gradient is compared with differences of the value, which has the same mask in each call of `function`; that
    the value itself is right is seen in evaluation mode.
    """
    gradient, value = seeded(function, at)
    expected_gradient, expected_value = expected
    if case.random and not torch.allclose(value, expected_value, equal_nan=True):
        tangents = direction(at, gradient)
        after, before = (seeded(function, moved(at, tangents, step))[1] for step in (STEP, -STEP))
        close(inner(gradient, tangents, tuple(value.shape)), (after - before) / (2 * STEP), f"{what}, slope", 1e-5)
        return
    close([{n: dense(g) for n, g in gradient.items()}, value], [expected_gradient, expected_value], what)


# ---------------------------------------------------------------- one call


def forward(case: Case) -> None:
    """An ordinary copy with other values in it gives the same output in the same structure."""
    (values,) = case.tasks(case.values, 1)
    expected = Ordinary(case, values)
    apply, params, buffers = stateless(case.module)
    assert {f"params/{n}" for n in params} == set(case.names("params"))
    assert {f"buffers/{n}" for n in buffers} == set(case.names("buffers"))
    args, kwargs = case.inputs({n: v.clone() for n, v in values.items()})
    given = values | leaves_of(values, case.names("params"))  # a module may ask whether they require a gradient
    out, _ = seeded(lambda: apply(*trees(given), *args, **kwargs))
    (leaves, spec), (expected_leaves, expected_spec) = tree_flatten(out), tree_flatten(expected.out)
    assert spec == expected_spec
    assert [type(leaf) for leaf in leaves] == [type(leaf) for leaf in expected_leaves]
    close(tensors_in(out), expected.tensors, "output")


def gradient(case: Case) -> None:
    """Of a function of all outputs, with respect to parameters and floating inputs; by autograd, and `func.grad`."""
    wrt = differentiable(case, 1)
    (values,) = case.tasks(case.values, 1)
    expected = derivative(case, values, wrt)
    leaves = leaves_of(values, wrt)
    value = seeded(loss(case, values), leaves)
    close([grads(value, leaves), value], list(expected), "autograd.grad")
    agree(case, grad_and_value(loss(case, values)), chosen(values, wrt), expected, "func.grad")


def purity(case: Case) -> None:
    """Nothing that was passed changes; new buffers are those of an ordinary call; a second call repeats the first."""
    before = fingerprint(case.module)
    apply, own, _ = stateless(case.module)
    assert all(any(p is mine for mine in case.module.parameters()) for p in own.values()), "not the module's own"
    (values,) = case.tasks(case.values, 1)
    expected = Ordinary(case, values)
    (params, buffers), (args, kwargs) = trees(values), case.inputs(values)
    other_args, other_kwargs = case.inputs({n: v.clone() for n, v in values.items()})
    passed, inputs = [params, buffers], [args, kwargs]
    trees_before, inputs_before = fingerprint(passed), fingerprint(inputs)
    out, new_buffers = seeded(lambda: apply(params, buffers, *args, **kwargs))
    close(new_buffers, expected.buffers, "new buffers")
    if expected.kept_inputs:  # else the module writes into its input, and the caller asked for it
        assert fingerprint(inputs) == inputs_before, "an input has changed"
    again = seeded(lambda: apply(params, buffers, *other_args, **other_kwargs))
    close([tensors_in(again[0]), again[1]], [tensors_in(out), new_buffers], "second call", 0)
    assert fingerprint(case.module) == before, "the module has changed"
    assert fingerprint(passed) == trees_before, "`params` or `buffers` has changed"


# ---------------------------------------------------------------- many tasks


def vmap_params(case: Case) -> None:
    """An ensemble on one batch."""
    _check_vmap(case, case.names("params"))


def vmap_params_inputs(case: Case) -> None:
    """With a batch for each; then with indices, lengths and masks for each, too."""
    names = case.names("params") + case.names("inputs", real=True)
    whole = case.names("inputs", real=False)
    if names or not whole:
        _check_vmap(case, names)
    if whole:
        _check_vmap(case, names + whole, ", indices and masks too")


def vmap_everything(case: Case) -> None:
    """Buffers of their own as well, but for counters: a module may read them as numbers. By vmap, and `over_tasks`."""
    names = case.names("params", "inputs") + case.names("buffers", real=True)
    _check_vmap(case, names, ", indices and masks too" if case.names("inputs", real=False) else "")
    tasks = case.tasks(names)
    at = {n: v if n in names else v.expand(TASKS, *v.shape) for n, v in stacked(tasks, names).items()}
    over = over_tasks(pure(case), in_dims=0, backend="vmap", randomness="same")
    _compare(case, seeded(over, at), tasks, "over_tasks")


def _check_vmap(case: Case, names: list[str], more: str = "") -> None:
    if not names:
        raise NotApplicable("it has no such tensors")
    tasks = case.tasks(names)
    what = f"vmap over {', '.join(sorted({n.partition('/')[0] for n in names}))}{more}"
    _compare(case, seeded(mapped(pure(case), tasks, names), stacked(tasks, names)), tasks, what)
    for draws in ("same", "different") if case.random else ():
        twins = [tasks[0]] * TASKS
        outs, _ = seeded(mapped(pure(case), twins, names, draws), stacked(twins, names))
        rows = [torch.cat([out[i].flatten().double() for out in outs]) for i in range(TASKS)]
        alike = [torch.equal(rows[0], row) for row in rows[1:]]
        assert alike == [draws == "same"] * (TASKS - 1), f"{what}: the draws are not {draws!r}"


def _compare(case: Case, found: Any, tasks: list[Values], what: str) -> None:
    calls = [Ordinary(case, task) for task in tasks]
    expected = stack([[call.tensors, call.buffers] for call in calls])
    if not case.random:
        close(list(found), expected, what)
        return
    # There may be other masks than in the loop, see `agree`; whether they are as asked is checked beside this.
    assert [out.shape for out in found[0]] == [out.shape for out in expected[0]], what
    assert found[1].keys() == expected[1].keys(), what


def vmap_grad(case: Case) -> None:
    """`vmap(func.grad)` over parameters and inputs; and autograd outside of vmap, as `adapt_tasks` takes it."""
    wrt = differentiable(case, 1)
    tasks = case.tasks(wrt)
    expected = stack([derivative(case, task, wrt) for task in tasks])
    function = mapped(lambda v: grad_and_value(loss(case, v))(chosen(v, wrt)), tasks, wrt)
    agree(case, function, stacked(tasks, wrt), expected, "vmap(grad)")
    forwards = mapped(lambda v: loss(case, v)(chosen(v, wrt)), tasks, wrt)

    def outside(values: Values) -> tuple[Values, Tensor]:
        leaves = leaves_of(values, wrt)
        per_task = forwards(values | leaves)
        return grads(per_task.sum(), leaves), per_task.detach()

    agree(case, outside, stacked(tasks, wrt), expected, "autograd.grad of vmap")


# ---------------------------------------------------------------- second order


def second_order(case: Case) -> None:
    """The gradient of a function of the gradient; by autograd twice, and `func.grad` twice."""
    wrt = differentiable(case, 2)
    (values,) = case.tasks(case.values, 1)
    expected = derivative(case, values, wrt, 2)
    agree(case, grad_and_value(of_gradient(case, values)), chosen(values, wrt), expected, "grad(grad)")
    leaves = leaves_of(values, wrt)
    value = scalar(grads(seeded(loss(case, values), leaves), leaves, create_graph=True).values())
    close([grads(value, leaves), value], list(expected), "autograd.grad twice")


def vmap_second_order(case: Case) -> None:
    """`vmap(func.grad(func.grad))`."""
    wrt = differentiable(case, 2)
    tasks = case.tasks(wrt)
    expected = stack([derivative(case, task, wrt, 2) for task in tasks])
    function = mapped(lambda v: grad_and_value(of_gradient(case, v))(chosen(v, wrt)), tasks, wrt)
    agree(case, function, stacked(tasks, wrt), expected, "vmap(grad(grad))")


def grad_of_vmap_of_grad(case: Case) -> None:
    """A meta-gradient: parameters are shared, each task has its own inputs; by `func.grad`, and by autograd outside."""
    wrt = differentiable(case, 2)
    own = [n for n in wrt if n.startswith("inputs/")] or wrt
    tasks = case.tasks(own)
    at = chosen(stacked(tasks, own), wrt)
    shares = torch.linspace(0.5, 1.5, TASKS)

    def meta(values: Values) -> Tensor:
        per_task = mapped(of_gradient(case, tasks[0]), [chosen(tasks[0], wrt)], own)
        return (per_task(values) * shares).sum()

    rows, values = stack([derivative(case, task, wrt, 2) for task in tasks])
    weighted = {n: row * shares.view(-1, *[1] * (row.ndim - 1)) for n, row in rows.items()}
    expected = {n: row if n in own else row.sum(0) for n, row in weighted.items()}, (values * shares).sum()

    def outside(values: Values) -> tuple[Values, Tensor]:
        leaves = leaves_of(values, wrt)
        value = meta(leaves)
        return grads(value, leaves), value.detach()

    agree(case, grad_and_value(meta), at, expected, "grad(vmap(grad))")
    agree(case, outside, at, expected, "autograd.grad of vmap(grad)")


# ---------------------------------------------------------------- forward mode


def forward_mode(case: Case) -> None:
    """`func.jvp` with respect to parameters and floating inputs."""
    wrt = differentiable(case, 1)
    (values,) = case.tasks(case.values, 1)
    tangents = where_finite(direction(values, wrt, smooth=case.random), derivative(case, values, wrt)[0])
    outputs = lambda v: [out for out in pure(case)(values | v)[0] if is_real(out)]
    push = lambda at: seeded(jvp, outputs, (chosen(at, wrt),), (tangents,))
    outs, found = push(values)
    primals = [out.detach() for out in Ordinary(case, values).tensors if is_real(out)]
    if case.random and not all(map(torch.allclose, outs, primals)):  # another mask, as in `agree`
        after, before = (push(moved(values, tangents, step))[0] for step in (STEP, -STEP))
        close(found, [(a - b) / (2 * STEP) for a, b in zip(after, before, strict=True)], "slope", 1e-5)
    else:
        close(outs, primals, "primals")
        some = [
            [t[p.isfinite()] for p, t in zip(primals, of, strict=True)]
            for of in (found, pushforward(case, values, tangents))
        ]
        close(*some, "tangents")


CHECKS: dict[str, Callable[[Case], None]] = {
    "forward": forward,
    "gradient": gradient,
    "purity": purity,
    "vmap params": vmap_params,
    "vmap params, inputs": vmap_params_inputs,
    "vmap everything": vmap_everything,
    "vmap(grad)": vmap_grad,
    "second order": second_order,
    "vmap(second order)": vmap_second_order,
    "grad(vmap(grad))": grad_of_vmap_of_grad,
    "jvp": forward_mode,
}
