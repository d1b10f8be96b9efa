"""Every rule under `torch.vmap`, `torch.func` and `torch.compile`: the numbers and gradients of a Python loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import (
    EACH_NUMBER,
    EACH_RULE,
    VALUES,
    WHOLE,
    dtypes_of,
    gradients_of,
    make,
    run,
    steps_of,
    tensors_of,
    with_each,
)
from problems import IGNORE_SCRIPT, assert_close
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import adapt, optim, over_tasks, tree_stack, tree_unstack

pytestmark = pytest.mark.usefixtures("float64")
TASKS = 3


def loop(optimizer: optim.Optimizer, params: Any, gradients: list[Any], shared: bool = True) -> Any:
    """The oracle: each task alone, stacked."""
    gradients = list(zip(*map(tree_unstack, gradients), strict=True))
    starts = [params] * len(gradients) if shared else tree_unstack(params)
    return tree_stack([run(optimizer, start, grads) for start, grads in zip(starts, gradients, strict=True)])


def steps(mapper: Callable[..., Any], optimizer: optim.Optimizer, params: Any, gradients: list[Any]) -> Any:
    """The first step from the shared state, the others from what the last has returned."""
    state: Any = optimizer.init(params)
    dims: tuple[Any, ...] = (None, 0, None)
    for grads in gradients:
        params, state = mapper(optimizer.step, in_dims=dims)(params, grads, state)
        dims = (0, 0, 0)
    return params, state


def total(tree: Any) -> Tensor:
    """A number made of all of a tree."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel()]
    return torch.stack([((leaf + 0.1) ** 3).real.mean() for leaf in leaves if leaf.dtype != torch.int64]).sum()


# vmap --------------------------------------------------------------------------------------------------------------


@EACH_RULE
@pytest.mark.parametrize("mapper", [torch.vmap, over_tasks], ids=["vmap", "over_tasks"])
def test_a_shared_start_and_mapped_steps(rule: str, mapper: Any) -> None:
    for dtype in dtypes_of(rule):
        params, gradients = tensors_of(rule, dtype=dtype), gradients_of(rule, TASKS, dtype=dtype)
        found, state = steps(mapper, make(rule), params, gradients)
        expected, its = loop(make(rule), params, gradients)
        assert isinstance(state, optim.OptState)
        assert_close((found, state.step, state.slots), (expected, its.step, its.slots), 1e-13)
        assert state.hyperparameters == VALUES[rule]


@EACH_RULE
def test_each_part_of_a_state_is_mapped_or_shared(rule: str) -> None:
    optimizer, params, gradients = make(rule), tensors_of(rule, TASKS), gradients_of(rule, TASKS)[:2]
    expected, _ = loop(optimizer, params, gradients, shared=False)
    fresh = optimizer.init(tree_unstack(params)[0])  # which knows shapes only
    now, state = torch.vmap(optimizer.step, in_dims=(0, 0, None))(params, gradients[0], fresh)
    partly = state._replace(step=state.step[0])
    last = lambda tree: tree_map(lambda leaf: leaf.movedim(0, -1), tree)
    for given, dims in [
        (partly, optim.OptState(None, None, 0)),
        (state, optim.OptState(0, None, 0)),
        (last(state), -1),
    ]:
        found, _ = torch.vmap(optimizer.step, in_dims=(0, 0, dims))(now, gradients[1], given)
        assert_close(found, expected, 1e-13)
    both, _ = torch.vmap(lambda *args: run(optimizer, *args), in_dims=(0, 0))(params, gradients)
    assert_close(both, expected, 1e-13)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda value: value,
    "broadcast": lambda value: {"body.*": value.expand(1), "[!b]*": value},
    "schedule": lambda value: lambda step: value + 0 * step,
}


def with_values(rule: str, name: str, values: Any) -> optim.Optimizer:
    return make(rule, **{name: tuple(values) if isinstance(VALUES[rule][name], tuple) else values[0]})


def differentiated(fn: Callable[..., Any], gradients: Any, learned: list[Tensor]) -> Any:
    params, state = fn(gradients, *learned)
    outcome = total((params, state.slots))
    return params, state.slots, torch.autograd.grad(outcome, learned, allow_unused=True, materialize_grads=True)


