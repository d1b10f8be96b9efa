"""Properties of inner loops, of the modes of their meta-gradients and of implicit solves, over what the kit draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live import rule_of, settings_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import (
    FirstOrder,
    ForwardMode,
    Implicit,
    Unroll,
    adapt,
    adapt_tasks,
    compare_modes,
    compiled,
    implicit,
    optim,
    over_tasks,
)
from statelessify.testing import (
    assert_trees_close,
    check_grads,
    check_meta_grads,
    check_modes,
    check_over_tasks,
    optimizers,
    problems,
    tensors,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of torch's vmap, for some layers
    pytest.mark.filterwarnings("ignore:`FirstOrder"),  # passes no gradient to the data
    pytest.mark.filterwarnings("ignore:torch.vmap cannot batch"),  # cross entropy with weights and label smoothing
]
WIDE = torch.float64
MODES = st.sampled_from([Unroll(), Unroll(checkpoint_every=1), Unroll(checkpoint_every=2), FirstOrder()])
DIRECTIONS = 600
CHUNKS = st.sampled_from([None, 1, 2])


def some(share: int) -> settings:
    return settings(max_examples=max(settings().max_examples // share, 3))


def loops(**options: Any) -> st.SearchStrategy[tuple[Any, Any]]:
    """Problems in float64, and optimizers of their parameters."""
    drawn = problems(dtype=WIDE, max_depth=1, max_tasks=3, **options).filter(has_second_derivative)
    smooth = options.get("smooth", False)

    def trained(problem: Any) -> st.SearchStrategy[tuple[Any, Any]]:
        rules = optimizers(params=problem.params, smooth=smooth).filter(is_well_conditioned)
        return st.tuples(st.just(problem), rules)

    return drawn.flatmap(trained)


def is_well_conditioned(optimizer: Any) -> bool:
    """A centered square is a small difference of large numbers, of which each order of sums has other digits."""
    return not settings_of(optimizer).get("centered")


def is_small(drawn: Any) -> bool:
    """Whether there are no more numbers than `ForwardMode` takes here."""
    return sum(leaf.numel() for leaf in drawn[0].params.values()) <= DIRECTIONS


def repeats(drawn: Any, mode: Any) -> bool:
    """Whether recomputed steps repeat: rules that divide by a gradient's size do not, where that is rounding alone."""
    checkpointed = isinstance(mode, Unroll) and mode.checkpoint_every is not None
    return not checkpointed or rule_of(drawn[1]).name not in ("lion", "rprop", "adagrad", "adamax", "adafactor", "muon")


def has_second_derivative(problem: Any) -> bool:
    """Torch has none of this criterion, and says so."""
    return not isinstance(problem.loss.criterion, nn.MultiMarginLoss)


def first(batches: Any) -> Any:
    return tuple(leaf[0] for leaf in batches)


def with_buffers(loss: Any) -> Any:
    """The loss of a problem with its buffers as the carry."""

    def carried(params: Any, buffers: Any, batch: Any) -> tuple[Tensor, Any]:
        x, y = batch
        out, buffers = loss.apply(params, buffers, x)
        return loss.criterion(out, y), buffers

    return carried


# One task ------------------------------------------------------------------------------------------------------------


@some(3)
@given(loops(), st.integers(0, 3), MODES)
def test_the_inner_loop_is_a_plain_loop(drawn: Any, steps: int, mode: Any) -> None:
    (loss, params, supports, *_), optimizer = drawn
    batch, carried = first(supports), with_buffers(loss)
    adapted = adapt(carried, params, batch, optimizer=optimizer, steps=steps, gradient=mode, carry=loss.buffers)
    now, state, buffers, losses = params, optimizer.init(params), loss.buffers, []
    for _ in range(steps):
        value, buffers = carried(now, buffers, batch)
        found = torch.autograd.grad(value, list(now.values()), materialize_grads=True)
        now, state = optimizer.step(now, dict(zip(now, found, strict=True)), state)
        now = {name: leaf.detach().requires_grad_() for name, leaf in now.items()}
        losses.append(value)
    expected = now, state.slots, torch.stack(losses) if losses else torch.zeros(0, dtype=WIDE), buffers
    assert_trees_close((adapted.params, adapted.opt_state.slots, adapted.losses, adapted.carry), expected)
    assert int(adapted.opt_state.step) == steps


