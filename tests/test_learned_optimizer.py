"""An optimizer of ones own, from two functions: a small LSTM that learns to optimize, against a plain loop of torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, fresh
from test_examples import run
from torch import Tensor, nn
from torch.func import functional_call

from statelessify import Adapted, adapt, adapt_tasks, optim, over_tasks, stateless, tree_copy, tree_stack, tree_unstack

pytestmark = pytest.mark.usefixtures("float64")
HIDDEN, TASKS, STEPS = 2, 3, 4
Learned = Callable[[Any], optim.Optimizer]


# The optimizer, in two forms: its state as a tree of its own, and as slots like the parameters ------------------------


class Rule(nn.Module):
    """``(grad, h, c) -> (update, h, c)``; `h` and `c` are ``(*grad.shape, HIDDEN)``."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(1, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, grad: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = self.cell(grad.reshape(-1, 1), [each.reshape(-1, HIDDEN) for each in state])
        return self.out(h).view_as(grad), h.view_as(state[0]), c.view_as(state[1])


apply, initial, buffers = stateless(Rule())


def as_tree(weights: Any, elementwise: bool) -> optim.Optimizer:
    def init(params: Any) -> Any:
        return {name: [p.new_zeros(*p.shape, HIDDEN), p.new_zeros(*p.shape, HIDDEN)] for name, p in params.items()}

    def step(params: Any, grads: Any, state: Any) -> Any:
        out = {name: apply(weights, buffers, grads[name], *state[name])[0] for name in params}
        return {name: p + out[name][0] for name, p in params.items()}, {name: list(out[name][1:]) for name in params}

    return optim.Optimizer(init, step, elementwise)


def as_slots(weights: Any, elementwise: bool, seen: list[torch.Size] | None = None) -> optim.Optimizer:
    """The same with a slot for each hidden unit, so that all tasks can be taken at once."""
    names = [[f"{what}{unit}" for unit in range(HIDDEN)] for what in "hc"]

    def init(params: Any) -> Any:
        slots = {slot: {name: torch.zeros_like(p) for name, p in params.items()} for slot in [*names[0], *names[1]]}
        return optim.OptState(torch.tensor(0), {}, slots)

    def step(params: Any, grads: Any, state: Any) -> Any:
        new, slots = {}, {slot: {} for slot in state.slots}
        for name, p in params.items():
            if seen is not None:
                seen.append(p.shape)
            before = [torch.stack([state.slots[slot][name] for slot in group], -1) for group in names]
            (update, *after), _ = apply(weights, buffers, grads[name], *before)
            new[name] = p + update
            for group, hidden in zip(names, after, strict=True):
                for slot, unit in zip(group, hidden.unbind(-1), strict=True):
                    slots[slot][name] = unit
        return new, optim.OptState(state.step + 1, {}, slots)

    return optim.Optimizer(init, step, elementwise)


FORMS = pytest.mark.parametrize("form", [as_tree, as_slots])
ELEMENTWISE = pytest.mark.parametrize("elementwise", [False, True], ids=["mapped", "elementwise"])
CHOICES = pytest.mark.parametrize(
    "choices", [{}, {"backend": "loop"}, {"chunk_size": 2}], ids=["auto", "loop", "chunks"]
)


# The problem, and the loop by hand -----------------------------------------------------------------------------------