@EACH_NUMBER
def test_a_number_for_each_task(rule: str, name: str) -> None:
    """Given in each form, or put into the state: the numbers of a loop, and its gradients by that number."""
    params, gradients = tensors_of(rule), gradients_of(rule, TASKS)
    usual = VALUES[rule][name] if isinstance(VALUES[rule][name], tuple) else (VALUES[rule][name],)
    learned = [(value * (0.9 + 0.08 * torch.rand(TASKS))).requires_grad_() for value in usual]

    def built(form: Any) -> Any:
        return lambda grads, *values: run(with_values(rule, name, [*map(form, values)]), params, grads)

    def put(grads: Any, *values: Tensor) -> Any:
        state = make(rule).init(params)
        new = with_values(rule, name, values).init(params).hyperparameters[name]
        return run(make(rule), params, grads, state._replace(hyperparameters={**state.hyperparameters, name: new}))

    def by_loop(gradients: Any, *learned: Tensor) -> Any:
        tasks = zip(zip(*map(tree_unstack, gradients), strict=True), *learned, strict=True)
        return tree_stack([built(FORMS["tensor"])(*task) for task in tasks])

    expected = differentiated(by_loop, gradients, learned)
    forms = [FORMS[form] for form in FORMS if form != "broadcast" or (rule, name) not in WHOLE]
    for fn in (*map(built, forms), put):
        found = differentiated(torch.vmap(fn), gradients, learned)
        assert_close((found[0], squeezed(found[1])), (expected[0], squeezed(expected[1])), 1e-13)
        assert_close(found[2], expected[2], 1e-11)


@EACH_RULE
def test_a_state_with_tensors_comes_out_and_goes_in(rule: str) -> None:
    """What a map has returned, with a number for each task, is mapped by the next; a shared one as well."""
    params, gradients = tensors_of(rule), gradients_of(rule, TASKS)
    spread = lambda value: value * (0.9 + 0.08 * torch.rand(TASKS))
    numbers = {name: with_each(value, spread) for name, value in VALUES[rule].items()}

    def first(grads: Any, numbers: Any) -> Any:
        optimizer = make(rule, **numbers)
        return optimizer.step(params, grads, optimizer.init(params))

    each = zip(zip(*map(tree_unstack, gradients), strict=True), tree_unstack(numbers), strict=True)
    expected = tree_stack([run(make(rule, **own), params, grads) for grads, own in each])
    now, state = torch.vmap(first)(gradients[0], numbers)
    for grads in gradients[1:]:
        now, state = torch.vmap(make(rule).step)(now, grads, state)
    assert_close((now, state), expected, 1e-13)
    shared = make(rule, **tree_unstack(numbers)[0])
    assert_close(steps(torch.vmap, shared, params, gradients), loop(shared, params, gradients), 1e-13)


def squeezed(slots: Any) -> Any:
    """A slot of one number has as many dimensions as the hyperparameters."""
    return tree_map(torch.squeeze, slots)


@EACH_RULE
def test_vmap_of_vmap(rule: str) -> None:
    optimizer, params, gradients = make(rule), tensors_of(rule), gradients_of(rule, 2, TASKS)
    outer = [loop(optimizer, params, list(grads)) for grads in zip(*map(tree_unstack, gradients), strict=True)]
    both = torch.vmap(lambda params, grads: steps(torch.vmap, optimizer, params, grads), in_dims=(None, 0))
    assert_close(both(params, gradients), tree_stack(outer), 1e-13)


# Derivatives -------------------------------------------------------------------------------------------------------


def outcome(rule: str, gradients: Any, params: Any, lr: Tensor) -> Tensor:
    return total(run(make(rule, lr=lr), params, gradients)[0])


@EACH_RULE
def test_gradients_of_a_map_and_maps_of_gradients(rule: str) -> None:
    """By the start, what is given and the rate: vmap(grad), grad(vmap), jacrev and autograd are one."""
    params, gradients, lr = tensors_of(rule), gradients_of(rule, TASKS), torch.tensor(0.1)
    fn = lambda gradients, params, lr: outcome(rule, gradients, params, lr)
    tasks = list(zip(*map(tree_unstack, gradients), strict=True))
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), (gradients, params, lr))
    values = torch.stack([fn(task, *leaves[1:]) for task in zip(*map(tree_unstack, leaves[0]), strict=True)])
    flat = tree_leaves(leaves)
    expected = dict(zip(range(len(flat)), torch.autograd.grad(values.sum(), flat), strict=True))

    each = torch.vmap(torch.func.grad(fn, argnums=(0, 1, 2)), in_dims=(0, None, None))(gradients, params, lr)
    summed = (each[0], *tree_map(lambda leaf: leaf.sum(0), each[1:]))
    mapped = lambda *args: torch.vmap(fn, in_dims=(0, None, None))(*args).sum()
    outer = torch.func.grad(mapped, argnums=(0, 1, 2))(gradients, params, lr)
    for found in (summed, outer):
        assert_close(dict(enumerate(tree_leaves(found))), expected, 1e-11)
    rows = torch.func.jacrev(torch.vmap(fn, in_dims=(0, None, None)), argnums=2)(gradients, params, lr)
    assert_close(rows, torch.stack([torch.func.grad(fn, argnums=2)(list(task), params, lr) for task in tasks]), 1e-11)