@some(4)
@given(loops(), st.integers(1, 2), st.integers(1, 2), MODES)
def test_a_loop_goes_on_where_it_stopped(drawn: Any, before: int, after: int, mode: Any) -> None:
    """Numbers and the exact meta-gradient."""
    assume(repeats(drawn, mode))
    (loss, params, supports, queries, _), optimizer = drawn
    batch, query, carried = first(supports), first(queries), with_buffers(loss)
    options: Any = {"optimizer": optimizer, "gradient": mode}
    whole = adapt(carried, params, batch, steps=before + after, carry=loss.buffers, **options)
    half = adapt(carried, params, batch, steps=before, carry=loss.buffers, **options)
    rest = adapt(carried, half.params, batch, steps=after, opt_state=half.opt_state, carry=half.carry, **options)
    assert_trees_close(
        (rest.params, rest.opt_state.slots, torch.cat([half.losses, rest.losses]), rest.carry),
        (whole.params, whole.opt_state.slots, whole.losses, whole.carry),
    )
    ours, theirs = (
        torch.autograd.grad(
            carried(found.params, found.carry, query)[0],
            list(params.values()),
            materialize_grads=True,
            allow_unused=True,
        )
        for found in (rest, whole)
    )
    assert_trees_close(ours, theirs)


@some(5)
@given(loops(smooth=True).filter(is_small), st.integers(2, 3), st.data())
def test_each_mode_is_what_it_says(drawn: Any, steps: int, data: st.DataObject) -> None:
    (loss, params, supports, queries, _), optimizer = drawn
    modes = [
        Unroll(truncate=1),
        Unroll(truncate=steps, checkpoint_every=1),
        ForwardMode(max_directions=DIRECTIONS),
        FirstOrder(),
    ]
    mode = data.draw(st.sampled_from(modes))
    check_modes(loss, params, first(supports), first(queries), optimizer=optimizer, steps=steps, modes=[mode], tasks=2)


@some(10)
@given(loops(smooth=True).filter(is_small), st.integers(1, 2), st.booleans())
def test_the_meta_gradient_by_differences(drawn: Any, steps: int, checkpointed: bool) -> None:
    (loss, params, supports, queries, _), optimizer = drawn
    options: Any = {"optimizer": optimizer, "steps": steps}
    mode = Unroll(checkpoint_every=1) if checkpointed else ForwardMode(max_directions=DIRECTIONS)
    check_meta_grads(loss, params, first(supports), first(queries), gradient=mode, entries=1, **options)


# Many tasks ----------------------------------------------------------------------------------------------------------


@some(3)
@given(loops(), st.integers(0, 2), MODES, CHUNKS)
def test_many_tasks_are_a_loop(drawn: Any, steps: int, mode: Any, chunk_size: int | None) -> None:
    """Buffers, with the statistics of batch norms, go from step to step."""
    (loss, params, supports, *_), optimizer = drawn
    options: Any = {"optimizer": optimizer, "steps": steps, "gradient": mode, "carry": loss.buffers}

    def one(params: Any, batch: Any) -> Any:
        adapted = adapt(with_buffers(loss), params, batch, **options)
        return adapted._replace(opt_state=adapted.opt_state.slots)

    def many(params: Any, batches: Any) -> Any:
        adapted = adapt_tasks(with_buffers(loss), params, batches, chunk_size=chunk_size, **options)
        return adapted._replace(opt_state=adapted.opt_state.slots)

    check_over_tasks(one, params, supports, mapped=many)


