"""What goes into an optimizer stays as it is, and what comes out is of its dtype, its own, and can be kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from optim_naive import SPECS, make, number_names, plain, with_numbers
from problems import assert_close
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from statelessify import optim
from statelessify.optim import _rule

EACH_RULE = pytest.mark.parametrize("rule", SPECS)
DTYPES = [torch.float32, torch.float64]
# Odd numbers of entries, so that vectorized arithmetic has a rest; four and more of them are stacked.
SHAPES: list[tuple[int, ...]] = [(3, 7)] * 5 + [(1, 1)] * 4 + [(5, 2)]


def tensors(dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    return {f"p{index}": torch.randn(shape, dtype=dtype, **options) for index, shape in enumerate(SHAPES)}


def learned(rule: str) -> tuple[optim.Optimizer, list[Tensor]]:
    """A rule of which every number is a tensor that requires a gradient."""
    values = plain(rule)
    numbers = {name: torch.tensor(value, requires_grad=True) for name, value in number_names(values)}
    return make(rule, with_numbers(values, numbers)), list(numbers.values())


def run(optimizer: optim.Optimizer, params: Any, gradients: Any, state: Any = None) -> tuple[Any, Any]:
    state = optimizer.init(params) if state is None else state
    for grads in gradients:
        params, state = optimizer.step(params, grads, state)
    return params, state


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Snapshot:
    """All that could be seen of a change in the tensors of a tree, and in the tree."""

    def __init__(self, tree: Any) -> None:
        self.tree, (self.leaves, self.spec) = tree, tree_flatten(tree)
        self.seen = [self._of(leaf) for leaf in self.leaves]

    @staticmethod
    def _of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf._version, leaf.requires_grad, leaf.grad_fn, leaf.data_ptr(), leaf.detach().clone()

    def assert_same(self) -> None:
        leaves, spec = tree_flatten(self.tree)
        assert spec == self.spec
        assert all(a is b for a, b in zip(leaves, self.leaves, strict=True))
        for seen, leaf in zip(self.seen, leaves, strict=True):
            if isinstance(leaf, Tensor):
                assert seen[:-1] == self._of(leaf)[:-1]
                assert seen[-1].equal(leaf.detach())
                assert not leaf.is_leaf or leaf.grad is None


@pytest.mark.parametrize("requires_grad", [False, True])
@EACH_RULE
def test_nothing_that_is_passed_in_changes(rule: str, requires_grad: bool) -> None:
    optimizer, numbers = learned(rule) if requires_grad else (make(rule, plain(rule)), [])
    params = tensors(requires_grad=requires_grad)
    gradients = [tensors(requires_grad=requires_grad) for _ in range(3)]
    snapshots = [Snapshot(each) for each in (params, gradients, numbers)]
    state: Any = optimizer.init(params)
    for grads in gradients:
        snapshots += [Snapshot(each) for each in (params, state.step, dict(state.hyperparameters), state.slots)]
        params, state = optimizer.step(params, grads, state)
    for snapshot in snapshots:
        snapshot.assert_same()


@EACH_RULE
def test_new_parameters_share_no_memory(rule: str) -> None:
    optimizer = make(rule, plain(rule))
    params, grads = tensors(), tensors()
    state = optimizer.init(params)
    for _ in range(2):
        before = params, grads, state
        params, state = optimizer.step(params, grads, state)
        own = [leaf.untyped_storage().data_ptr() for leaf in params.values()]
        others = {leaf.untyped_storage().data_ptr() for leaf in tensors_in((before, state))}
        assert len(set(own)) == len(own)
        assert not others & set(own)


@EACH_RULE
def test_new_parameters_can_be_changed_in_place(rule: str) -> None:
    optimizer = make(rule, plain(rule))
    start, gradients = tensors(requires_grad=True), [tensors(requires_grad=True) for _ in range(2)]

    def last(in_place: bool) -> Any:
        params, state = run(optimizer, start, gradients[:1])
        for name, leaf in params.items():
            params[name] = leaf.mul_(0.5) if in_place else 0.5 * leaf
        params, state = run(optimizer, params, gradients[1:], state)
        slots = [leaf for leaf in tensors_in(state.slots) if leaf.requires_grad]
        total = sum((leaf**2).sum() for leaf in [*params.values(), *slots])
        return torch.autograd.grad(total, tensors_in([start, gradients]), allow_unused=True, materialize_grads=True)

    assert_close(last(True), last(False), 1e-12)


def later(step: Tensor) -> Tensor:
    return 0.1 / (1 + step)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@EACH_RULE
def test_optimizers_and_states_can_be_copied(rule: str, copied: Any) -> None:
    values = plain(rule)
    optimizer = make(rule, values | {"lr": {"p[0-3]": torch.tensor(0.1), "p[!0-3]": later}})
    params, gradients = tensors(), [tensors() for _ in range(4)]
    middle, state = run(optimizer, params, gradients[:2])
    expected = run(optimizer, middle, gradients[2:], state)
    again, warm = copied(optimizer), copied(state)
    assert isinstance(again, optim.Optimizer)
    assert isinstance(warm, optim.OptState)
    assert warm.step is not state.step
    assert (again.elementwise, repr(again.init)) == (optimizer.elementwise, repr(optimizer.init))
    for found in (run(again, middle, gradients[2:], warm), run(optimizer, middle, gradients[2:], warm)):
        for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
            assert a.equal(b)
    run(again, params, gradients)


@EACH_RULE
def test_the_dtypes_of_one_tree_stay_apart(rule: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    names = {f"{dtype}{index}".removeprefix("torch."): dtype for index in range(4) for dtype in dtypes}
    params, grads = ({name: torch.randn(2, 3).to(dtype) for name, dtype in names.items()} for _ in range(2))
    for optimizer in (make(rule, plain(rule)), learned(rule)[0]):
        found, state = run(optimizer, params, [grads] * 3)
        assert {name: leaf.dtype for name, leaf in found.items()} == names
        for tree in state.slots.values():
            scalar = all(leaf.ndim == 0 for leaf in tree.values())
            assert {name: leaf.dtype for name, leaf in tree.items()} == names or scalar
        assert (state.step.dtype, state.step.shape, int(state.step)) == (torch.int64, (), 3)
        alone = {name: leaf for name, leaf in params.items() if leaf.dtype == torch.float64}
        expected, _ = run(optimizer, alone, [{name: grads[name] for name in alone}] * 3)
        assert all(found[name].equal(leaf) for name, leaf in expected.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_RULE
def test_stacked_leaves_are_each_leaf_bit_for_bit(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, gradients = tensors(dtype), [tensors(dtype) for _ in range(4)]
    gradients[1]["p0"][0, :3] = torch.tensor([0.0, 1e-30, 1e10])
    for optimizer in (make(rule, plain(rule)), getattr(optim, rule)(), learned(rule)[0]):
        together = run(optimizer, params, gradients)
        with monkeypatch.context() as patch:
            patch.setattr(_rule, "STACKED", 1000)
            apart = run(optimizer, params, gradients)
        for a, b in zip(
            tensors_in((together[0], together[1].slots)), tensors_in((apart[0], apart[1].slots)), strict=True
        ):
            assert a.equal(b)


@EACH_RULE
def test_the_repr_says_the_rule_and_its_hyperparameters(rule: str) -> None:
    words = repr(getattr(optim, rule)(lr=0.125))
    assert words.startswith("Optimizer(")
    assert f"{rule}(lr=0.125, " in words
    assert " at 0x" not in words
    assert all(f"{name}=" in words for name in SPECS[rule].numbers)
