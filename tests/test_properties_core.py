"""Properties of trees, partitions and modules as pure functions, over what the testing kit draws."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import (
    combine,
    errors,
    explain,
    load_,
    over_tasks,
    partition,
    stateless,
    tree_copy,
    tree_stack,
    tree_unstack,
)
from statelessify._trial import Trial
from statelessify.testing import (
    assert_trees_close,
    check_grads,
    check_over_tasks,
    inputs_for,
    modules,
    param_trees,
    unmutated,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's vmap, for some layers
POLICIES = st.sampled_from(["alias", "clone", "detach"])
WIDE = torch.float64


def some(share: int) -> settings:
    return settings(max_examples=max(settings().max_examples // share, 5))


def assert_same(ours: Any, theirs: Any) -> None:
    assert_trees_close(ours, theirs, rtol=0, atol=0)


def seeded_call(module: Any, *args: Any) -> Any:
    torch.manual_seed(3)
    return module(*args)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def other_values(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other ones, which a variance may have as well."""
    return {name: value * 1.25 if value.is_floating_point() else value + 1 for name, value in tree.items()}


# Trees ---------------------------------------------------------------------------------------------------------------


@given(param_trees(), POLICIES, st.sampled_from([None, torch.float32, WIDE, torch.bfloat16]))
def test_a_copy_is_moved_in_the_same_pass(tree: Any, policy: Any, dtype: Any) -> None:
    both = {"tree": tree, "again": tree}
    leaves = tree_leaves(tree)
    if policy == "alias" and any(leaf.dtype != (dtype or leaf.dtype) for leaf in leaves):
        with pytest.raises(errors.PolicyError, match="keeps the very same tensors"):
            tree_copy(both, policy, dtype=dtype)
        return
    copied = tree_copy(both, policy, dtype=dtype)
    assert_same(copied, tree_map(lambda leaf: leaf.to(dtype or leaf.dtype), both))
    again = tree_leaves(copied["again"])
    for old, new, twin in zip(leaves, tree_leaves(copied["tree"]), again, strict=True):
        assert new is twin
        assert (new is old) == (policy == "alias")
        assert new.requires_grad == old.requires_grad
        assert (storage(new) == storage(old)) == (policy == "alias")
        assert (new.grad_fn is None) == (policy != "clone" or not old.requires_grad)
    away = tree_copy(tree, "detach", device="meta", dtype=dtype)
    for old, new in zip(leaves, tree_leaves(away), strict=True):
        assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, dtype or old.dtype)


@some(10)
@given(param_trees(dtype=WIDE), st.floats(0.5, 2))
def test_gradients_go_through_clones_and_stacks(tree: Any, factor: float) -> None:
    def through(tree: Any) -> Any:
        cloned = tree_copy(tree, "clone")
        return tree_unstack(tree_stack([tree, tree_map(lambda leaf: factor * leaf.sin(), cloned)]))

    check_grads(through, tree)