@some(4)
@given(loops(layers=("linear", "norm", "activation"), training=True), st.integers(1, 2), st.integers(1, 2), CHUNKS)
def test_many_tasks_go_on(drawn: Any, before: int, after: int, chunk_size: int | None) -> None:
    """``in_dims=0`` with the state and the carry of an earlier call."""
    (loss, params, supports, *_), optimizer = drawn
    carried, options = with_buffers(loss), {"optimizer": optimizer, "chunk_size": chunk_size}

    def one(params: Any, batch: Any) -> Any:
        adapted = adapt(carried, params, batch, optimizer=optimizer, steps=before + after, carry=loss.buffers)
        return adapted.params, adapted.opt_state.slots, adapted.losses, adapted.carry

    def many(params: Any, batches: Any) -> Any:
        half = adapt_tasks(carried, params, batches, steps=before, carry=loss.buffers, **options)
        rest = adapt_tasks(
            carried, half.params, batches, steps=after, in_dims=0, opt_state=half.opt_state, carry=half.carry, **options
        )
        return rest.params, rest.opt_state.slots, torch.cat([half.losses, rest.losses], 1), rest.carry

    check_over_tasks(one, params, supports, mapped=many)


# Implicit ------------------------------------------------------------------------------------------------------------


@st.composite
def systems(draw: st.DrawFn) -> dict[str, Any]:
    """A right-hand side of one or two leaves, and the root of a matrix with eigenvalues from 0.5 to 1.5."""
    sizes = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    size = sum(sizes)
    root = draw(tensors((size, size), dtype=WIDE, min_value=-1, max_value=1))
    b = {f"b{k}": draw(tensors((n,), dtype=WIDE, min_value=1, max_value=2)) for k, n in enumerate(sizes)}
    return {"root": root, "b": b}


def matrix(root: Tensor) -> Tensor:
    return 0.5 * torch.eye(len(root), dtype=WIDE) + root @ root.T / len(root) ** 2


def times(root: Tensor, x: dict[str, Tensor]) -> dict[str, Tensor]:
    product = matrix(root) @ torch.cat(list(x.values()))
    return dict(zip(x, product.split([len(part) for part in x.values()]), strict=True))


@some(6)
@given(systems(), st.sampled_from([implicit.cg, implicit.neumann, implicit.dense]), st.sampled_from([0.0, 0.25]))
def test_solutions(system: Any, solve: Any, ridge: float) -> None:
    def solved(tree: Any) -> Any:
        return solve(lambda x: times(tree["root"], x), tree["b"], ridge=tree["ridge"])

    tree = {**system, "ridge": torch.tensor(ridge, dtype=WIDE)}
    found = solved(tree)
    shifted = matrix(tree["root"]) + ridge * torch.eye(len(tree["root"]), dtype=WIDE)
    expected = torch.linalg.solve(shifted, torch.cat(list(tree["b"].values())))
    assert_trees_close(torch.cat(list(found.values())), expected, rtol=1e-8, atol=1e-8)
    check_grads(solved, tree, order=1, modes=("reverse",), entries=1)


@some(20)
@given(systems(), st.sampled_from([implicit.cg, implicit.dense]))
def test_roots(system: Any, solve: Any) -> None:
    """The minimum of a quadratic with a small quartic term, which another library's loop finds without a graph."""

    def slope(x: Any, root: Tensor, b: Any) -> Any:
        return {name: each + 0.05 * x[name] ** 3 - b[name] for name, each in times(root, x).items()}

    @implicit.custom_root(slope, solve=solve)
    def minimum(x: Any, root: Tensor, b: Any) -> Any:
        root, b = root.detach(), tree_map(Tensor.detach, b)
        for _ in range(100):
            moved = slope(x, root, b)
            x = {name: value - 0.5 * moved[name] for name, value in x.items()}
        return x

    def found(tree: Any) -> Any:
        return minimum(tree_map(lambda leaf: torch.zeros_like(leaf), tree["b"]), tree["root"], tree["b"])

    start = found(system)
    assert all(leaf.abs().max() < 1e-8 for leaf in tree_leaves(slope(start, system["root"], system["b"])))
    check_grads(found, system, order=1, modes=("reverse",), entries=1)


