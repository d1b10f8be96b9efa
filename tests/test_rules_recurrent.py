"""The rules of recurrent layers and cells: with every option, given states, packed sequences."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_checks import Call, Make, check_as_torch, check_second_order, check_tasks, close, flags
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from statelessify import _tasks, over_tasks, stateless, tree_unstack

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

LAYERS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="tanh", **kwargs),
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
CELLS = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *args, **kwargs: nn.RNNCell(*args, nonlinearity="relu", **kwargs),
}


class Case(NamedTuple):
    """A call of a module on an input, as many states as it takes, and its weights."""

    call: Call
    make: Make
    states: int


def _case(module: nn.Module, shape: tuple[int, ...], states: list[tuple[int, ...]], given_states: bool) -> Case:
    names = [name for name, _ in module.named_parameters()]
    count = len(states) if given_states else 0

    def make() -> tuple[Tensor, ...]:
        weights = [torch.randn_like(p) / 2 for p in module.parameters()]
        return torch.randn(shape), *[torch.randn(s) for s in states[:count]], *weights

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        hidden: Any = rest[:count]
        hidden = (hidden if len(states) > 1 else hidden[0],) if count else ()
        out = functional_call(module, dict(zip(names, rest[count:], strict=True)), (x, *hidden))
        return _joined(out)

    return Case(call, make, count)


def _joined(out: Any) -> Tensor:
    return out.flatten() if isinstance(out, Tensor) else torch.cat([_joined(part) for part in out])


@st.composite
def layers(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(list(LAYERS)))
    deep, both, batch_first = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans())
    projected = 2 if name == "LSTM" and draw(st.booleans()) else 0
    options = {"num_layers": deep, "bidirectional": both, "batch_first": batch_first, "bias": draw(st.booleans())}
    if projected:
        options["proj_size"] = projected
    module = LAYERS[name](2, 3, **options)
    batch = () if draw(st.booleans()) else (2,)
    shape = (*batch, 4, 2) if batch_first else (4, *batch, 2)
    directions = deep * (2 if both else 1)
    states = [(directions, *batch, projected or 3)] + ([(directions, *batch, 3)] if name == "LSTM" else [])
    return _case(module, shape, states, draw(st.booleans()))


@st.composite
def cells(draw: st.DrawFn) -> Case:
    name, bias = draw(st.sampled_from(list(CELLS))), draw(st.booleans())
    batch = () if draw(st.booleans()) else (2,)
    states = [(*batch, 3)] * (2 if name == "LSTM" else 1)
    return _case(CELLS[name](2, 3, bias=bias), (*batch, 2), states, draw(st.booleans()))


def check(case: Case, mapped: list[bool]) -> None:
    check_as_torch(case.call, case.make())
    x, state, weights = mapped
    width = len(case.make()) - 1 - case.states
    check_tasks(case.call, case.make, [x, *[state] * case.states, *[weights] * width])


@given(layers(), flags(3))
@settings(max_examples=settings().max_examples // 2)
def test_layers(case: Case, mapped: list[bool]) -> None:
    check(case, mapped)


@given(cells(), flags(3))
@settings(max_examples=settings().max_examples // 2)
def test_cells(case: Case, mapped: list[bool]) -> None:
    check(case, mapped)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "tanh"])  # relu has kinks
def test_second_order(name: str) -> None:
    case = _case(LAYERS[name](2, 3), (4, 2), [(1, 3)] * (2 if name == "LSTM" else 1), True)
    check_second_order(case.call, case.make())
    case = _case(CELLS[name](2, 3, bias=False), (2,), [(3,)] * (2 if name == "LSTM" else 1), True)
    check_second_order(case.call, case.make())


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_between_layers(name: str) -> None:
    apply, params, buffers = stateless(LAYERS[name](2, 8, num_layers=2, dropout=0.5), params="detach")
    x = torch.randn(4, 2).expand(3, 4, 2)
    call = lambda x: _joined(apply(params, buffers, x)[0])
    different, same = (vmap(call, randomness=kind)(x) for kind in ("different", "same"))
    assert not torch.equal(different[0], different[1])
    assert torch.equal(same[0], same[1])
    close(
        vmap(lambda x: _joined(apply.eval()(params, buffers, x)[0]))(x)[0], _joined(apply.eval()(params, {}, x[0])[0])
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("inside", [True, False], ids=["packed for each task", "packed"])
def test_packed_sequences(name: str, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch cannot pack for many tasks: they run in a loop, with one warning. The numbers are the module's."""
    monkeypatch.setattr(_tasks, "_warned", set())
    module = LAYERS[name](2, 3)
    apply, params, buffers = stateless(module, params="detach")
    sizes = pack_sequence([torch.ones(4, 2), torch.ones(3, 2)]).batch_sizes
    batches = (torch.randn(5, 4, 2), torch.randn(5, 3, 2)) if inside else (torch.randn(5, 7, 2),)

    def run(call: Any, batch: tuple[Tensor, ...]) -> Tensor:
        packed = pack_sequence(list(batch)) if inside else PackedSequence(batch[0], sizes)
        out, states = call(packed)
        return _joined([out.data, states])

    wrapped = over_tasks(lambda params, batch: run(lambda packed: apply(params, buffers, packed)[0], batch))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        wrapped(params, batches)
        found = wrapped(params, batches)
    said = [str(each.message) for each in record if "cannot batch" in str(each.message)]
    assert len(said) == 1 if inside else len(said) <= 1
    expected = torch.stack([run(module, batch) for batch in tree_unstack(batches)])
    close(found, expected)
    ways = ((found, params.values()), (expected, module.parameters()))
    own, theirs = (torch.autograd.grad(out.square().sum(), list(weights)) for out, weights in ways)
    close(own, theirs)


def test_nothing_is_said_of_layers_that_torch_can_batch() -> None:
    apply, params, buffers = stateless(nn.LSTM(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = over_tasks(lambda p, x: apply(p, buffers, x)[0][0])(params, torch.randn(4, 5, 2))
    assert out.shape == (4, 5, 3)
