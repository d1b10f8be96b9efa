"""Modules from a seed, and the blocks that drawn modules are made of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis.errors import InvalidArgument
from hypothesis.vendor import pretty
from torch import nn

from statelessify import stateless
from statelessify.testing.strategies import Buffered, Chain, Indices, Residual, Shared, Single, Tied, seeded
from statelessify.testing.strategies._recipe import Call, call, recipe_of, with_code

EXAMPLES = {
    "linear": (call(nn.Linear, 1, 1), [(1,)]),
    "norm": (call(nn.BatchNorm1d, 2, momentum=None), [(2,)]),
    "residual": (Call(Residual, (call(nn.Linear, 2, 2),), {}), [(2,)]),
    "tied": (Call(Tied, (call(nn.Linear, 2, 2), call(nn.Linear, 2, 2, bias=False)), {}), [(2,)]),
    "shared": (Call(Shared, (call(nn.BatchNorm1d, 2),), {}), [(2,)]),
    "buffered": (call(Buffered, 2, persistent=False), [(2,)]),
    "single": (Call(Single, (call(nn.GRU, 2, 3, batch_first=True),), {}), [(4, 2)]),
    "chain": (Call(Chain, (call(nn.Bilinear, 1, 2, 3), call(nn.Tanh)), {}), [(1,), (2,)]),
    "embedding": (call(nn.Embedding, 5, 2), [Indices((3,), 5)]),
}


def args_of(takes: list) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randint(0, item.below, (3, *item.shape), generator=generator)
        if isinstance(item, Indices)
        else torch.randn((3, *item), generator=generator)
        for item in takes
    )


@pytest.mark.parametrize(("made", "takes"), EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("evaluating", [False, True])
def test_stateless_is_the_module_itself(made: Call, takes: list, evaluating: bool) -> None:
    module = seeded(made.make(), 3, takes=takes, evaluating=evaluating)
    args, twin = args_of(takes), copy.deepcopy(module)
    apply, params, buffers = stateless(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    out, new = apply(params, buffers, *args)
    torch.testing.assert_close(out, twin(*args))
    torch.testing.assert_close(new, dict(twin.named_buffers()))
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(("made", "takes"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_code_makes_the_same_module(made: Call, takes: list) -> None:
    one = seeded(made.make(), 3, takes=takes)
    two = seeded(eval(made.code()), 3, takes=takes)
    for copied in (two, pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert recipe_of(copied) == recipe_of(one)
        torch.testing.assert_close(dict(one.named_parameters()), dict(copied.named_parameters()), rtol=0, atol=0)
        torch.testing.assert_close(dict(one.named_buffers()), dict(copied.named_buffers()), rtol=0, atol=0)


def test_defaults_are_not_printed() -> None:
    assert call(nn.Conv2d, 1, 2, 3, stride=1, bias=False).code() == "nn.Conv2d(1, 2, 3, bias=False)"
    assert call(nn.utils.parametrizations.weight_norm, call(nn.Linear, 1, 1)).code() == (
        "nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))"
    )


def test_hypothesis_prints_the_code() -> None:
    module = seeded(nn.Linear(1, 1), 0, takes=[(1,)])
    assert pretty.pretty(module) == repr(module)
    with_code(module, "seeded(nn.Linear(1, 1), 0, takes=[(1,)])")
    assert pretty.pretty(copy.deepcopy(module)) == "seeded(nn.Linear(1, 1), 0, takes=[(1,)])"


def test_seeding_leaves_the_global_generator_alone() -> None:
    module, state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.get_rng_state()
    seeded(module, 0, takes=[(2,)])
    assert torch.equal(state, torch.get_rng_state())
    norm = module[1]
    assert norm.running_var.min() >= 0.5
    assert norm.running_mean.abs().min() > 0


def test_frozen_modes_and_dtype() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    seeded(module, 0, takes=[(2,)], dtype=torch.float64, frozen=["0.bias"], evaluating=["1"])
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, False]
    assert [part.training for part in module.modules()] == [True, True, False]
    assert module[0].weight.dtype == torch.float64


def test_spectral_norm_is_near_one() -> None:
    module = seeded(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), 0, takes=[(3,)], evaluating=True)
    assert 0.9 < torch.linalg.matrix_norm(module.weight, 2) < 1.5


def test_names_that_there_are_not() -> None:
    with pytest.raises(InvalidArgument, match=r"parameter `bais`, which there is not \(did you mean `bias`"):
        seeded(nn.Linear(1, 1), 0, takes=[(1,)], frozen=["bais"])
    with pytest.raises(InvalidArgument, match="submodule `1`"):
        seeded(nn.Linear(1, 1), 0, takes=[(1,)], evaluating=["1"])
    with pytest.raises(InvalidArgument, match=r"`takes` has the input 3; write a shape"):
        seeded(nn.Linear(1, 1), 0, takes=[3])
