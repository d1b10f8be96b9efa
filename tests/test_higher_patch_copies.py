"""Patched modules, pickled and deep-copied: root and parts, before steps and after."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, Tied, bits, everything, others, slopes, times, visible
from torch import nn
from torch.testing import assert_close

from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


STATES: dict[str, Callable[[Any], None]] = {
    "new": lambda fmodel: None,
    "called": lambda fmodel: fmodel(torch.randn(5, 3)),
    "stored": lambda fmodel: fmodel.update_params(others(fmodel)),
    "assigned": lambda fmodel: setattr(fmodel.linear, "weight", torch.randn_like(fmodel.linear.weight)),
    "stepped": lambda fmodel: stepped(fmodel),
    "untracked": lambda fmodel: setattr(fmodel, "track_higher_grads", False),
    "evaluated": lambda fmodel: fmodel.eval(),
}


def stepped(fmodel: Any) -> None:
    """Weights that are not leaves."""
    found = slopes(fmodel(torch.randn(5, 3)).square().sum(), fmodel.fast_params, create_graph=True)
    fmodel.update_params([p - 0.1 * slope for p, slope in zip(fmodel.parameters(), found, strict=True)])


states = pytest.mark.parametrize("state", STATES)
ways = pytest.mark.parametrize("way", [pickled, saved, copy.deepcopy])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.linear = nn.LSTM(3, 4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.cells(x)[0])


class Stateful(Encoder):
    """Leaves something out when it is pickled, and makes it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = {"made": "at first"}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "cache": {"made": "again"}})


modules = pytest.mark.parametrize("make", [Encoder, Tied, Recurrent, Stateful])


def patched(make: Callable[[], nn.Module], state: str) -> Any:
    fmodel = higher.monkeypatch(make())
    STATES[state](fmodel)
    return fmodel


@ways
@states
@modules
def test_a_copy_is_the_same_and_its_own(way: Any, state: str, make: Any) -> None:
    fmodel, x = patched(make, state), torch.randn(5, 3)
    before = visible(fmodel)
    copied = way(fmodel)
    assert visible(fmodel) == before
    assert type(copied) is type(fmodel)
    assert repr(copied) == repr(fmodel)
    assert copied.track_higher_grads == fmodel.track_higher_grads
    assert_close(copied._fast_params, fmodel._fast_params)
    for mine, theirs in zip(copied._fast_params, fmodel._fast_params, strict=True):
        assert [p.requires_grad for p in mine] == [p.requires_grad for p in theirs]
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(mine, theirs, strict=True))
    assert [id(p) for _, p in copied.named_parameters()] == [id(p) for p in copied.fast_params]
    assert bits(copied) == bits(fmodel)
    assert all(a is not b for a, b in zip(copied.buffers(), fmodel.buffers(), strict=True))
    assert_close(copied.state_dict(), fmodel.state_dict())
    assert_close(copied(x), fmodel(x))


@ways
@states
def test_a_copy_goes_on_alone(way: Any, state: str) -> None:
    fmodel, x = patched(Encoder, state), torch.randn(5, 3)
    copied = way(fmodel)
    before, expected = visible(fmodel), times(copied) + copied.track_higher_grads
    assert copied.root is copied.linear.root is copied
    assert copied.is_root
    assert not copied.linear.is_root
    copied(x)
    stepped(copied)
    assert times(copied) == expected
    copied.linear.bias = torch.zeros(4)
    copied.norm.running_mean.add_(1)
    assert_close(copied.linear(x), x @ copied.fast_params[0].T)
    assert all(p.grad is None for p in copied.parameters(time=0) if p.is_leaf)
    assert visible(fmodel) == before


@ways
@states
def test_a_part_is_copied_with_the_weights_that_it_needs(way: Any, state: str) -> None:
    fmodel, x = patched(Encoder, state), torch.randn(5, 3)
    before = visible(fmodel)
    part = way(fmodel.linear)
    assert type(part) is type(fmodel.linear)
    assert_close(part(x), fmodel.linear(x))
    part.weight = torch.zeros(4, 3)
    assert_close(part(x), fmodel.linear.bias.expand(5, 4))
    assert_close(part(x, params=[torch.ones(4, 3), torch.ones(4)]), (x.sum(1, keepdim=True) + 1).expand(5, 4))
    assert visible(fmodel) == before


@ways
def test_tied_weights_stay_tied(way: Any) -> None:
    copied = way(patched(Tied, "stepped"))
    assert copied.weight is copied.linear.weight is copied.fast_params[0]
    copied.weight = weight = torch.zeros(3, 3)
    assert copied.linear.weight is weight


@ways
def test_without_weights_too(way: Any) -> None:
    fmodel, x = higher.patch.make_functional(Encoder()), torch.randn(5, 3)
    weights = [torch.randn_like(p) for p in Encoder().parameters()]
    copied = way(fmodel)
    assert copied.fast_params is None
    with pytest.raises(ValueError, match="no weights"):
        copied(x)
    assert_close(copied(x, params=weights), fmodel(x, params=weights))


@pytest.mark.parametrize("way", [pickled, copy.deepcopy])
def test_what_is_one_object_beside_it_stays_one(way: Any) -> None:
    """As for ordinary modules: a program keeps a part, or a hook's owner, next to the whole."""
    fmodel = higher.monkeypatch(Encoder())
    for both in ((fmodel, fmodel.linear), [fmodel.linear, fmodel][::-1]):
        copied, part = way(both)
        assert part is copied.linear
    part, copied = way((fmodel.linear, fmodel))
    assert part is copied.linear
    first, second = way((fmodel, fmodel))
    assert first is second


@ways
def test_a_module_that_holds_it_is_copied_with_it(way: Any) -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    outer, x = Outer(), torch.randn(5, 3)
    outer.inner = higher.monkeypatch(Encoder())
    stepped(outer.inner)
    if way is not copy.deepcopy:
        outer.__class__ = nn.Sequential  # a class that pickle finds
    copied = way(outer)
    assert_close(copied.inner(x), outer.inner(x))
    assert copied.inner.linear.root is copied.inner


def test_the_graph_is_not_copied() -> None:
    """A copy has leaves of its own, over all of its time, and its gradients end there."""
    model, x = Encoder(), torch.randn(5, 3)
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    stepped(fmodel)
    before = everything(model)
    copied = copy.deepcopy(fmodel)
    assert all(p.is_leaf and p.requires_grad for weights in copied._fast_params for p in weights)
    copied(x).sum().backward()
    assert everything(model) == before
    assert all(p.grad is not None for p in copied.fast_params)


def test_a_copy_can_be_copied() -> None:
    fmodel, x = patched(Encoder, "stepped"), torch.randn(5, 3)
    copied = pickled(copy.deepcopy(pickled(fmodel)))
    assert (times(copied), copied.root is copied) == (2, True)
    assert_close(copied(x), fmodel(x))
    with pytest.raises(ValueError, match="patched"):
        higher.monkeypatch(copied)