@EACH_RULE
@pytest.mark.filterwarnings(IGNORE_SCRIPT)
def test_forward_mode_is_reverse_mode(rule: str) -> None:
    params, gradients, lr = tensors_of(rule), gradients_of(rule), torch.tensor(0.1)
    fn = lambda gradients, params, lr: outcome(rule, gradients, params, lr)
    point = gradients, params, lr
    direction = tree_map(torch.randn_like, point)
    slopes = torch.func.grad(fn, argnums=(0, 1, 2))(*point)
    pairs = zip(tree_leaves(slopes), tree_leaves(direction), strict=True)
    expected = torch.stack([(slope * way).sum() for slope, way in pairs]).sum()
    assert_close(torch.func.jvp(fn, point, direction)[1], expected, 1e-11)
    many = torch.vmap(lambda lr: torch.func.jvp(lambda lr: fn(gradients, params, lr), (lr,), (torch.ones(()),))[1])
    assert_close(many(lr.expand(2)), slopes[2].expand(2), 1e-11)


@EACH_RULE
def test_the_inner_loop_in_a_map_of_the_user(rule: str) -> None:
    """`adapt` inside `torch.vmap`, with a rate per task: as one by one, and so are the meta-gradients."""
    params, targets = tensors_of(rule), torch.randn(TASKS)
    learned = [(0.1 * torch.rand(TASKS)).requires_grad_(), *(value.requires_grad_() for value in params.values())]

    def one(target: Tensor, lr: Tensor) -> Any:
        loss = lambda p, b: torch.stack([((value - b) ** 4).mean() for value in p.values()]).sum()
        return tuple(adapt(loss, params, target, optimizer=make(rule, lr=lr), steps=steps_of(rule)))[:3]

    found = torch.vmap(one)(targets, learned[0])
    expected = tree_stack([one(*task) for task in zip(targets, learned[0], strict=True)])
    assert_close((found[0], found[1].slots, found[2]), (expected[0], expected[1].slots, expected[2]))
    slopes = [torch.autograd.grad(total(tree[0]), learned) for tree in (found, expected)]
    assert_close(*slopes)


# compile -----------------------------------------------------------------------------------------------------------


def few(tree: Any) -> Any:
    """Fewer parameters, for less time to compile."""
    return {name: tree[name] for name in ("body.w", "head.w")}


COMPILED: dict[str, Any] = {
    "sgd": {"lr": {"body.*": 0.1, "[!b]*": 0.2}},
    "adamw": {"betas": ({"body.*": 0.8, "head.*": 0.7}, 0.9)},
    "nadam": {},
    "adagrad": {"lr": lambda step: {"*": 0.1 * 0.5**step}},
    "rmsprop": {"centered": {"body.*": True, "[!b]*": False}},
    "adafactor": {},
}


@pytest.mark.parametrize("rule", COMPILED)
def test_one_compiled_step_serves_all_steps(rule: str) -> None:
    torch.compiler.reset()
    optimizer, params, gradients = make(rule, **COMPILED[rule]), few(tensors_of(rule)), [*map(few, gradients_of(rule))]
    expected = run(optimizer, params, gradients)
    compiled = optimizer._replace(step=torch.compile(optimizer.step, fullgraph=True, backend="eager"))
    first = 2 if rule == "nadam" else 1  # a number for each parameter, one and the same tensor at first
    now, state = run(compiled, params, gradients[:first])
    with torch.compiler.set_stance("fail_on_recompile"):
        now, state = run(compiled, now, gradients[first:], state)
    assert_close((now, state.step, state.slots), (expected[0], expected[1].step, expected[1].slots), 1e-13)


@pytest.mark.parametrize("rule", ["adam"])
def test_a_compiled_gradient_through_two_steps(rule: str) -> None:
    torch.compiler.reset()
    params, gradients = few(tensors_of(rule)), [*map(few, gradients_of(rule)[:2])]
    gradient = torch.func.grad(lambda params, lr: total(run(make(rule, lr=lr), params, gradients)[0]), argnums=(0, 1))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, torch.tensor(0.1)), gradient(params, torch.tensor(0.1)), 1e-11)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(compiled(params, torch.tensor(0.2)), gradient(params, torch.tensor(0.2)), 1e-11)
