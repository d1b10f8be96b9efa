"""Drawn modules: they work, `stateless` is the module itself, they print as code, and shrink to next to nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from pasted import again, printed, smallest
from torch import nn

from statelessify import stateless
from statelessify.testing import assert_trees_close, check_grads, inputs_for, modules, seeded
from statelessify.testing.strategies import Buffered, Residual, Shared, Tied
from statelessify.testing.strategies._modules import NAMES

OF_FAMILY: dict[str, Any] = {
    "linear": nn.Linear,
    "activation": nn.Tanh,
    "norm": nn.BatchNorm1d,
    "conv": nn.Conv1d,
    "pool": nn.AvgPool1d,
    "reshape": nn.Flatten,
    "recurrent": nn.RNNCell,
    "attention": nn.MultiheadAttention,
    "dropout": nn.Dropout,
    "residual": Residual,
    "tied": Tied,
    "shared": Shared,
    "buffered": Buffered,
    "bilinear": nn.Bilinear,
    "parametrized": nn.Linear,
    "embedding": nn.Embedding,
}


RIGHT = tuple(name for name in NAMES if name != "dropout")
"""Families without random numbers."""


def contains(*kinds: type) -> Any:
    return lambda module: any(isinstance(part, kinds) for part in module.modules())


@given(st.data(), modules())
def test_stateless_is_the_module_itself(data: Any, module: nn.Module) -> None:
    args, twin = data.draw(inputs_for(module)), copy.deepcopy(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    apply, params, buffers = stateless(module)
    torch.manual_seed(0)
    out, new = apply(params, buffers, *args)
    torch.manual_seed(0)
    expected = twin(*args)
    assert expected.isfinite().all()
    torch.testing.assert_close(out, expected)
    frozen = {name: tensor for name, tensor in twin.named_parameters() if not tensor.requires_grad}
    torch.testing.assert_close(dict(new), {**dict(twin.named_buffers()), **frozen}, check_stride=False)
    assert_trees_close(dict(module.state_dict()), before, rtol=0, atol=0)


@given(st.data(), modules())
def test_the_printed_code_makes_the_same_module(data: Any, module: nn.Module) -> None:
    copied = again(module)
    assert repr(copied) == repr(module)
    for one, two in zip(copied.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, two)
        assert (one.dtype, one.requires_grad) == (two.dtype, two.requires_grad)
    assert_trees_close(dict(copied.named_buffers()), dict(module.named_buffers()), rtol=0, atol=0)
    assert [part.training for part in copied.modules()] == [part.training for part in module.modules()]
    args = data.draw(inputs_for(copied, batch=2))
    assert all(torch.equal(one, two) for one, two in zip(again(args), args, strict=True))
    assert all(arg.shape[0] == 2 for arg in args)


@pytest.mark.parametrize("family", NAMES)
def test_each_family_can_be_had_alone(family: str) -> None:
    found = smallest(modules(layers=(family,)), contains(OF_FAMILY[family]))
    assert len(printed(found)) < 120
    assert contains(OF_FAMILY[family])(found)


def test_the_smallest() -> None:
    assert printed(smallest(modules())) == "seeded(nn.Linear(1, 1), 0, takes=[(1,)], dtype=torch.float32)"
    norm = smallest(modules(), contains(nn.BatchNorm1d))
    assert printed(norm) == "seeded(nn.BatchNorm1d(1), 0, takes=[(1,)], dtype=torch.float32)"
    frozen = smallest(modules(), lambda module: not all(p.requires_grad for p in module.parameters()))
    code = printed(frozen).replace(", bias=False", "")  # which of the two is smaller depends on the way there
    assert code == "seeded(nn.Linear(1, 1), 0, takes=[(1,)], dtype=torch.float32, frozen=['weight'])"


@given(modules(dtype=torch.float64, training=True, frozen=False, max_depth=1))
@settings(max_examples=50)
def test_narrowed(module: nn.Module) -> None:
    assert all(p.dtype == torch.float64 and p.requires_grad for p in module.parameters())
    assert all(part.training for part in module.modules())


@given(st.data(), modules(random=False))
@settings(max_examples=50)
def test_not_random(data: Any, module: nn.Module) -> None:
    args = data.draw(inputs_for(module))
    torch.manual_seed(0)
    first = copy.deepcopy(module)(*args)
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(module)(*args), first)


def test_random() -> None:
    @given(modules(layers=("dropout",), training=False))
    @settings(max_examples=10)
    def check(module: nn.Module) -> None:
        assert not module.training

    check()


@given(st.data(), modules(layers=RIGHT, smooth=True, random=False, frozen=False, dtype=torch.float64, max_depth=1))
@settings(max_examples=8)
def test_smooth_modules_have_two_derivatives(data: Any, module: nn.Module) -> None:
    args = data.draw(inputs_for(module, batch=2))
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    assume(params or args[0].is_floating_point())

    def square(tree: dict[str, Any]) -> torch.Tensor:
        return (apply(tree["params"], buffers, tree["x"])[0] ** 2).sum()

    check_grads(square, {"params": params, "x": args[0]}, order=2, modes=("reverse",), entries=1)


def test_weight_norm_has_two_derivatives() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))
    module = seeded(linear, 23, takes=[(3,)], dtype=torch.float64)
    apply, params, buffers = stateless(module, params="detach", buffers="detach")
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    check_grads(lambda params: (apply(params, buffers, x)[0] ** 2).sum(), params, order=2, modes=("reverse",))


def test_all_modes() -> None:
    mixed = smallest(modules(), lambda module: len({part.training for part in module.modules()}) == 2)
    assert "evaluating=[" in printed(mixed)
    assert smallest(modules(training=False)).training is False


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (modules(layers=("lienar",)), r"`layers` names `lienar`, which there is not \(did you mean `linear`"),
        (modules(layers="conv"), r"`layers='conv'` is str; write a tuple of names"),
        (modules(layers=("dropout",), random=False), "`random=False` leave no layer"),
        (modules(dtype=torch.int64), "write a floating-point dtype"),
        (modules(max_depth=0), "`max_depth=0`; write a whole number from 1 on"),
        (modules(frozen=True), "`frozen=True`; write False for none"),
        (inputs_for(nn.Linear(1, 1)), r"`Linear` does not say what it takes; write `seeded\(module"),
        (inputs_for(seeded(nn.Linear(1, 1), 0, takes=[(1,)]), batch=0), "`batch=0`; write a whole number from 1 on"),
    ],
)
def test_options_that_there_are_not(strategy: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        smallest(strategy)
