"""`adapt_tasks` with every rule is the loop of `adapt`: parameters, states, losses, and gradients by every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optimizers import (
    EACH_NUMBER,
    EACH_RULE,
    REAL,
    VALUES,
    WHOLE,
    learned_numbers,
    make,
    shapes_of,
    steps_of,
    tensors_of,
    with_each,
)
from problems import assert_close, one_by_one
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, optim, tree_stack, tree_unstack

pytestmark = pytest.mark.usefixtures("float64")
TASKS = 3
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=repr)
BACKENDS: list[Any] = [{"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}]


def fit(params: dict[str, Tensor], target: Tensor) -> Tensor:
    """A loss in which every parameter feels every other."""
    own = torch.stack([(1 + (value - target).abs() ** 2).sqrt().mean() for value in params.values()]).sum()
    return own + torch.stack([value.abs().square().mean() for value in params.values()]).sum().sin()


def problem(rule: str, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], Tensor]:
    params = tensors_of(rule)
    return {name: params[name].requires_grad_() for name in names or params}, torch.randn(TASKS)


FEW = ("body.w", "tail.0")  # where there are many cases


def slopes(adapted: Any, learned: Any) -> list[Tensor]:
    """The gradient of a number made of all that comes out."""
    leaves = [leaf for leaf in tree_leaves(tuple(adapted)[:3]) if leaf.is_floating_point() and leaf.numel()]
    outcome = torch.stack([leaf.sin().mean() for leaf in leaves]).sum()
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(outcome, tree_leaves(learned), **options))


def assert_same(found: Any, expected: Any, learned: Any) -> None:
    assert_close(found, expected, 1e-12)
    assert_close(slopes(found, learned), slopes(expected, learned), 1e-10)


@EACH_RULE
@MODES
def test_tasks_are_the_loop(rule: str, gradient: Any) -> None:
    params, targets = problem(rule, [name for name in shapes_of(rule) if name != "head.w"])
    numbers = learned_numbers(rule)
    options: Any = {"optimizer": make(rule, **numbers), "steps": steps_of(rule), "gradient": gradient}
    expected = one_by_one(fit, params, targets, **options)
    for choices in BACKENDS[:2] if isinstance(gradient, Unroll) else BACKENDS[2:]:
        assert_same(adapt_tasks(fit, params, targets, **options, **choices), expected, (params, numbers))


@EACH_RULE
def test_no_steps(rule: str) -> None:
    params, targets = problem(rule)
    options: Any = {"optimizer": make(rule), "steps": 0}
    found = adapt_tasks(fit, params, targets, **options)
    assert_close(found, one_by_one(fit, params, targets, **options))
    assert found.losses.shape == (TASKS, 0)


@EACH_RULE
@pytest.mark.parametrize("tasks", [2, 3])
def test_complex_tasks(rule: str, tasks: int) -> None:
    """Also where parameters are numbers: a slot of one number for each is then like a parameter."""
    if rule in REAL:
        return
    targets = torch.randn(tasks, dtype=torch.complex128)
    for names, backends in {FEW: BACKENDS[:1], ("body.w", "head.w"): BACKENDS[:1], ("head.w",): BACKENDS[:2]}.items():
        params = {name: torch.randn(shapes_of(rule)[name], dtype=torch.complex128) for name in names}
        options: Any = {"optimizer": make(rule), "steps": 3}
        expected = one_by_one(fit, params, targets, **options)
        for choices in backends:
            assert_close(adapt_tasks(fit, params, targets, **options, **choices), expected, 1e-12)


@EACH_RULE
def test_tasks_of_numbers_only(rule: str) -> None:
    if rule == "muon":
        return
    params, targets = {"a": torch.randn(()), "b": torch.randn(())}, torch.randn(TASKS)
    options: Any = {"optimizer": make(rule), "steps": 3}
    expected = one_by_one(fit, params, targets, **options)
    for choices in BACKENDS[:2]:
        assert_close(adapt_tasks(fit, params, targets, **options, **choices), expected, 1e-12)


# One value per task ------------------------------------------------------------------------------------------------


def spread(value: Any, *shape: int) -> Any:
    """Other values around each number, for each task."""
    return with_each(value, lambda v: (v * (0.9 + 0.08 * torch.rand(TASKS, *shape))).requires_grad_())


PER_TASK = type(optim.per_task(torch.ones(1)))


def of_task(spec: Any, task: int) -> Any:
    """A hyperparameter as one task has it."""
    if isinstance(spec, PER_TASK):
        return tree_map(lambda leaf: leaf[task], spec.tree)
    if isinstance(spec, dict):
        return {key: of_task(value, task) for key, value in spec.items()}
    if isinstance(spec, tuple):
        return tuple(of_task(value, task) for value in spec)
    return (lambda step: of_task(spec(step), task)) if callable(spec) else spec


def per_task_forms(rule: str, name: str) -> dict[str, tuple[Any, list[Tensor]]]:
    """Ways to write one value per task, and the tensors that they are made of."""
    usual = VALUES[rule][name]
    plain, shaped = spread(usual), spread(usual, 1)
    both = lambda v, w: {"body.*": v, "[!b]*": w}
    forms = {
        "tensor": with_each(plain, optim.per_task),
        "tree": with_each(plain, lambda v: optim.per_task(both(v, v * 0.95))),
        "beside a number": with_each(plain, lambda v: both(optim.per_task(v), v[0].detach())),
        "schedule": with_each(plain, lambda v: lambda step: optim.per_task(v * 0.95**step)),
    }
    if (rule, name) not in WHOLE:
        forms["entries"] = with_each(shaped, lambda v: both(optim.per_task(v), optim.per_task(v[:, 0])))
    if isinstance(usual, tuple):
        forms["one of a pair"] = (*usual[:1], *forms["tensor"][1:])
        forms["pairs by name"] = both(forms["tensor"], usual)
        forms["a tree of pairs"] = optim.per_task(both(plain, plain))
        forms["a schedule of pairs"] = lambda step: forms["tensor"]
    return {form: (spec, tree_leaves((plain, shaped))) for form, spec in forms.items()}


@EACH_NUMBER
def test_one_value_per_task(rule: str, name: str) -> None:
    params, targets = problem(rule, FEW)
    forms = list(per_task_forms(rule, name).values())
    some = list(VALUES[rule]).index(name) % 3  # every form with every rule, not with every number
    for index, (spec, learned) in enumerate([forms[0], *forms[1 + some :: 3]]):
        options = [{"optimizer": make(rule, **{name: of_task(spec, task)}), "steps": 2} for task in range(TASKS)]
        each = [adapt(fit, params, target, **own) for target, own in zip(targets, options, strict=True)]
        expected = tree_stack([tuple(own)[::2] for own in each])  # the forms in the states differ
        backend: Any = ["vmap", "loop"][index % 2]
        found = adapt_tasks(fit, params, targets, optimizer=make(rule, **{name: spec}), steps=2, backend=backend)
        assert_same(tuple(found)[::2], expected, (params, learned))


# Going on ----------------------------------------------------------------------------------------------------------


def with_forms(rule: str) -> dict[str, Any]:
    """A rule whose numbers stand in the state in every form."""
    lr, *others = VALUES[rule]
    return {
        "plain": {},
        "per task": {lr: optim.per_task(torch.tensor([0.1, 0.2, 0.3]))},
        "schedule": {lr: lambda step: 0.1 * 0.5**step},
        "schedule per task": {lr: lambda step: optim.per_task(torch.tensor([0.1, 0.2, 0.3]) * 0.5**step)},
        "by name": {lr: {"body.*": 0.1, "[!b]*": torch.tensor(0.2)}, others[0]: {"*": VALUES[rule][others[0]]}},
    }


@EACH_RULE
@pytest.mark.parametrize("form", with_forms("sgd"))
def test_twice_k_steps_are_two_k_steps(rule: str, form: str) -> None:
    params, targets = problem(rule, FEW)
    options: Any = {"optimizer": make(rule, **with_forms(rule)[form])}
    for backend in ("vmap", "loop"):
        options["backend"] = backend
        once = adapt_tasks(fit, params, targets, steps=3, **options)
        half = adapt_tasks(fit, params, targets, steps=2, **options)
        again = adapt_tasks(fit, half.params, targets, steps=1, opt_state=half.opt_state, in_dims=0, **options)
        assert_close((again.params, again.opt_state), (once.params, once.opt_state), 1e-12)
        assert_close(torch.cat([half.losses, again.losses], 1), once.losses, 1e-12)
    if "per task" not in form:  # a task goes on alone
        each = zip(tree_unstack((half.params, half.opt_state)), targets, strict=True)
        del options["backend"]
        alone = [adapt(fit, now, target, steps=1, opt_state=state, **options) for (now, state), target in each]
        assert_close(tree_stack([own.params for own in alone]), once.params, 1e-12)


@EACH_RULE
@pytest.mark.parametrize("backend", ["vmap", "loop"])
def test_tasks_of_different_ages(rule: str, backend: Any) -> None:
    """Each has taken another number of steps, with a schedule and another start."""
    optimizer = make(rule, lr=lambda step: 0.1 * 0.5**step)
    before = [adapt(fit, tensors_of(rule), torch.ones(()), optimizer=optimizer, steps=steps) for steps in (1, 0, 3)]
    targets = torch.randn(TASKS)
    options: Any = {"optimizer": optimizer, "steps": 2}
    expected = [
        adapt(fit, own.params, t, opt_state=own.opt_state, **options) for own, t in zip(before, targets, strict=True)
    ]
    params, state = tree_stack([(own.params, own.opt_state) for own in before])
    found = adapt_tasks(fit, params, targets, opt_state=state, in_dims=0, backend=backend, **options)
    assert_close(found, tree_stack(expected), 1e-12)


@EACH_RULE
def test_an_earlier_state_is_shared(rule: str) -> None:
    params, targets = problem(rule, FEW)
    options: Any = {"optimizer": make(rule), "steps": 2}
    before = adapt(fit, params, torch.ones(()), **options)
    options["opt_state"] = before.opt_state
    expected = one_by_one(fit, before.params, targets, **options)
    for choices in BACKENDS[1:]:
        assert_same(adapt_tasks(fit, before.params, targets, **options, **choices), expected, params)


@EACH_RULE
def test_each_task_from_its_own_start(rule: str) -> None:
    targets = torch.randn(TASKS)
    many = {name: tensors_of(rule, TASKS)[name].requires_grad_() for name in FEW}
    rates = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    expected = tree_stack(
        [
            tuple(adapt(fit, own, target, optimizer=make(rule, lr=rate), steps=2))[:3]
            for own, target, rate in zip(tree_unstack(many), targets, rates, strict=True)
        ]
    )
    for choices in BACKENDS[:2]:
        optimizer = make(rule, lr=optim.per_task(rates))
        found = adapt_tasks(fit, many, targets, optimizer=optimizer, steps=2, in_dims=0, **choices)
        assert_same(tuple(found)[:3], expected, (many, rates))


# In a transform of the user ----------------------------------------------------------------------------------------


@EACH_RULE
def test_tasks_in_a_transform(rule: str) -> None:
    """Mapped over rates, and differentiated by `torch.func`: as in the loop."""
    params, targets = problem(rule, FEW)
    rates = torch.tensor([0.1, 0.05], requires_grad=True)

    def tasks(params: Any, rate: Tensor) -> Any:
        return tuple(adapt_tasks(fit, params, targets, optimizer=make(rule, lr=rate), steps=2))[:3]

    expected = tree_stack([tasks(params, rate) for rate in rates])
    assert_same(torch.vmap(tasks, in_dims=(None, 0))(params, rates), expected, (params, rates))
    outcome = lambda rate: tasks(params, rate)[2].sum()
    slope = torch.autograd.grad(expected[2].sum(), rates)[0]
    assert_close(torch.vmap(torch.func.grad(outcome))(rates).detach(), slope)
    assert_close(torch.func.jacrev(torch.vmap(outcome))(rates).sum(0).detach(), slope)