def loss(params: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((torch.tanh(params["weight"] @ x + params["bias"]) - y) ** 2).sum()


def problem() -> tuple[Any, Any, Any]:
    """Weights of the LSTM, initial parameters, and batches ``(tasks, ...)``, which all need a gradient."""
    params = fresh({"weight": torch.randn(2, 3), "bias": torch.randn(2)})
    batches = [torch.randn(TASKS, 3, requires_grad=True), torch.randn(TASKS, 2, requires_grad=True)]
    return fresh({name: 0.5 * torch.randn(w.shape) for name, w in initial.items()}), params, batches


def by_hand(weights: Any, params: Any, batch: Any, steps: int = STEPS, cut: int | None = None) -> tuple[Any, Tensor]:
    """Parameters and losses of one task, with nothing of this library; cut off the graph after each `cut` steps."""
    cell, losses = nn.LSTMCell(1, HIDDEN), []
    inner = {name.removeprefix("cell."): w for name, w in weights.items() if name.startswith("cell.")}
    params, state = dict(params), {name: (torch.zeros(p.numel(), HIDDEN),) * 2 for name, p in params.items()}
    for index in range(steps):
        if cut is not None and index > 0 and index % cut == 0:
            params = fresh(params)
            state = {name: (h.detach(), c.detach()) for name, (h, c) in state.items()}
        losses.append(loss(params, batch))
        grads = torch.autograd.grad(losses[-1], list(params.values()), create_graph=True)
        for name, grad in zip(list(params), grads, strict=True):
            state[name] = functional_call(cell, inner, (grad.reshape(-1, 1), state[name]))
            update = F.linear(state[name][0], weights["out.weight"], weights["out.bias"])
            params[name] = params[name] + update.view_as(grad)
    return params, torch.stack(losses)


def measure(params: Any, losses: Tensor) -> Tensor:
    """One number in which each entry of both has a weight of its own."""
    parts = torch.cat([losses.flatten(), *(p.flatten() for p in params.values())])
    return (parts * torch.linspace(1, 2, len(parts))).sum()


def leaves(weights: Any, params: Any, batches: Any) -> list[Tensor]:
    return [*weights.values(), *params.values(), *batches]


def expected(weights: Any, params: Any, batches: Any, **options: Any) -> tuple[Any, Tensor]:
    rows = [by_hand(weights, params, batch, **options) for batch in zip(*batches, strict=True)]
    return tree_stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def assert_meta_gradients_are_equal(
    found: tuple[Any, Tensor], oracle: tuple[Any, Tensor], inputs: list[Tensor]
) -> None:
    assert_close(found, oracle, 1e-12)
    meta = torch.autograd.grad(measure(*oracle), inputs, retain_graph=True)
    assert all(bool(each.any()) for each in meta)
    assert_close(torch.autograd.grad(measure(*found), inputs, retain_graph=True), meta, 1e-12)


# The meta-gradient ---------------------------------------------------------------------------------------------------


@FORMS
def test_one_task_is_the_loop_by_hand(form: Any) -> None:
    weights, params, (x, y) = problem()
    batch = [x[0].detach().requires_grad_(), y[0].detach().requires_grad_()]
    found = adapt(loss, params, batch, optimizer=form(weights, False), steps=STEPS)
    oracle = by_hand(weights, params, batch)
    assert_meta_gradients_are_equal((found.params, found.losses), oracle, leaves(weights, params, batch))


@FORMS
@ELEMENTWISE
@CHOICES
def test_many_tasks_are_the_loop_by_hand(form: Any, elementwise: bool, choices: Any) -> None:
    weights, params, batches = problem()
    found = adapt_tasks(loss, params, batches, optimizer=form(weights, elementwise), steps=STEPS, **choices)
    oracle = expected(weights, params, batches)
    assert_meta_gradients_are_equal((found.params, found.losses), oracle, leaves(weights, params, batches))


@FORMS
@ELEMENTWISE
@CHOICES
def test_many_tasks_are_a_loop_of_adapt(form: Any, elementwise: bool, choices: Any) -> None:
    """The state as well, and the meta-gradient through it."""
    weights, params, batches = problem()
    options: Any = {"optimizer": form(weights, elementwise), "steps": STEPS}
    found = adapt_tasks(loss, params, batches, **options, **choices)
    each = [adapt(loss, params, batch, **options) for batch in tree_unstack(batches)]
    assert_close(found, tree_stack(each), 1e-12)
    inputs = leaves(weights, params, batches)
    values = [hidden_sum(result.opt_state) for result in (found, tree_stack(each))]
    meta = [torch.autograd.grad(value, inputs, retain_graph=True) for value in values]
    assert_close(meta[0], meta[1], 1e-12)


def hidden_sum(state: Any) -> Tensor:
    flat = torch.utils._pytree.tree_leaves(state.slots if isinstance(state, optim.OptState) else state)
    return torch.stack([(t**2).sum() for t in flat]).sum()


@pytest.mark.parametrize("elementwise", [False, True])
def test_an_elementwise_step_takes_all_tasks_at_once(elementwise: bool) -> None:
    """Where all of its state is like the parameters; else, and without the promise, it sees one task."""
    weights, params, batches = problem()
    seen: list[torch.Size] = []
    adapt_tasks(loss, params, batches, optimizer=as_slots(weights, elementwise, seen), steps=1)
    tasks = (TASKS,) if elementwise else ()
    assert seen == [(*tasks, 2, 3), (*tasks, 2)]


@FORMS
def test_functional_style(form: Any) -> None:
    """`adapt` mapped over tasks, inside `torch.func.grad` with respect to everything."""
    weights, params, batches = problem()

    def meta_loss(weights: Any, params: Any, batches: Any) -> Tensor:
        def of_task(weights: Any, params: Any, batch: Any) -> Any:
            adapted = adapt(loss, params, batch, optimizer=form(weights, False), steps=STEPS)
            return adapted.params, adapted.losses

        return measure(*over_tasks(of_task, in_dims=(None, None, 0))(weights, params, batches))

    found = torch.func.grad(meta_loss, argnums=(0, 1, 2))(weights, params, batches)
    inputs = leaves(weights, params, batches)
    assert_close(leaves(*found), list(torch.autograd.grad(measure(*expected(weights, params, batches)), inputs)), 1e-12)


@pytest.mark.parametrize("form", [partial(as_tree, elementwise=False), partial(as_slots, elementwise=True)])
def test_gradcheck(form: Learned) -> None:
    weights, params, batches = problem()

    def meta(*inputs: Tensor) -> tuple[Tensor, ...]:
        inside = iter(inputs)
        weights_, params_ = ({name: next(inside) for name in tree} for tree in (weights, params))
        found = adapt_tasks(loss, params_, list(inside), optimizer=form(weights_), steps=2)
        return (*found.params.values(), found.losses)

    assert torch.autograd.gradcheck(meta, leaves(weights, params, batches))


# The state -----------------------------------------------------------------------------------------------------------


@FORMS
@ELEMENTWISE
def test_twice_two_steps_are_four(form: Any, elementwise: bool) -> None:
    """One graph goes through both pieces."""
    weights, params, batches = problem()
    options: Any = {"optimizer": form(weights, elementwise), "steps": 2}
    half = adapt_tasks(loss, params, batches, **options)
    found = adapt_tasks(loss, half.params, batches, opt_state=half.opt_state, in_dims=(0, 0), **options)
    losses = torch.cat([half.losses, found.losses], 1)
    oracle = expected(weights, params, batches)
    assert_meta_gradients_are_equal((found.params, losses), oracle, leaves(weights, params, batches))
    batch = next(iter(tree_unstack(batches)))
    once = adapt(loss, params, batch, **options)
    twice = adapt(loss, once.params, batch, opt_state=once.opt_state, **options)
    assert_close(
        twice._replace(losses=None), adapt(loss, params, batch, **options | {"steps": 4})._replace(losses=None)
    )


@FORMS
@ELEMENTWISE
def test_truncated_meta_training(form: Any, elementwise: bool) -> None:
    """As the example does it: each piece starts from detached parameters and state, and has a meta-gradient."""
    weights, params, batches = problem()
    optimizer = form(weights, elementwise)
    start, state, in_dims, values = params, None, (None, 0), []
    for _ in range(2):
        found = adapt_tasks(loss, start, batches, optimizer=optimizer, steps=2, opt_state=state, in_dims=in_dims)
        values.append(found.losses)
        found.losses.sum().backward()
        start, state, in_dims = *tree_copy((found.params, found.opt_state), "detach"), (0, 0)
    _, losses = expected(weights, params, batches, cut=2)
    assert_close(torch.cat(values, 1), losses, 1e-12)
    inputs = leaves(weights, params, batches)
    meta = torch.autograd.grad(losses.sum(), inputs)
    assert_close([each.grad for each in inputs], list(meta), 1e-12)


@FORMS
@ELEMENTWISE
def test_nothing_that_was_passed_is_changed(form: Any, elementwise: bool) -> None:
    weights, params, batches = problem()
    optimizer = form(weights, elementwise)
    state: Any = adapt_tasks(loss, params, batches, optimizer=optimizer, steps=1).opt_state
    many = tree_stack([params] * TASKS)
    given = {"weights": weights, "params": params, "many": many, "batches": batches, "state": state, "initial": initial}
    tensors, structure = torch.utils._pytree.tree_flatten(given)
    before = [(id(t), t._version, t.requires_grad, t.detach().clone()) for t in tensors]
    results: list[Adapted] = [
        adapt_tasks(loss, params, batches, optimizer=optimizer, steps=2),
        adapt_tasks(loss, many, batches, optimizer=optimizer, steps=2, opt_state=state, in_dims=0),
        adapt(loss, params, next(iter(tree_unstack(batches))), optimizer=optimizer, steps=2),
    ]
    torch.autograd.grad(sum(measure(each.params, each.losses) for each in results), leaves(weights, params, batches))
    after, structure_after = torch.utils._pytree.tree_flatten(given)
    assert structure_after == structure
    for tensor, (identity, version, needs, value) in zip(after, before, strict=True):
        assert (id(tensor), tensor._version, tensor.requires_grad) == (identity, version, needs)
        assert torch.equal(tensor, value)
        assert not tensor.is_leaf or tensor.grad is None


# The example ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--first-order", "--preprocess")], ids=["exact", "as in the paper"])
def test_the_example_learns(options: tuple[str, ...], tmp_path: Path) -> None:
    """A few meta-steps are enough to go down on new quadratics, and the baselines do."""
    out = run("learned_optimizer", tmp_path, "--meta-steps", "30", *options)
    lines = re.findall(r"^ +(\d+)((?: +\d+\.\d+ ± \d+\.\d+){4})$", out, re.MULTILINE)
    table = {int(step): [float(value) for value in re.findall(r"(\S+) ±", cells)] for step, cells in lines}
    assert list(table) == [0, 10, 20, 40, 60, 80, 100, 150, 200]
    assert len(set(table[0])) == 1
    assert all(last < 0.2 * first for first, last in zip(table[0], table[100], strict=True))
    assert [picture.suffix for picture in tmp_path.iterdir()] == [".png"]
