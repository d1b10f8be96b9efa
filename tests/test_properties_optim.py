"""Properties of optimizers, schedules and gradient transforms, over what the testing kit draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live import RULES, live_as, round_trip, rule_of, settings_of
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import adapt, adapt_tasks, optim, tree_stack
from statelessify.testing import (
    assert_trees_close,
    check_grads,
    check_optimizer,
    check_over_tasks,
    modules,
    optimizers,
    param_trees,
    problems,
)
from statelessify.testing.strategies._optimizers import NUMBERS

pytestmark = pytest.mark.usefixtures("float64")  # in which torch keeps NAdam's product then
WIDE = torch.float64
NUMBER = st.floats(0.25, 2)


def some(share: int) -> settings:
    return settings(max_examples=max(settings().max_examples // share, 3))


# Rules ---------------------------------------------------------------------------------------------------------------


def decays_from_zero(optimizer: optim.Optimizer) -> bool:
    """Whether a learned decay of squares is zero: below it, where differences go, they may be negative."""
    known = settings_of(optimizer)
    leaves = tree_leaves([known.get(name) for name in ("betas", "rho", "alpha")])
    return any(isinstance(leaf, Tensor) and not leaf for leaf in leaves)


@st.composite
def trained(draw: st.DrawFn, **options: Any) -> tuple[Any, optim.Optimizer]:
    """Parameters by name, and an optimizer for them."""
    shape = draw(st.sampled_from([None, (2, 2), (1, 3)]))
    leaf = param_trees(dtype=WIDE, shape=shape, requires_grad=False, max_leaves=1).map(tree_leaves)
    leaves = draw(st.lists(leaf, min_size=1, max_size=2))
    params = {f"p{index}": leaf for index, (leaf,) in enumerate(leaves)}
    return params, draw(optimizers(params=params, **options).filter(lambda drawn: not decays_from_zero(drawn)))


def reference_of(params: dict[str, Tensor], optimizer: optim.Optimizer) -> Callable[[Any], Any] | None:
    """Torch's, save where it has none, or computes in bfloat16."""
    if rule_of(optimizer).name in ("lion", "muon"):
        return None
    return lambda leaves: live_as(optimizer, zip(params, leaves, strict=True))


@some(4)
@given(trained(), st.integers(2, 3))
def test_every_rule(drawn: Any, steps: int) -> None:
    params, optimizer = drawn
    reference = reference_of(params, optimizer)
    # RAdam changes its formula at a step that depends on its betas, ASGD's average at `t0`: kinks of the rule itself.
    check_optimizer(optimizer, reference, params=params, steps=steps, entries=1, kinks="skip")


@some(16)
@given(trained(smooth=True))
def test_second_derivatives(drawn: Any) -> None:
    params, optimizer = drawn
    check_optimizer(optimizer, reference_of(params, optimizer), params=params, steps=2, entries=0, order=2)


# To torch and from there ---------------------------------------------------------------------------------------------


@st.composite
def trained_modules(draw: st.DrawFn) -> tuple[nn.Module, optim.Optimizer, list[dict[str, Tensor]]]:
    """A module, an optimizer for it whose numbers are plain, and gradients for six steps."""
    module = draw(modules(max_depth=2))
    leaves = {name: p.detach() for name, p in module.named_parameters()}
    assume(leaves)
    optimizer = draw(optimizers(params=leaves, hyperparameters="numbers"))
    known = settings_of(optimizer)
    assume(not (known.get("centered") and not known["alpha"]))  # torch takes the root of zero less its rounding
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in leaves.items()}

    return module, optimizer, [drawn() for _ in range(6)]


@given(trained_modules(), st.integers(0, 2), st.integers(0, 2))
def test_pure_steps_among_those_of_torch(drawn: Any, before: int, pure: int) -> None:
    """Bit for bit those of torch, from its state and back into it."""
    module, optimizer, gradients = drawn
    assume(rule_of(optimizer).name != "lion")

    def make(own: nn.Module) -> torch.optim.Optimizer:
        return live_as(optimizer, own.named_parameters())

    round_trip(make, module, gradients, before=before, pure=pure)


