"""Properties of the compatibility layer, over what the testing kit draws: `stateless` and `adapt`, and real higher."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from higher_cases import QUIET
from higher_oracle import real
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live import live_as, rule_of, settings_of
from torch import Tensor, nn

from statelessify import adapt, make_functional, monkeypatch, stateless
from statelessify.compat import higher
from statelessify.testing import (
    assert_trees_close,
    check_meta_grads,
    inputs_for,
    modules,
    optimizers,
    problems,
    unmutated,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings(QUIET),
    pytest.mark.filterwarnings("ignore:Differentiable RMSprop suffers"),  # says higher
    pytest.mark.filterwarnings("ignore:Rprop uses the signs"),
]
WIDE = torch.float64


def some(share: int) -> settings:
    return settings(max_examples=max(settings().max_examples // share, 3))


def assert_same(ours: Any, theirs: Any) -> None:
    assert_trees_close(ours, theirs, rtol=0, atol=0)


def seeded_call(module: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return module(*args, **kwargs)


def slopes(value: Tensor, leaves: Any) -> list[Tensor | None]:
    if not value.requires_grad or not leaves:
        return [None] * len(leaves)
    return list(torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True))


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


# Patched modules -----------------------------------------------------------------------------------------------------


@given(modules(), st.booleans(), st.data())
def test_a_patched_module_is_the_pure_call(module: nn.Module, copied: bool, data: st.DataObject) -> None:
    """`copy_initial_weights` True is the policy "detach", False is "clone"."""
    args = data.draw(inputs_for(module))
    policy: Any = "detach" if copied else "clone"
    apply, params, buffers = stateless(module, params=policy)
    with unmutated(module):
        fmodel = monkeypatch(module, copy_initial_weights=copied)
        out = seeded_call(fmodel, *args)
    expected, new = seeded_call(apply, params, buffers, *args)
    assert_same(out, expected)
    assert isinstance(fmodel, type(module))
    held = {name: value for name, value in new.items() if name in dict(module.named_buffers())}
    assert_same({name: value for name, value in fmodel.named_buffers() if name in held}, held)
    first = list(fmodel.parameters(time=0))
    assert_same([p.detach() for p in first], [p.detach() for p in module.parameters()])
    assert [p.requires_grad for p in first] == [p.requires_grad for p in module.parameters()]
    assert {p.is_leaf for p in first if p.requires_grad} <= {copied}
    theirs = slopes(expected.sin().sum(), list(params.values()) if copied else trained(module))
    ours = slopes(out.sin().sum(), [p for p in first if p.requires_grad] if copied else trained(module))
    assert_same(ours, theirs)
    if copied:
        assert slopes(out.sin().sum(), trained(module)) == [None] * len(params)


@given(modules(), st.data())
def test_weights_given_in_the_call(module: nn.Module, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module, params="detach")
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    other = {name: 1.25 * value for name, value in params.items()}
    expected, _ = seeded_call(apply, other, buffers, *args)
    weights = [{**other, **frozen}[name] for name, _ in module.named_parameters()]
    for make in (make_functional, monkeypatch):
        fmodel = make(module)
        if make is make_functional and weights:
            with pytest.raises(ValueError, match="no weights"):
                fmodel(*args)
        out = seeded_call(fmodel, *args, params=weights)
        assert_same(out, expected)
        assert all(a is b for a, b in zip(fmodel.parameters(), weights, strict=True))
        ours, theirs = (slopes(value.sin().sum(), list(params.values())) for value in (out, expected))
        assert_same(ours, theirs)


# Inner loops ---------------------------------------------------------------------------------------------------------


@st.composite
def loops(draw: st.DrawFn, rules: tuple[str, ...] | None = None, **options: Any) -> tuple[Any, Any, int]:
    """A problem in float64, an optimizer that torch has too, whose numbers are plain, and a number of steps."""
    problem = draw(problems(dtype=WIDE, max_depth=1, max_tasks=1, **options))
    smooth = options.get("smooth", False)
    optimizer = draw(optimizers(rules=rules, params=problem.params, hyperparameters="numbers", smooth=smooth))
    assume(not isinstance(problem.loss.criterion, nn.MultiMarginLoss))  # torch has no second derivative of it
    assume(rule_of(optimizer).name not in ("lion", "muon"))  # torch has none; or computes in bfloat16
    return problem, optimizer, draw(st.integers(1, 2))


def first(batches: Any) -> Any:
    return tuple(leaf[0] for leaf in batches)


def live_for(optimizer: Any, module: nn.Module) -> torch.optim.Optimizer:
    return live_as(optimizer, [(name, p) for name, p in module.named_parameters() if p.requires_grad])


def outcome(library: Any, drawn: Any, **flags: Any) -> tuple[Any, list[Tensor], Tensor, nn.Module]:
    """A patched module, its trained weights after the loop, the loss of the query, and the module."""
    (loss, _, supports, queries, module), optimizer, steps = drawn
    module = copy.deepcopy(module)
    (x, y), (query, target) = first(supports), first(queries)
    with unmutated(module), library.innerloop_ctx(module, live_for(optimizer, module), **flags) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(loss.criterion(fmodel(x), y))
        value = loss.criterion(fmodel(query), target)
    weights = [p for p, own in zip(fmodel.parameters(), module.parameters(), strict=True) if own.requires_grad]
    return fmodel, weights, value, module


@some(2)
@given(loops())
def test_a_loop_is_that_of_adapt(drawn: Any) -> None:
    """Buffers too, which are the carry there."""
    (loss, params, supports, queries, _), optimizer, steps = drawn
    _, weights, value, module = outcome(higher, drawn, copy_initial_weights=False)

    def carried(params: Any, buffers: Any, batch: Any) -> Any:
        out, buffers = loss.apply(params, buffers, batch[0])
        return loss.criterion(out, batch[1]), buffers

    adapted = adapt(carried, params, first(supports), optimizer=optimizer, steps=steps, carry=loss.buffers)
    assert_trees_close(weights, list(adapted.params.values()))
    expected, _ = carried(adapted.params, adapted.carry, first(queries))
    assert_trees_close(value, expected)
    ours, theirs = slopes(value, trained(module)), slopes(expected, list(params.values()))
    zero = [torch.zeros_like(p) for p in params.values()]
    ours, theirs = ([z if g is None else g for g, z in zip(found, zero, strict=True)] for found in (ours, theirs))
    assert_trees_close(ours, theirs)


@some(8)
@given(loops(smooth=True))
def test_its_meta_gradient_by_differences(drawn: Any) -> None:
    (loss, params, supports, queries, module), optimizer, steps = drawn

    def through_higher(params: Any, support: Any) -> Any:
        x, y = support
        fmodel = make_functional(module, encapsulator=higher.patch.buffer_sync)
        fmodel.update_params([params.get(name, p) for name, p in module.named_parameters()])
        diffopt = higher.get_diff_optim(live_for(optimizer, module), module.parameters(), fmodel)
        for _ in range(steps):
            diffopt.step(loss.criterion(fmodel(x), y))
        found = dict(zip(dict(module.named_parameters()), fmodel.parameters(), strict=True))
        return {name: found[name] for name in params}

    check_meta_grads(loss, params, first(supports), first(queries), adapt=through_higher, entries=1)


@some(4)
@given(loops(rules=("sgd", "adagrad", "rmsprop", "adadelta"), layers=("linear", "activation", "conv", "residual")))
def test_real_higher_agrees(drawn: Any) -> None:
    assume(not settings_of(drawn[1])["maximize"])  # which it ignores
    (_, ours, value, module), (_, theirs, expected, own) = (
        outcome(library, drawn, copy_initial_weights=False) for library in (higher, real)
    )
    right = slopes(expected, trained(own))
    # A centered square is zero or less where a gradient is, and higher takes its root, and that root's slope.
    assume(all(leaf is None or leaf.isfinite().all() for leaf in (*theirs, *right)))
    assert_trees_close((ours, value), (theirs, expected))
    assert_trees_close(slopes(value, trained(module)), right)


@some(2)
@given(loops(), st.booleans())
def test_flags_are_policies(drawn: Any, copied: bool) -> None:
    """The numbers stay; what is copied gets the meta-gradient in the module's place; untracked, nothing gets any."""
    _, weights, value, module = outcome(higher, drawn, copy_initial_weights=False)
    expected = slopes(value, trained(module))
    fmodel, copies, ours, apart = outcome(higher, drawn, copy_initial_weights=True)
    assert_trees_close((copies, ours), (weights, value))
    assert slopes(ours, trained(apart)) == [None] * len(expected)
    initial = zip(fmodel.parameters(time=0), module.parameters(), strict=True)
    assert_trees_close(slopes(ours, [p for p, own in initial if own.requires_grad]), expected)
    fmodel, loose, cut, apart = outcome(higher, drawn, copy_initial_weights=copied, track_higher_grads=False)
    assert_trees_close((loose, cut), (weights, value))
    assert all(p.is_leaf and p.requires_grad for p in loose)
    assert len(fmodel._fast_params) == 1
    assert slopes(cut, trained(apart)) == [None] * len(expected)
