"""Meta-gradients that begin where a live optimizer stands: finite differences, by hand, many tasks, an outer loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from live import assert_same, gradients_for, step, untouched
from problems import assert_close, fresh, gradients, one_by_one
from torch import Tensor, nn

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, load_, optim, stateless, tree_unstack

pytestmark = pytest.mark.usefixtures("float64")
WARM: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"betas": (0.7, 0.8), "eps": 0.1}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "asgd": (torch.optim.ASGD, {"t0": 1, "lambd": 0.3}),
    "nadam": (torch.optim.NAdam, {"eps": 0.1}),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}),
    "muon": (torch.optim.Muon, {"momentum": 0.5}),
}
EACH_WARM = pytest.mark.parametrize(("cls", "options"), WARM.values(), ids=WARM)


def loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    return torch.tanh(params["0.weight"] @ torch.sin(params["1.weight"]) @ batch).pow(2).sum()


def warm_problem(cls: Any, options: Any) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(2, 2, bias=False))
    live = cls(list(module.parameters())[::-1], lr=0.1, **options)
    gradients = gradients_for(module, 3)
    gradients[0]["1.weight"] = None  # step counts differ
    step(live, module, gradients)
    return module, live, fresh(dict(module.named_parameters()))


def precise(cls: Any) -> dict[str, Any]:
    """In place of bfloat16, in which torch's Muon computes."""
    return {"dtype": torch.float64} if cls is torch.optim.Muon else {}


@EACH_WARM
def test_a_warm_meta_gradient_is_that_of_finite_differences(cls: Any, options: Any) -> None:
    module, live, params = warm_problem(cls, options)
    batch, rate = torch.randn(2, 4, requires_grad=True), torch.tensor(0.05, requires_grad=True)

    def meta(first: Tensor, second: Tensor, batch: Tensor, rate: Tensor) -> Tensor:
        inner = optim.from_torch(live, module=module, lr=rate, **precise(cls))
        given = {"0.weight": first, "1.weight": second}
        return loss(adapt(loss, given, batch, optimizer=inner, steps=3).params, batch)

    with untouched(live, module):
        assert torch.autograd.gradcheck(meta, (*params.values(), batch, rate))


def test_a_warm_meta_gradient_is_that_of_going_on_by_hand() -> None:
    module, live, params = warm_problem(*WARM["adam"])
    batch, rate = torch.randn(2, 4), torch.tensor(0.05, requires_grad=True)
    found = adapt(loss, params, batch, optimizer=optim.from_torch(live, module=module, lr=rate), steps=2).params
    by_hand = dict(params)
    m, v, t = (
        {name: live.state[module.get_parameter(name)][slot].clone() for name in params}
        for slot in ("exp_avg", "exp_avg_sq", "step")
    )
    for _ in range(2):
        grads = gradients(loss(by_hand, batch), by_hand, create_graph=True)
        for name, g in grads.items():
            m[name], v[name], t[name] = 0.7 * m[name] + 0.3 * g, 0.8 * v[name] + 0.2 * g * g, t[name] + 1
            hat = m[name] / (1 - 0.7 ** t[name]), v[name] / (1 - 0.8 ** t[name])
            by_hand[name] = by_hand[name] - rate * hat[0] / (hat[1].sqrt() + 0.1)
    assert_close(found, by_hand, 1e-12)
    inputs = {**params, "rate": rate}
    assert_close(gradients(loss(found, batch), inputs), gradients(loss(by_hand, batch), inputs), 1e-11)


@EACH_WARM
@pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
def test_a_warm_start_for_many_tasks(cls: Any, options: Any, gradient: Any) -> None:
    module, live, params = warm_problem(cls, options)
    rate = torch.tensor(0.05, requires_grad=True)
    inner = optim.from_torch(live, module=module, lr=rate, **precise(cls))
    batches = torch.randn(3, 2, 4)
    how: Any = {"optimizer": inner, "steps": 2, "gradient": gradient}
    expected = one_by_one(loss, params, batches, **how)
    meta = gradients(expected.params["0.weight"].sin().sum(), {**params, "rate": rate})
    for choices in ({"backend": "vmap"}, {"backend": "loop"}, {"chunk_size": 2}):
        found = adapt_tasks(loss, params, batches, **how, **choices)
        assert_close(found, expected)
        assert_close(gradients(found.params["0.weight"].sin().sum(), {**params, "rate": rate}), meta, 1e-9)
    last = tree_unstack(expected.opt_state)[2]
    optim.to_torch_(live, last, module=module)
    again = optim.from_torch(live, module=module).init(params)
    assert again.slots.keys() == last.slots.keys()
    for slot, column in again.slots.items():
        assert_close(dict(sorted(column.items())), dict(sorted(last.slots[slot].items())), 1e-12)


def test_an_outer_loop_goes_on_with_the_live_optimizer() -> None:
    """Adapt from where the training of the module stands, and keep what was found."""
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(2, 2, bias=False))
    live, batch = torch.optim.Adam(module.parameters(), lr=0.1), torch.randn(2, 4)
    other = copy.deepcopy(module)
    reference = torch.optim.Adam(other.parameters(), lr=0.1)
    for _ in range(3):
        adapted = adapt(loss, stateless(module).params, batch, optimizer=optim.from_torch(live, module=module), steps=2)
        load_(module, adapted.params)
        optim.to_torch_(live, adapted.opt_state, module=module)
    for _ in range(6):
        reference.zero_grad()
        loss(dict(other.named_parameters()), batch).backward()
        reference.step()
    assert_same((module.state_dict(), live.state_dict()), (other.state_dict(), reference.state_dict()))