@given(trained(hyperparameters="numbers"))
def test_a_class_of_torch_is_the_rule(drawn: Any) -> None:
    params, optimizer = drawn
    assume(rule_of(optimizer).name != "lion")
    given_ = settings_of(optimizer)
    again = optim.from_torch(RULES[rule_of(optimizer).name], **given_)
    assert again.elementwise == optimizer.elementwise
    found, expected = ((rule.init(params), params) for rule in (again, optimizer))
    for _ in range(3):
        found, expected = (
            rule.step(params, tree_map(lambda p: 0.5 * p + 1, params), state)[::-1]
            for rule, (state, params) in ((again, found), (optimizer, expected))
        )
    assert_trees_close(found, expected, rtol=0, atol=0)


# Hyperparameters -----------------------------------------------------------------------------------------------------


@st.composite
def varied(draw: st.DrawFn) -> tuple[Any, Callable[..., optim.Optimizer], dict[str, Any]]:
    """A problem, a rule with the rest of its settings, and numbers of it with values for each task."""
    problem = draw(problems(dtype=WIDE, smooth=True, max_depth=1, max_tasks=3))
    count = len(problem.supports[0])
    settings_ = {"params": problem.params, "hyperparameters": draw(st.sampled_from(["tensors", "dicts"]))}
    drawn = [draw(optimizers(**settings_))]
    rule = rule_of(drawn[0]).name
    drawn += [draw(optimizers(**settings_, rules=(rule,))) for _ in range(count - 1)]
    known = [settings_of(each) for each in drawn]
    legal = [name for name in NUMBERS[rule] if all(all_tensors(each[name]) for each in known)]
    names = draw(st.lists(st.sampled_from(legal), min_size=1, unique=True))
    fixed = known[0] | ({"dtype": None} if rule == "muon" else {})
    if rule == "sgd":  # which looks ahead with a momentum only
        fixed["nesterov"] = False
    values = tree_stack([{name: tree_map(Tensor.detach, each[name]) for name in names} for each in known])
    return problem, lambda own: getattr(optim, rule)(**{**fixed, **own}), values