@some(10)
@given(systems(), st.sampled_from([implicit.cg, implicit.neumann, implicit.dense]), st.booleans())
def test_a_settled_loop_is_differentiated_implicitly(system: Any, solve: Any, learned: bool) -> None:
    """A quadratic: its minimum is the solution of the system, whatever the start and the rate."""
    root = system["root"].requires_grad_(learned)

    def loss(x: Any, b: Any) -> Tensor:
        product = times(root, x)
        return torch.stack([(x[name] * (0.5 * product[name] - b[name])).sum() for name in x]).sum()

    start = tree_map(torch.zeros_like, system["b"])
    options: Any = {"optimizer": optim.sgd(lr=1.0), "steps": 40}
    mode = Implicit(solve=solve)
    check_modes(loss, start, system["b"], modes=[mode], tasks=2, **options)
    b = tree_map(lambda leaf: leaf.clone().requires_grad_(), system["b"])
    adapted = adapt(loss, start, b, gradient=mode, **options).params
    total = torch.cat(list(adapted.values())).sum()
    inverse = torch.linalg.inv(matrix(root.detach()))
    found = torch.cat(torch.autograd.grad(total, list(b.values())))
    assert_trees_close(found, inverse.sum(0), rtol=1e-7, atol=1e-7)


@some(10)
@given(loops(smooth=True).filter(is_small), st.integers(1, 2))
def test_modes_are_compared(drawn: Any, steps: int) -> None:
    (loss, params, supports, queries, _), optimizer = drawn

    def meta_loss(params: Any, gradient: Any) -> Tensor:
        adapted = adapt(loss, params, first(supports), optimizer=optimizer, steps=steps, gradient=gradient)
        return loss(adapted.params, first(queries)) + torch.stack([p.sum() for p in adapted.params.values()]).sum()

    modes = {
        "again": Unroll(checkpoint_every=1),
        "carried": ForwardMode(max_directions=DIRECTIONS),
        "first": FirstOrder(),
    }
    found = compare_modes(meta_loss, params, modes, rounds=1)
    assert list(found) == ["Unroll()", *modes]
    assert [row.error for row in found.values()] == [None] * 4
    assert all(row.relative_error < 1e-10 and row.cosine > 1 - 1e-10 for name, row in found.items() if name != "first")
    exact, cheap = (
        torch.cat([g.flatten() for g in torch.autograd.grad(meta_loss(params, mode), list(params.values()))])
        for mode in (Unroll(), FirstOrder())
    )
    assert abs(found["first"].relative_error - (cheap - exact).norm() / exact.norm()) < 1e-9


# Compiled steps ------------------------------------------------------------------------------------------------------


@some(20)
@given(loops(), st.integers(1, 2), st.booleans())
def test_compiled_steps_are_the_plain_ones(drawn: Any, steps: int, many: bool) -> None:
    """Numbers and the exact meta-gradient, by a backend that runs what it is given."""
    (loss, params, supports, queries, _), optimizer = drawn
    torch.compiler.reset()

    def found(loss: Any) -> Any:
        torch.manual_seed(0)
        if many:
            adapted = adapt_tasks(loss, params, supports, optimizer=optimizer, steps=steps)
            value = over_tasks(loss, in_dims=0)(adapted.params, queries).mean()
        else:
            adapted = adapt(loss, params, first(supports), optimizer=optimizer, steps=steps)
            value = loss(adapted.params, first(queries))
        slopes = torch.autograd.grad(value, list(params.values()), materialize_grads=True, allow_unused=True)
        return adapted.params, adapted.opt_state.slots, adapted.losses, value, slopes

    assert_trees_close(found(compiled(loss, backend="eager")), found(loss))
