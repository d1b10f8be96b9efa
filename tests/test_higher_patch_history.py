"""Patched modules: the weights over time, how they grow and how they are asked for, with tracking and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from higher_cases import QUIET, Encoder, mlp, others, reference, times, visible
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]

tracked = pytest.mark.parametrize("tracking", [True, False], ids=["tracked", "untracked"])


def step(fmodel: Any, x: Tensor) -> list[Tensor]:
    model = nn.Sequential()
    for number, p in enumerate(fmodel.fast_params):
        model.register_parameter(str(number), nn.Parameter(p.detach()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    diffopt = higher.get_diff_optim(optimizer, model.parameters(), fmodel, track_higher_grads=fmodel.track_higher_grads)
    return diffopt.step(fmodel(x).square().sum())


def put(fmodel: Any, x: Tensor) -> list[Tensor]:
    fmodel.fast_params = new = others(fmodel)
    return new


def update(fmodel: Any, x: Tensor) -> list[Tensor]:
    fmodel.update_params(iter(new := others(fmodel)))
    return new


def pass_on(fmodel: Any, x: Tensor) -> list[Tensor]:
    fmodel(x, params=tuple(new := others(fmodel)))
    return new


def pass_to_forward(fmodel: Any, x: Tensor) -> list[Tensor]:
    fmodel.forward(x, params=(new := others(fmodel)))
    return new


def pass_to_part(fmodel: Any, x: Tensor) -> list[Tensor]:
    fmodel.linear(x, params=(new := others(fmodel)))
    return new


def pass_own_to_part(fmodel: Any, x: Tensor) -> list[Tensor]:
    own = [torch.randn(4, 3), torch.randn(4)]
    new = [*own, *fmodel.fast_params[2:]]
    fmodel.linear(x, params=own)
    return new


def assign(fmodel: Any, x: Tensor) -> list[Tensor]:
    new = list(fmodel.fast_params)
    new[3] = torch.randn(4)
    fmodel.norm.bias = new[3]
    return new


WAYS = [step, put, update, pass_on, pass_to_forward, pass_to_part, pass_own_to_part, assign]
ways = pytest.mark.parametrize("way", WAYS)


def test_the_ways_of_assigning_at_the_root_are_the_same() -> None:
    fmodel, weight = higher.monkeypatch(nn.Linear(3, 2)), torch.randn(2, 3)
    bias = fmodel.bias
    fmodel.weight = weight
    assert times(fmodel) == 2
    assert list(map(id, fmodel.parameters())) == [id(weight), id(bias)]


@ways
def test_each_way_grows_the_history_by_one(way: Any) -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    first = list(fmodel.parameters())
    new = way(fmodel, x)
    assert times(fmodel) == 2
    assert list(map(id, fmodel.parameters())) == list(map(id, new))
    assert list(map(id, fmodel.parameters(time=0))) == list(map(id, first))
    assert list(map(id, fmodel.init_fast_params)) == list(map(id, first))
    assert_close(fmodel(x), reference(Encoder(), new, x))


@ways
def test_without_tracking_each_way_replaces_the_only_entry(way: Any) -> None:
    fmodel, x = higher.monkeypatch(Encoder(), track_higher_grads=False), torch.randn(5, 3)
    for _ in range(2):
        new = way(fmodel, x)
        assert times(fmodel) == 1
        for time in (None, 0, -1):
            assert list(map(id, fmodel.parameters(time=time))) == list(map(id, new))
        assert_close(fmodel(x), reference(Encoder(), new, x))


@ways
@tracked
def test_each_way_is_seen_everywhere_at_once(way: Any, tracking: bool) -> None:
    """Attributes, `named_parameters`, `state_dict`, other methods: in higher some of them lag."""
    fmodel, x = higher.monkeypatch(Encoder(), track_higher_grads=tracking), torch.randn(5, 3)
    new = way(fmodel, x)
    assert [id(p) for _, p in fmodel.named_parameters()] == list(map(id, new))
    assert_close(
        [value for name, value in fmodel.state_dict().items() if "norm.r" not in name and "num" not in name], new
    )
    assert fmodel.linear.weight is new[0]
    assert_close(fmodel.encode(x), x @ new[0].T + new[1])
    assert_close(fmodel.linear(x), x @ new[0].T + new[1])
    assert_close(fmodel.boxed_forward(x), reference(Encoder(), new, x))


@given(st.lists(st.sampled_from(WAYS), max_size=4), st.integers(-7, 7))
def test_time_is_an_index_into_the_history(chosen: list[Any], time: int) -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    history = [list(fmodel.parameters()), *([*way(fmodel, x)] for way in chosen)]
    if -len(history) <= time < len(history):
        assert list(map(id, fmodel.parameters(time=time))) == list(map(id, history[time]))
    else:
        with pytest.raises(IndexError, match=f"time={time}"):
            fmodel.parameters(time=time)
    assert list(map(id, fmodel.parameters(time=None))) == list(map(id, history[-1]))


@pytest.mark.parametrize("time", [1, -2, 5, -5])
def test_without_tracking_there_is_one_time(time: int) -> None:
    fmodel = higher.monkeypatch(mlp(), track_higher_grads=False)
    with pytest.raises(ValueError, match=f"time={time}"):
        fmodel.parameters(time=time)
    with pytest.raises(ValueError, match="not kept"):
        _ = fmodel.init_fast_params
    assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters(time=0))


def test_parameters_is_an_iterator_of_all_weights() -> None:
    fmodel = higher.monkeypatch(mlp())
    found = fmodel.parameters()
    assert next(found) is fmodel.fast_params[0]
    assert len(list(found)) == 3
    with pytest.warns(UserWarning, match="recurse"):
        assert len(list(fmodel.parameters(recurse=False))) == 4
    assert [id(p) for p in fmodel[0].parameters()] == [id(p) for p in fmodel.fast_params[:2]]


def test_fast_params_is_the_list_itself() -> None:
    fmodel = higher.monkeypatch(mlp())
    assert fmodel.fast_params is fmodel.fast_params
    given = others(fmodel)
    fmodel.fast_params = given
    given[0] = None
    assert fmodel.fast_params is not given
    assert isinstance(fmodel.fast_params[0], Tensor)


@pytest.mark.parametrize("use", [lambda f, x: f(x), lambda f, x: f.forward(x), lambda f, x: f.linear(x)])
def test_a_list_that_was_written_into_is_used(use: Any) -> None:
    fmodel, x = higher.monkeypatch(Encoder().eval()), torch.randn(5, 3)
    fmodel.fast_params[0] = weight = torch.randn(4, 3)
    expected = fmodel.fast_params
    out = use(fmodel, x)
    assert times(fmodel) == 1
    full = reference(Encoder().eval(), expected, x)
    assert_close(out, x @ weight.T + expected[1] if out.shape == (5, 4) else full)
    assert fmodel.linear.weight is weight


# ---------------------------------------------------------------- switching tracking


@pytest.mark.parametrize("value", [1, 0, None, "True", torch.tensor(True)])
def test_tracking_is_a_bool(value: Any) -> None:
    fmodel = higher.monkeypatch(mlp())
    before = visible(fmodel)
    with pytest.raises(ValueError, match="track_higher_grads"):
        fmodel.track_higher_grads = value
    assert visible(fmodel) == before
    with pytest.raises(ValueError, match="track_higher_grads"):
        higher.monkeypatch(mlp(), track_higher_grads=value)


@ways
def test_switched_off_it_keeps_the_latest_and_loses_no_update(way: Any) -> None:
    fmodel, x = higher.monkeypatch(Encoder()), torch.randn(5, 3)
    for _ in range(2):
        latest = update(fmodel, x)
    fmodel.track_higher_grads = False
    assert times(fmodel) == 1
    assert list(map(id, fmodel.parameters())) == list(map(id, latest))
    new = way(fmodel, x)
    assert list(map(id, fmodel.parameters())) == list(map(id, new))
    assert_close(fmodel(x), reference(Encoder(), new, x))


def test_switched_on_again_the_history_grows_again() -> None:
    fmodel = higher.monkeypatch(mlp(), track_higher_grads=False)
    first = update(fmodel, torch.ones(3))
    fmodel.track_higher_grads = True
    second = update(fmodel, torch.ones(3))
    assert [list(map(id, weights)) for weights in fmodel._fast_params] == [list(map(id, w)) for w in (first, second)]
    assert list(map(id, fmodel.init_fast_params)) == list(map(id, first))


# ---------------------------------------------------------------- lists that are refused


def bad_lists(good: list[Tensor]) -> dict[str, tuple[Any, type[Exception]]]:
    return {
        "empty": ([], IndexError),
        "short": (good[:-1], IndexError),
        "long": ([*good, good[0]], IndexError),
        "shape": ([good[0].T, *good[1:]], ValueError),
        "order": (good[::-1], ValueError),
        "None": ([*good[:-1], None], TypeError),
        "number": ([1.0, *good[1:]], TypeError),
        "tensor": (good[0], TypeError),
        "not iterable": (3, TypeError),
    }


@pytest.mark.parametrize("name", bad_lists([torch.ones(4, 3), torch.ones(4)]))
@pytest.mark.parametrize(
    "use",
    [
        lambda f, x, params: f(x, params=params),
        lambda f, x, params: f.forward(x, params=params),
        lambda f, x, params: f.linear(x, params=params),
        lambda f, x, params: f.update_params(params),
        lambda f, x, params: setattr(f, "fast_params", params),
    ],
    ids=["call", "forward", "submodule", "update_params", "fast_params"],
)
@tracked
def test_a_bad_list_changes_nothing(use: Any, name: str, tracking: bool) -> None:
    fmodel, x = higher.monkeypatch(Encoder(), track_higher_grads=tracking), torch.randn(5, 3)
    params, error = bad_lists(others(fmodel))[name]
    before = visible(fmodel)
    with pytest.raises(error):
        use(fmodel, x, params)
    assert visible(fmodel) == before
    assert fmodel(x).shape == (5, 2)


def test_an_iterable_that_fails_changes_nothing() -> None:
    fmodel = higher.monkeypatch(mlp())

    def failing() -> Any:
        yield fmodel.fast_params[0]
        raise ZeroDivisionError

    before = visible(fmodel)
    with pytest.raises(ZeroDivisionError):
        fmodel.update_params(failing())
    assert visible(fmodel) == before