@given(param_trees(), st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_stacks_come_apart_again(tree: Any, factors: list[float]) -> None:
    trees = [tree_map(lambda leaf, by=by: leaf * by, tree) for by in factors]
    stacked = tree_stack(trees)
    assert {leaf.shape[0] for leaf in tree_leaves(stacked)} == {len(trees)}
    assert_same(tree_unstack(stacked), trees)
    assert_same(tree_stack(tree_unstack(stacked)), stacked)


@some(4)
@given(param_trees(dtype=WIDE), st.lists(st.floats(0.5, 2), min_size=1, max_size=3))
def test_a_loop_over_unstacked_tasks_is_many_tasks(tree: Any, factors: list[float]) -> None:
    def one(tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.sin() * leaf, tree)

    def many(stacked: Any) -> Any:
        return tree_stack([one(each) for each in tree_unstack(stacked)])

    stacked = tree_stack([tree_map(lambda leaf, by=by: leaf * by, tree) for by in factors])
    check_over_tasks(one, stacked, in_dims=0, mapped=many)


# Partitions ----------------------------------------------------------------------------------------------------------


def as_dicts(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {str(name): as_dicts(value) for name, value in items}


def by_name(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {prefix.removesuffix("."): tree}
    found = [by_name(value, f"{prefix}{name}.") for name, value in tree.items()]
    return {name: leaf for each in found for name, leaf in each.items()}


@given(param_trees().filter(lambda tree: not isinstance(tree, Tensor)), st.data())
def test_parts_are_combined_again(drawn: Any, data: st.DataObject) -> None:
    tree = as_dicts(drawn)
    flat = by_name(tree)
    name = data.draw(st.sampled_from(list(flat)))
    glob = data.draw(st.sampled_from([name, name[0] + "*", "*" + name[-1], name.replace(".", "?"), "*"]))
    wanted = {each for each in flat if each == glob or fnmatchcase(each, glob)}
    small = {each for each, leaf in flat.items() if leaf.ndim < 2}
    for select, names in [(glob, wanted), ([glob, name], wanted | {name}), (lambda _, leaf: leaf.ndim < 2, small)]:
        selected, rest = partition(tree, select)
        found, left = by_name(selected), by_name(rest)
        assert (set(found), set(left)) == (names, flat.keys() - names)
        assert all(leaf is flat[each] for each, leaf in {**found, **left}.items())
        assert all(leaf is flat[each] for each, leaf in by_name(combine(selected, rest)).items())
        assert_same(combine(rest, selected), tree)
    with pytest.raises(errors.NamesError, match="stands in more than one"):
        combine(tree, partition(tree, glob)[0])


@some(4)
@given(modules(dtype=WIDE, random=False), st.data())
def test_parts_of_a_module_are_differentiated(module: nn.Module, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module, params="detach")
    names = data.draw(st.sets(st.sampled_from([*params, None]))) - {None}
    selected, rest = partition(params, lambda name, _: name in names)
    frozen = tree_copy(rest, "detach")
    for value in frozen.values():
        value.requires_grad_(False)
    ours = apply(combine(selected, frozen), buffers, *args)[0].sin().sum()
    total = apply(params, buffers, *args)[0].sin().sum()
    assert_same(slopes(ours, selected), slopes(total, selected))


def slopes(value: Tensor, leaves: dict[str, Tensor]) -> Any:
    if not value.requires_grad or not leaves:
        return tree_map(torch.zeros_like, leaves)
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True, retain_graph=True)
    return dict(zip(leaves, found, strict=True))


# Modules -------------------------------------------------------------------------------------------------------------


@given(modules(), st.data())
def test_what_is_loaded_is_what_apply_was_given(module: nn.Module, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    first, second = other_values(params), other_values(buffers)
    loaded = copy.deepcopy(module)
    own = {name: (tensor, tensor.requires_grad) for name, tensor in loaded.state_dict(keep_vars=True).items()}
    with unmutated(module):
        load_(loaded, first, second)
        out, new = seeded_call(apply, first, second, *args)
        assert_same(seeded_call(loaded, *args), out)
    assert_same(stateless(loaded)[1:], (first, new))
    for name, tensor in loaded.state_dict(keep_vars=True).items():
        assert (tensor is own[name][0], tensor.requires_grad, tensor.grad_fn) == (True, own[name][1], None)
    load_(loaded, params)
    assert_same(stateless(loaded)[1:], (params, new))
    load_(loaded, buffers=buffers)
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))


@given(modules(), POLICIES, POLICIES, st.data())
def test_policies(module: nn.Module, policy: Any, other: Any, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module, params=policy, buffers=other)
    original = stateless(module)
    assert list(params) == [name for name, p in module.named_parameters() if p.requires_grad]
    for tree, theirs, kind in ((params, original.params, policy), (buffers, original.buffers, other)):
        assert_same(tree, theirs)
        for name, tensor in tree.items():
            assert (tensor is theirs[name]) == (kind == "alias")
            assert (storage(tensor) == storage(theirs[name])) == (kind == "alias")
            assert tensor.requires_grad == theirs[name].requires_grad
            assert tensor.is_leaf == (kind != "clone" or not tensor.requires_grad)
    with unmutated(module):
        out, _ = seeded_call(apply, params, buffers, *args)
    assert_same(out, seeded_call(copy.deepcopy(module), *args))
    if not out.requires_grad:
        return
    out.sin().sum().backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None}
    copied = copy.deepcopy(module)
    copied.zero_grad()
    seeded_call(copied, *args).sin().sum().backward()
    theirs = {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}
    own = {name: tensor.grad for name, tensor in params.items() if tensor.is_leaf and tensor.grad is not None}
    assert_trees_close(own if policy == "detach" else {n: module.get_parameter(n).grad for n in reached}, theirs)
    assert not (policy == "detach" and reached)


