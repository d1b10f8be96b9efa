"""What programs in the wild do with the insides of higher, each checked to be right here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import statelessify.compat.higher
from statelessify.compat import higher

pytestmark = pytest.mark.usefixtures("float64")


def stepped(diffopt: Any, w: Tensor) -> Tensor:
    return diffopt.step((w**2).sum(), params=[w])[0]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_whose_data_is_replaced(shape: tuple[int, ...]) -> None:
    """Bounds are kept by `rate.data = rate.data.clamp(...)`, which leaves the object the same."""
    w, rate = torch.ones(1, requires_grad=True), torch.full(shape, 0.1, requires_grad=True)
    diffopt = higher.get_diff_optim(torch.optim.SGD([w], lr=0.1), [w], override={"lr": [rate]})
    first = stepped(diffopt, w)
    rate.data = torch.zeros(shape)
    assert torch.equal(stepped(diffopt, first), first)
    assert first.item() == pytest.approx(0.8)


def test_a_list_of_betas_that_is_written_into() -> None:
    w = torch.ones(1, requires_grad=True)
    diffopt = higher.get_diff_optim(torch.optim.Adam([w], lr=0.1), [w], override={"betas": [[0.9, 0.999]]})
    stepped(diffopt, w)
    diffopt.param_groups[0]["betas"][0] = 0.5
    stepped(diffopt, w)
    assert diffopt.state[0][0]["exp_avg"].item() == pytest.approx(0.5 * 0.2 + 0.5 * 2)


@pytest.mark.parametrize("track", [True, False])
def test_groups_hold_the_new_weights_after_a_step(track: bool) -> None:
    a, b = torch.ones(1, requires_grad=True), torch.ones(2, requires_grad=True)
    opt = torch.optim.SGD([{"params": [b]}, {"params": [a]}], lr=0.1)
    diffopt = higher.get_diff_optim(opt, [a, b], track_higher_grads=track)
    assert [group["params"] for group in diffopt.param_groups] == [[None], [None]]
    new = diffopt.step((a**2).sum() + (b**2).sum(), params=[a, b])
    assert diffopt.param_groups[0]["params"][0] is new[1]
    assert diffopt.param_groups[1]["params"][0] is new[0]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_the_state_of_a_warm_optimizer_goes_back_into_torch(kind: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    opt = kind([w], lr=0.1)
    (w**2).sum().backward()
    opt.step()
    diffopt = higher.get_diff_optim(opt, [w], track_higher_grads=False)
    stepped(diffopt, w)
    assert isinstance(diffopt.state[0][0]["step"], Tensor)
    opt.state[w] = diffopt.state[0][0]
    opt.step()
    assert opt.state[w]["step"] == 3


def test_the_history_is_shortened_and_cleared() -> None:
    fmodel = higher.monkeypatch(nn.Linear(1, 1))
    first, second, third = ([torch.full((1, 1), float(k)), torch.zeros(1)] for k in range(3))
    for weights in (first, second, third):
        fmodel.update_params(weights)
    fmodel._fast_params = fmodel._fast_params[-2:]
    assert [next(fmodel.parameters(time=time)).item() for time in (0, 1)] == [1, 2]
    fmodel._fast_params = []
    assert fmodel.fast_params is None
    with pytest.raises(ValueError, match="no weights"):
        fmodel(torch.ones(1))
    fmodel.fast_params = second
    assert len(fmodel._fast_params) == 1
    assert fmodel(torch.ones(1)).item() == 1
    del fmodel._fast_params
    assert fmodel.fast_params is None


def test_a_step_of_ones_own() -> None:
    """Programs replace `step` by one that uses these private members."""

    class Own(higher.optim.DifferentiableSGD):
        def step(self, loss: Tensor, params: Any = None, **kwargs: Any) -> Any:
            gradients = torch.autograd.grad(loss, params, create_graph=self._track_higher_grads)
            for group, places in zip(self.param_groups, self._group_to_param_list, strict=True):
                group["params"] = [params[place] for place in places]
            self._update([[gradients[place] for place in places] for places in self._group_to_param_list])
            return [group["params"][0] for group in self.param_groups]

    w = torch.ones(1, requires_grad=True)
    (new,) = Own(torch.optim.SGD([w], lr=0.1), [w]).step((w**2).sum(), params=[w])
    assert new.item() == pytest.approx(0.8)
    assert new.requires_grad


def test_private_names_are_there() -> None:
    from statelessify.compat.higher.optim import _GradCallbackType, _GroupedGradsType, _opt_mapping, _OverrideType
    from statelessify.compat.higher.patch import _MonkeyPatchBase, _torch, _typing, _utils

    assert _opt_mapping[torch.optim.SGD] is higher.optim.DifferentiableSGD
    assert isinstance(higher.monkeypatch(nn.Linear(1, 1)), _MonkeyPatchBase)
    assert _torch is torch
    assert _utils is higher.utils
    assert all(kind is not None for kind in (_GradCallbackType, _GroupedGradsType, _OverrideType, _typing.Any))


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name == "higher" or name.startswith("higher.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "higher", statelessify.compat.higher)
    yield
    for name in [name for name in sys.modules if name.startswith("higher.")]:
        del sys.modules[name]


def test_modules_under_the_alias_stay_themselves(alias: None) -> None:
    assert importlib.import_module("higher.patch") is higher.patch
    assert higher.patch.__spec__ is not None
    assert higher.patch.__spec__.name == "statelessify.compat.higher.patch"
    assert importlib.util.find_spec("higher.nothing") is None