def all_tensors(value: Any) -> bool:
    return all(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def per_task(value: Any) -> Any:
    return tuple(map(per_task, value)) if isinstance(value, tuple) else optim.per_task(value)


@some(3)
@given(varied(), st.integers(1, 2), st.sampled_from([None, 1, 2]))
def test_numbers_of_each_task(drawn: Any, steps: int, chunk_size: int | None) -> None:
    (loss, params, supports, *_), make, values = drawn

    def one(params: Any, batch: Any, values: Any) -> Any:
        adapted = adapt(loss, params, batch, optimizer=make(values), steps=steps)
        return adapted.params, adapted.losses, adapted.opt_state.slots

    def many(params: Any, batches: Any, values: Any) -> Any:
        optimizer = make({name: per_task(value) for name, value in values.items()})
        adapted = adapt_tasks(loss, params, batches, optimizer=optimizer, steps=steps, chunk_size=chunk_size)
        return adapted.params, adapted.losses, adapted.opt_state.slots

    check_over_tasks(one, params, supports, values, mapped=many)


SCHEDULERS: dict[Any, dict[str, st.SearchStrategy[Any]]] = {
    lr_scheduler.StepLR: {"step_size": st.integers(1, 2), "gamma": NUMBER},
    lr_scheduler.MultiStepLR: {"milestones": st.sampled_from([[1], [1, 2]]), "gamma": NUMBER},
    lr_scheduler.ExponentialLR: {"gamma": NUMBER},
    lr_scheduler.LinearLR: {"start_factor": st.floats(0.25, 1), "total_iters": st.integers(1, 3)},
    lr_scheduler.PolynomialLR: {"total_iters": st.integers(2, 4), "power": NUMBER},
    lr_scheduler.CosineAnnealingLR: {"T_max": st.integers(2, 4), "eta_min": st.floats(0, 0.1)},
}


@some(5)
@given(
    st.sampled_from(list(SCHEDULERS)).flatmap(
        lambda cls: st.tuples(st.just(cls), st.fixed_dictionaries(SCHEDULERS[cls]))
    ),
    st.floats(0.0625, 0.5),
    st.sampled_from([(optim.sgd, torch.optim.SGD, {"momentum": 0.5}), (optim.adam, torch.optim.Adam, {"eps": 0.125})]),
)
def test_a_scheduled_rate(scheduler: Any, rate: float, rule: Any) -> None:
    """Each step has torch's rate, and the rate where it starts is learned."""
    (cls, options), (ours, theirs, fixed) = scheduler, rule
    learned = torch.tensor(rate, dtype=WIDE, requires_grad=True)

    def reference(leaves: Any) -> torch.optim.Optimizer:
        optimizer = theirs(leaves, lr=rate, **fixed)
        scheduler = cls(optimizer, **options)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    def scheduled(rate: Tensor) -> Any:
        optimizer = ours(lr=optim.schedule(cls, rate, **options), **fixed)
        params = {"w": torch.tensor([1.0, -2.0])}
        state = optimizer.init(params)
        for _ in range(2):
            params, state = optimizer.step(params, params, state)
        return params

    check_optimizer(ours(lr=optim.schedule(cls, learned, **options), **fixed), reference, steps=3, entries=1)
    check_grads(scheduled, learned.detach(), modes=("reverse",))


# Transforms of gradients ---------------------------------------------------------------------------------------------

TRANSFORMS = st.sampled_from([optim.clip_by_global_norm, optim.clip_by_value, optim.normalize])
BOUNDS = st.floats(0.125, 8)


@some(4)
@given(TRANSFORMS, param_trees(dtype=WIDE, max_leaves=3), BOUNDS)
def test_transformed_gradients(make: Any, grads: Any, bound: float) -> None:
    """Against their formulas, and differences by the gradients and the bound."""
    grads = tree_map(lambda leaf: torch.where(leaf.abs() < 1e-3, leaf + 0.5, leaf), grads)
    flat = torch.cat([leaf.detach().flatten() for leaf in tree_leaves(grads)])
    norm = flat.norm()
    assume((torch.cat([norm[None], flat.abs()]) - bound).abs().min() > 1e-2)  # there is a kink
    formulas = {
        optim.clip_by_global_norm: flat * min(1, bound / max(float(norm), 1e-9)),
        optim.clip_by_value: flat.clamp(-bound, bound),
        optim.normalize: flat / (norm + bound),
    }
    found = make(bound)(grads)
    assert_trees_close(torch.cat([leaf.detach().flatten() for leaf in tree_leaves(found)]), formulas[make])

    def transformed(tree: Any) -> Any:
        return make(tree["bound"])(tree["grads"])

    tree = {"grads": grads, "bound": torch.tensor(bound, dtype=WIDE)}
    check_grads(transformed, tree, order=2, entries=1)


@some(4)
@given(TRANSFORMS, param_trees(dtype=WIDE, max_leaves=3), st.lists(BOUNDS, min_size=1, max_size=3))
def test_transformed_gradients_of_each_task(make: Any, grads: Any, bounds: list[float]) -> None:
    tasks = tree_stack([tree_map(lambda leaf, by=by: leaf * by, grads) for by in bounds])

    def transformed(bound: Tensor, grads: Any) -> Any:
        return make(bound)(grads)

    check_over_tasks(transformed, torch.tensor(2.0, dtype=WIDE), tasks)
    check_over_tasks(transformed, torch.tensor(bounds, dtype=WIDE), tasks, in_dims=0)
