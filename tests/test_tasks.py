"""`over_tasks`: forms of `in_dims`, trees in and out, nesting, random numbers, what torch cannot batch, errors."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close, fresh, gradients, norm_problem, pull
from torch import Tensor, nn

from statelessify import adapt, optim, over_tasks, stateless, tree_stack
from statelessify.errors import StatelessifyError, TaskError, TreeError, VmapError

pytestmark = pytest.mark.usefixtures("float64")
ROUTES: Any = pytest.mark.parametrize(
    "route", [{"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}, {}], ids=["vmap", "loop", "chunks", "auto"]
)


class Point(NamedTuple):
    x: Any
    y: Any


# Arguments ---------------------------------------------------------------------------------------------------------


@ROUTES
def test_the_first_argument_is_shared_and_all_others_are_mapped(route: Any) -> None:
    w, a, b = torch.randn(2), torch.randn(3, 2), torch.randn(3)
    found = over_tasks(lambda w, a, b, *, scale=1.0: scale * (w @ a + b), **route)(w, a, b, scale=torch.tensor(2.0))
    assert_close(found, 2 * (a @ w + b))
    assert over_tasks(lambda w, a: w @ a, **route)(w, a).shape == (3,)
    with pytest.raises(TaskError, match="no argument is mapped"):
        over_tasks(lambda w: w, **route)(w)


@ROUTES
@given(seed=st.integers(0, 2**31 - 1), data=st.data())
def test_in_dims_are_those_of_vmap(route: Any, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    dims = data.draw(st.lists(st.one_of(st.none(), st.integers(-3, 2)), min_size=1, max_size=3))
    fn = lambda *args: {"out": torch.stack([arg["t"].cumsum(0) for arg in args]).sum(0), "n": len(args)}
    if all(dim is None for dim in dims):
        dims[0] = 0
    inputs = [{"t": torch.randn(3, 3) if dim is None else torch.randn(3, 3, 3)} for dim in dims]
    in_dims: Any = data.draw(st.sampled_from([tuple(dims), list(dims), tuple({"t": dim} for dim in dims)]))
    expected = torch.vmap(lambda *args: fn(*args)["out"], tuple(dims))(*inputs)
    found = over_tasks(fn, in_dims=in_dims, **route)(*inputs)
    assert_close(found, {"out": expected, "n": len(dims)})


@pytest.mark.parametrize("in_dims", [(0, ...), (0, 0, ...), [0, ...], (0, 0, 0, ...), (0, 0, 0, 0, ...), 0])
def test_an_ellipsis_repeats_the_entry_before_it(in_dims: Any) -> None:
    inputs = torch.randn(3, 4, 2)
    assert_close(over_tasks(lambda a, b, c: a + b * c, in_dims=in_dims)(*inputs), inputs[0] + inputs[1] * inputs[2])


@ROUTES
def test_leaves_that_are_no_tensors_are_shared(route: Any) -> None:
    def fn(config: Any, batch: Any) -> Any:
        assert config["name"] == "sum"
        assert batch["skip"] is None
        assert batch["times"] == 3
        return Point(batch["x"].sum() * batch["times"], {"none": None, "word": config["name"], "pair": (1, [])})

    x = torch.randn(3, 2)
    found = over_tasks(fn, **route)({"name": "sum"}, {"x": x, "skip": None, "times": 3})
    assert_close(found, Point(3 * x.sum(1), {"none": None, "word": "sum", "pair": (1, [])}))
    assert_close(over_tasks(lambda a, n, b: a * b, **route)(torch.tensor(2.0), None, x), 2 * x)


@ROUTES
def test_each_tensor_of_the_result_has_a_leading_task_dimension(route: Any) -> None:
    def fn(w: Tensor, x: Tensor) -> Any:
        return {
            "shared": w,
            "constant": torch.ones(2),
            "shared integer": torch.arange(2),
            "integer": (x > 0).sum(),
            "flag": (x > 0).any(),
            "argument": (w > 0).sum(),
            "argmax": x.argmax(),
            "complex": torch.view_as_complex(torch.stack([x, x], -1)),
        }

    w, x = torch.randn(2), torch.randn(5, 2)
    assert_close(over_tasks(fn, **route)(w, x), tree_stack([fn(w, each) for each in x]))
    one = over_tasks(fn, **route)(w, x[:1])
    assert_close(one, tree_stack([fn(w, x[0])]))


@ROUTES
@pytest.mark.parametrize("rate", [0.1, {"w": 0.1}, lambda step: 0.1 * 0.5**step], ids=["number", "dict", "schedule"])
def test_a_function_that_returns_an_adapted(route: Any, rate: Any) -> None:
    def fn(params: Any, target: Tensor) -> Any:
        lr = (lambda step: rate(step)) if callable(rate) else rate  # a new function for each task
        return adapt(pull, params, target, optimizer=optim.adam(lr=lr), steps=2)

    params, targets = {"w": torch.randn(2)}, torch.randn(5, 2)
    found = over_tasks(fn, **route)(params, targets)
    expected = [fn(params, target) for target in targets]
    assert_close(found.params, tree_stack([each.params for each in expected]))
    assert_close(found.losses, torch.stack([each.losses for each in expected]))
    assert_close(found.opt_state.step, torch.full((5,), 2))
    assert_close(found.opt_state.slots, tree_stack([each.opt_state.slots for each in expected]))


@ROUTES
def test_a_module_with_statistics(route: Any) -> None:
    apply, params, buffers = stateless(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    x = torch.randn(5, 4, 2)
    found = over_tasks(apply, in_dims=(None, None, 0), **route)(params, buffers, x)
    expected = tree_stack([apply(params, buffers, each) for each in x])
    assert_close(found, expected)
    assert_close(buffers["1.running_mean"], torch.zeros(3))
    again = over_tasks(apply, in_dims=(None, 0, 0), **route)(params, found[1], x)
    assert int(again[1]["1.num_batches_tracked"][0]) == 2


@ROUTES
def test_names_and_partials_are_kept(route: Any) -> None:
    assert over_tasks(pull, **route).__name__ == "pull"
    assert_close(over_tasks(partial(torch.mul, torch.ones(2)), in_dims=0, **route)(torch.ones(3, 2)), torch.ones(3, 2))


# Nesting and transforms --------------------------------------------------------------------------------------------


@ROUTES
def test_over_tasks_of_over_tasks(route: Any) -> None:
    def fn(w: Tensor, x: Tensor) -> Any:
        return {"value": w @ x, "count": (x > 0).sum(), "shared": torch.tensor(3)}

    w, x = torch.randn(3, 2), torch.randn(3, 4, 2)
    inner = over_tasks(fn, **route)
    found = over_tasks(inner, in_dims=0, **route)(w, x)
    assert_close(found, tree_stack([tree_stack([fn(a, c) for c in b]) for a, b in zip(w, x, strict=True)]))
    assert_close(torch.vmap(inner)(w, x), found)
    jacobian = torch.func.jacrev(lambda w: over_tasks(inner, in_dims=0, **route)(w, x)["value"].sum())(w)
    assert_close(jacobian, x.sum(1))


@pytest.mark.parametrize("outer", ["backward", "func"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda h, s: F.layer_norm(h, (3,), s),
        lambda h, s: torch.layer_norm(h, (3,), s),
        lambda h, s: torch.native_layer_norm(h, (3,), s, None, 1e-5)[0],
        lambda h, s: F.batch_norm(h, None, None, s, training=True),
        lambda h, s: torch.native_batch_norm(h, s, None, None, None, True, 0.1, 1e-5)[0],
        lambda h, s: F.instance_norm(h.T[None], weight=s)[0].T,
        lambda h, s: F.group_norm(h, 1, s),
        lambda h, s: F.rms_norm(h, (3,), s),
    ],
    ids=["layer", "torch.layer", "native layer", "batch", "native batch", "instance", "group", "rms"],
)
def test_a_gradient_step_of_the_users_own_through_a_norm(norm: Any, outer: str) -> None:
    """Differentiating ``vmap(func.grad(...))`` through these is silently wrong in plain torch."""
    x, c = torch.randn(4, 5, 2), torch.randn(5, 3)

    def loss(p: Any, x: Tensor) -> Tensor:
        return (norm(torch.tanh(x @ p["w"]), p["s"]) * c).sum() ** 2

    def meta_loss(p: Any, x: Tensor) -> Tensor:
        grads = torch.func.grad(loss)(p, x)
        return loss({name: p[name] - 0.01 * grads[name] for name in p}, x)

    params = fresh({"w": torch.randn(2, 3), "s": torch.rand(3)})
    constants = {name: value.detach() for name, value in params.items()}
    each = [torch.func.grad(meta_loss)(constants, task) for task in x]
    expected = {name: torch.stack([grads[name] for grads in each]).sum(0) for name in params}
    many = lambda p: over_tasks(meta_loss)(p, x).sum()
    assert_close(torch.func.grad(many)(constants) if outer == "func" else gradients(many(params), params), expected)


def test_one_level_of_vmap_needs_no_rule_for_norms() -> None:
    problem = norm_problem("layer", 3)
    assert_close(
        over_tasks(problem.loss, in_dims=(None, None, 0))(problem.params, problem.buffers, problem.batches)[0],
        torch.stack(
            [problem.loss(problem.params, {}, each)[0] for each in zip(*problem.batches, strict=True)],
        ),
    )


# Random numbers ----------------------------------------------------------------------------------------------------


@ROUTES
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers_per_task(route: Any, randomness: Any) -> None:
    fn = over_tasks(lambda w, x: torch.rand(3) + 0 * x, randomness=randomness, **route)
    first, second = fn(torch.ones(()), torch.ones(5, 3)), fn(torch.ones(()), torch.ones(5, 3))
    assert len({tuple(row) for row in first.tolist()}) == (1 if randomness == "same" else 5)
    assert not torch.equal(first, second)


@ROUTES
@pytest.mark.parametrize("tasks", [1, 3])
def test_random_numbers_may_be_forbidden(route: Any, tasks: int) -> None:
    with pytest.raises(RuntimeError, match="random"):
        over_tasks(lambda w, x: torch.rand(3), randomness="error", **route)(1, torch.ones(tasks, 3))


# What torch cannot batch -------------------------------------------------------------------------------------------


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.sum().abs() > 1)


@pytest.mark.parametrize("randomness", ["different", "error"])
def test_what_torch_cannot_batch_falls_back_to_the_loop_with_one_warning(randomness: Any) -> None:
    module = nn.Sequential(Rounds())
    fn = (lambda w, x: module(w * x)) if randomness == "error" else (lambda w, x: module(x * w))
    w, x = torch.randn(2, requires_grad=True), torch.randn(5, 2)
    expected = torch.stack([fn(w, each) for each in x])
    with pytest.warns(UserWarning, match=r"`Rounds`.*\.item\(\)"):
        assert_close(over_tasks(fn, randomness=randomness)(w, x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.func.grad(lambda w: over_tasks(fn, randomness=randomness)(w, x).sum())(w.detach())
        assert_close(found, torch.autograd.grad(expected.sum(), w)[0])
        over_tasks(fn, backend="loop", randomness=randomness)(w, x)
        over_tasks(fn, randomness=randomness)(w, x[:1])
    with pytest.raises(VmapError, match="`Rounds`") as caught:
        over_tasks(fn, backend="vmap", randomness=randomness)(w, x)
    assert isinstance(caught.value, RuntimeError)


def test_the_fallback_draws_the_random_numbers_that_the_loop_draws() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        noise = torch.rand(2)
        return noise if x.sum() > 0 else -noise

    x = torch.randn(5, 2)
    torch.manual_seed(1)
    expected = over_tasks(fn, backend="loop")(1, x)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="`fn`"):
        assert_close(over_tasks(fn)(1, x), expected)


@ROUTES
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), TaskError("mine"), RuntimeError("mine")])
def test_the_users_own_error_comes_through(route: Any, error: Exception) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match="mine") as caught:
        over_tasks(fn, **route)(1, torch.ones(3, 2))
    assert caught.value is error


# Errors ------------------------------------------------------------------------------------------------------------

X = torch.ones(3, 2)
BAD_CALLS: dict[str, tuple[Any, Any, Any, str]] = {
    "differing tasks": (TaskError, {}, (1, torch.ones(2, 1), X), "args.1` has 2, `args.2` has 3"),
    "zero tasks": (TaskError, {}, (1, torch.ones(0, 1)), "zero tasks"),
    "none mapped": (TaskError, {"in_dims": None}, (1, X), "no argument is mapped"),
    "no tensor mapped": (TaskError, {}, (1, 2), "no argument is mapped"),
    "no arguments": (TaskError, {}, (), "no argument is mapped"),
    "too few in_dims": (TaskError, {"in_dims": (0,)}, (X, X), "1 entries for 2"),
    "too many in_dims": (TaskError, {"in_dims": (0, 0, 0)}, (X, X), "3 entries for 2"),
    "no such dimension": (TaskError, {"in_dims": 2}, (X,), "dimension 2"),
    "no dimension": (TaskError, {}, (1, torch.ones(())), "dimension 0"),
    "a word": (TaskError, {"in_dims": "0"}, (X,), "'0'"),
    "another tree": (TreeError, {"in_dims": ({"y": 0},)}, ({"x": X},), "in_dims"),
    "an ellipsis alone": (StatelessifyError, {"in_dims": (...,)}, (X,), "in_dims"),
    "chunks": (TaskError, {"chunk_size": 0}, (1, X), "chunk_size=0"),
    "half a chunk": (TaskError, {"chunk_size": 1.5}, (1, X), "chunk_size=1.5"),
    "backend": (TaskError, {"backend": "looop"}, (1, X), "did you mean `loop`"),
    "randomness": (TaskError, {"randomness": "sama"}, (1, X), "did you mean `same`"),
}


@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_refused_by_name(bad: Any) -> None:
    error, options, args, words = bad
    calls: list[Any] = []
    with pytest.raises(error, match=words):
        over_tasks(lambda *args: calls.append(args), **options)(*args)
    assert calls == []


@pytest.mark.parametrize("options", [{"backend": "loop"}, {"chunk_size": 1}])
def test_results_that_are_no_tensors_must_agree(options: Any) -> None:
    counter = iter(range(100))
    with pytest.raises(TreeError, match="`n` is not a tensor and differs"):
        over_tasks(lambda w, x: {"n": next(counter), "x": x}, **options)(1, X)
    with pytest.raises(TreeError, match="structure"):
        over_tasks(lambda w, x: {"n" * (next(counter) % 2 + 1): x}, **options)(1, X)


def test_a_strided_weight_of_a_batch_norm_in_the_loop() -> None:
    """Whose gradient by the input torch gets wrong on CPUs; the columns of a matrix are such weights."""
    x, weights = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, training=True).sin().sum()

    def by_hand(x: Tensor, weight: Tensor) -> Tensor:
        return ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * weight).sin().sum()

    found, expected = (
        torch.autograd.grad(over_tasks(fn, in_dims=(None, 1), backend="loop")(x, weights).sum(), x)[0]
        for fn in (norm, by_hand)
    )
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