@some(2)
@given(modules(), st.sampled_from(["clone", "detach"]), st.data())
def test_a_module_is_moved_to_another_dtype(module: nn.Module, policy: Any, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module, params=policy, buffers=policy, dtype=WIDE)
    for name, tensor in {**params, **buffers}.items():
        held = {**stateless(module).params, **stateless(module).buffers}[name]
        assert tensor.dtype == (WIDE if held.is_floating_point() else held.dtype)
    wide = tuple(x.to(WIDE) if x.is_floating_point() else x for x in args)
    assert_same(seeded_call(apply, params, buffers, *wide)[0], seeded_call(copy.deepcopy(module).double(), *wide))


@some(2)
@given(modules(), st.data())
def test_a_bound_module_is_the_call(module: nn.Module, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    first, second = other_values(params), other_values(buffers)
    before = tree_copy(second, "detach")
    with unmutated(module):
        bound = apply.bind(first, second)
        out, new = seeded_call(apply, first, second, *args)
        assert_same(seeded_call(bound, *args), out)
        assert_same(second, before)
        assert type(bound) is type(module)
        assert_same(dict(stateless(bound).buffers), {name: new.get(name) for name in stateless(bound).buffers})
    again = seeded_call(apply.bind(first, second), *args)
    assert_same(slopes(again.sin().sum(), params), slopes(out.sin().sum(), params))
    for name, part in apply.bind(first, second).named_modules():
        if isinstance(part, nn.Linear) and not hasattr(part, "parametrizations"):
            x = torch.ones(2, part.in_features, dtype=part.weight.dtype)
            weight = {**first, **second}.get(f"{name}.weight".lstrip("."))
            assert weight is None or torch.equal(part(x), nn.functional.linear(x, weight, part.bias))


@some(2)
@given(modules(), st.booleans(), st.data())
def test_an_apply_in_another_mode(module: nn.Module, mode: bool, data: st.DataObject) -> None:
    args = data.draw(inputs_for(module))
    apply, params, buffers = stateless(module)
    other = copy.deepcopy(module).train(mode)
    with unmutated(module):
        first = seeded_call(apply, params, buffers, *args)
        changed = apply.train() if mode else apply.eval()
        out, new = seeded_call(changed, params, buffers, *args)
        assert_same(seeded_call(apply, params, buffers, *args), first)
    assert_same(out, seeded_call(other, *args))
    assert_same(stateless(other).buffers, new)
    assert {part.training for part in changed.bind(params, buffers).modules()} == {mode}


# Explanations --------------------------------------------------------------------------------------------------------


@some(2)
@given(modules(), st.data())
def test_an_explanation_is_true(module: nn.Module, data: st.DataObject) -> None:
    """Compilation is left out: it takes seconds."""
    args = data.draw(inputs_for(module))
    state = torch.get_rng_state()
    with unmutated(module), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trial, "_compiled", lambda self: None)
        report, held = explain(module, *args), explain(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name in str(report).splitlines() if "yes" in name] or not report.tried
    apply, params, buffers = stateless(module, params="detach")
    _, new = apply(params, buffers, *args)
    written = {name for name, value in new.items() if value is not buffers.get(name)}
    assert {row.name for row in report.held if row.written} == written
    assert {row.name for row in report.held if row.role == "parameter"} == set(params)
    assert {row.name for row in report.held if row.role not in ("parameter", "empty")} == set(buffers)
    assert [row.name for row in held.held] == [row.name for row in report.held]
    assert not held.tried

    def first(params: Any, *args: Any) -> Tensor:
        return apply(params, buffers, *args)[0].sin().sum()

    def second() -> None:
        grads = torch.autograd.grad(first(params, *args), list(params.values()), create_graph=True, allow_unused=True)
        total = torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum()
        _ = total.requires_grad and torch.autograd.grad(total, list(params.values()), allow_unused=True)

    def mapped() -> None:
        twice = tree_stack([(params, args)] * 2)
        over_tasks(torch.func.grad(first) if params else first, in_dims=0, backend="vmap")(twice[0], *twice[1])

    trials = {"gradient": lambda: torch.autograd.grad(first(params, *args), list(params.values()), allow_unused=True)}
    for topic, call in {**trials, "second order": second, "vmap": mapped}.items():
        if topic in report.tried:
            assert fails(call) == report.blocked(topic), topic


def fails(call: Any) -> bool:
    try:
        call()
    except (RuntimeError, NotImplementedError, errors.StatelessifyError):
        return True
    return False
