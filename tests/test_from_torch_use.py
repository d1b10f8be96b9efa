"""`from_torch` and `to_torch_`: names, what is refused, learned hyperparameters there and back, warm meta-gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from live import CLASSES, assert_same, detour, gradients_for, module_for, pure_steps, round_trip, step
from problems import assert_close
from torch import Tensor, nn

from statelessify import adapt_tasks, optim, stateless
from statelessify.errors import (
    HyperparameterError,
    HyperparameterNameError,
    NamesError,
    OptimizerError,
    ShapeError,
    StatelessifyError,
    TreeError,
)

pytestmark = pytest.mark.usefixtures("float64")
EACH_CLASS = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


class Deep(nn.Module):
    """Tied and frozen parameters, more than ten of a list, and names that are prefixes of others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
        self.body[1][1].weight = self.body[0].weight
        self.many = nn.ParameterList([torch.randn(2, 2) for _ in range(12)])
        self.bod = nn.Linear(2, 2)
        self.bod.weight.requires_grad_(False)


def warmed(cls: Any, module: nn.Module, steps: int = 3, **options: Any) -> Any:
    live = cls([p for p in module.parameters() if p.ndim == 2], lr=0.1, **options)
    step(live, module, gradients_for(module, steps))
    return live


# Names -------------------------------------------------------------------------------------------------------------


def orders(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    leaves = list(module.parameters())
    return {
        "reversed": leaves[::-1],
        "dealt": leaves[1::2] + leaves[::2],
        "a part": leaves[3:5],
        "one": leaves[-1:],
        "trainable": [p for p in leaves if p.requires_grad],
    }


@pytest.mark.parametrize("order", orders(Deep()))
def test_names_are_found_by_identity(order: str) -> None:
    module = Deep()
    held = orders(module)[order]
    live = torch.optim.Adam(held, lr=0.1)
    step(live, module, gradients_for(module, 2))
    params = stateless(module).params
    state = optim.from_torch(live, module=module).init(params)
    names = {name for name, p in module.named_parameters() if p.requires_grad and any(p is each for each in held)}
    assert set(state.slots["exp_avg"]) == names
    for name in names:
        assert torch.equal(state.slots["exp_avg"][name], live.state[module.get_parameter(name)]["exp_avg"])
    new, _ = optim.from_torch(live, module=module).step(params, params, state)
    assert {name for name in params if new[name] is params[name]} == params.keys() - names
    round_trip(lambda own: torch.optim.Adam(orders(own)[order], lr=0.1), module, gradients_for(module, 9))


def test_names_of_its_own() -> None:
    module = Deep()
    pairs = list(module.named_parameters())[::-1]
    named, plain = torch.optim.Adam(pairs[3:]), torch.optim.Adam([p for _, p in pairs[3:]])
    named.add_param_group({"params": pairs[:3], "lr": 0.1})
    plain.add_param_group({"params": [p for _, p in pairs[:3]], "lr": 0.1})
    gradients = gradients_for(module, 2)
    found = pure_steps(optim.from_torch(named), module, gradients)
    assert_close(found, pure_steps(optim.from_torch(plain, module=module), module, gradients), 0.0)
    optim.to_torch_(named, found[1])
    optim.to_torch_(plain, found[1], module=module)
    assert_same(named.state_dict()["state"], plain.state_dict()["state"])


def test_a_nested_tree_has_dotted_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    live = warmed(torch.optim.Adam, module)
    flat = stateless(module).params
    nested = {str(i): {"weight": layer.weight, "bias": layer.bias} for i, layer in enumerate(module)}
    pure = optim.from_torch(live, module=module)
    new, state = pure.step(nested, nested, pure.init(nested))
    expected, _ = pure.step(flat, flat, pure.init(flat))
    for name, value in expected.items():
        layer, _, leaf = name.partition(".")
        assert torch.equal(new[layer][leaf], value)
    optim.to_torch_(live, state, module=module)
    assert live.state[module[0].weight]["step"] == 4


def test_what_has_no_name_is_refused() -> None:
    module, other = Deep(), Deep()
    live = torch.optim.Adam(module.parameters())
    with pytest.raises(NamesError, match=r"Adam have no names.*`module=`"):
        optim.from_torch(live)
    for wrong in (other, nn.Linear(2, 2), copy.deepcopy(module)):
        with pytest.raises(NamesError, match=r"parameter 0 of group 0, of shape .* is not one of the module's"):
            optim.from_torch(live, module=wrong)
        with pytest.raises(NamesError, match="parameter 0 of group 0"):
            optim.to_torch_(live, optim.adam().init(stateless(module).params), module=wrong)
    stranger = torch.optim.Adam([*module.parameters(), nn.Parameter(torch.ones(7))])
    with pytest.raises(NamesError, match=r"parameter 18 of group 0, of shape \(7,\)"):
        optim.from_torch(stranger, module=module)


@EACH_CLASS
def test_other_parameters_are_refused(cls: Any) -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}  # or it remembers nothing of them
    pure, params = optim.from_torch(warmed(cls, module, **options), module=module), stateless(module).params
    with pytest.raises(NamesError, match=r"holds `1.weight`, which `params` does not have"):
        pure.init({"0.weight": params["0.weight"]})
    with pytest.raises(ShapeError, match=r"`1.weight` has shape \(3, 2\), but .*\(2, 3\)"):
        pure.init({**params, "1.weight": params["1.weight"].T})
    state = pure.init(params)
    for wrong in ({**params, "1.weight": params["1.weight"].T}, {"0.weight": params["0.weight"]}):
        with pytest.raises(StatelessifyError, match=r"1\.weight"):
            pure.step(params, wrong, state)
        with pytest.raises(StatelessifyError, match=r"1\.weight|slot"):
            pure.step(wrong, wrong, state)


# What else is refused ----------------------------------------------------------------------------------------------


@EACH_CLASS
def test_step_hooks_are_refused(cls: Any) -> None:
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        live = cls(module_for(cls).named_parameters())
        handle = getattr(live, register)(lambda *args: None)
        with pytest.raises(OptimizerError, match=f"{cls.__name__} has step hooks.*grad_transform"):
            optim.from_torch(live)
        handle.remove()
        optim.from_torch(live)


@pytest.mark.parametrize("given", [None, 3, nn.Linear, nn.Linear(1, 1), optim.sgd, optim.adam()], ids=range(6))
def test_what_is_no_optimizer_of_torch(given: Any) -> None:
    with pytest.raises(OptimizerError, match="takes an optimizer of torch or a class"):
        optim.from_torch(given)


@EACH_CLASS
def test_options_are_checked(cls: Any) -> None:
    live = cls(module_for(cls).named_parameters())
    for given in (cls, live):
        with pytest.raises(HyperparameterNameError, match="has no `lrr`"):
            optim.from_torch(given, lrr=0.1)
        with pytest.raises(HyperparameterError, match="`lr=-1` is out of range"):
            optim.from_torch(given, lr=-1)
        for name in ("foreach", "fused", "capturable", "differentiable"):
            optim.from_torch(given, **{name: True})


def states(module: nn.Module) -> dict[str, tuple[Any, Any, str]]:
    """States that an Adam of the module with two groups cannot have."""
    params = stateless(module).params
    adam = optim.adam().init(params)
    _, moved = optim.adam().step(params, params, adam)

    def slot(change: Any) -> Any:
        changed = {name: {**tree, "1.weight": change(tree["1.weight"])} for name, tree in moved.slots.items()}
        return moved._replace(slots=changed)

    shared = {name: torch.stack([value] * 3) for name, value in params.items()}
    tasks = adapt_tasks(total, shared, torch.ones(3), optimizer=optim.adam(), steps=1, in_dims=0).opt_state
    rates = {"0.*": 0.1, "1.weight": 0.2, "1.bias": 0.3}
    return {
        "another class": (TreeError, optim.sgd(momentum=0.9).init(params), "one of `sgd`, which Adam cannot"),
        "a subclass": (TreeError, optim.adamw().init(params), "one of `adamw`"),
        "no state": (TreeError, {"step": 1}, "dict, not an `OptState`"),
        "many tasks": (ShapeError, tasks, "that of 3 tasks.*tree_unstack"),
        "a part": (NamesError, optim.adam().init({"0.weight": params["0.weight"]}), r"slot `exp_avg` .*`0.bias`"),
        "transposed": (ShapeError, slot(lambda m: m.T), r"slot `exp_avg` has shape \(2, 3\)"),
        "a row": (ShapeError, slot(lambda m: m[:1]), r"slot `exp_avg` has shape \(1, 2\)"),
        "one number": (ShapeError, slot(lambda m: m.sum()), r"slot `exp_avg` has shape \(\)"),
        "per entry": (
            HyperparameterError,
            optim.adam(lr={"1.weight": torch.rand(3, 2), "*s": 0.1, "0.weight": 0.1}).init(params),
            r"`lr` is a tensor of shape \(3, 2\)|`lr` differs",
        ),
        "one value each": (HyperparameterError, optim.adam(lr=rates).init(params), "`lr` differs between .*`1.bias`"),
        "no amsgrad": (TreeError, moved, "max_exp_avg_sq"),
    }


def total(params: Any, scale: Tensor) -> Tensor:
    return scale * torch.stack([(p**2).sum() for p in params.values()]).sum()


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("kind", states(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))))
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(kind: str, warm: int) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    groups = [{"params": module[0].parameters()}, {"params": module[1].parameters(), "lr": 0.5}]
    live = torch.optim.Adam(groups, amsgrad=kind == "no amsgrad")
    step(live, module, gradients_for(module, warm))
    error, state, words = states(module)[kind]
    before = copy.deepcopy((live.state_dict(), module.state_dict()))
    with pytest.raises(error, match=words):
        optim.to_torch_(live, state, module=module)
    assert_same((live.state_dict(), module.state_dict()), before)


# Hyperparameters ---------------------------------------------------------------------------------------------------


@EACH_CLASS
def test_hyperparameters_are_those_of_the_live_optimizer(cls: Any) -> None:
    live = cls(module_for(cls).named_parameters(), lr=0.05)
    params = dict(module_for(cls).named_parameters())
    found = optim.from_torch(live).init(params).hyperparameters
    assert found.keys() <= live.param_groups[0].keys()
    assert found == {name: live.param_groups[0][name] for name in found}
    assert optim.from_torch(cls, lr=0.05).init(params).hyperparameters == found
    assert optim.from_torch(live, lr=0.2).init(params).hyperparameters == {**found, "lr": 0.2}


def test_learned_hyperparameters_are_written_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(module, (0.1, 0.2), strict=True)]
    live = torch.optim.Adam(groups)
    rates = torch.rand(2, requires_grad=True)
    beta = torch.tensor(0.5, requires_grad=True)
    learned: dict[str, Any] = {
        "lr": {"0.*": rates[0], "1.*": rates[1]},
        "betas": (beta, lambda step: 0.9 + 0.01 * step),
        "weight_decay": {"0.*": lambda step: rates[0] * step, "1.*": 0.3},
        "eps": torch.tensor(0.25, dtype=torch.float32),
    }
    detour(live, module, gradients_for(module, 3), **learned)
    for index, group in enumerate(live.param_groups):
        assert group["lr"] == rates[index].item()
        assert group["betas"] == (0.5, 0.9 + 0.03)
        assert group["weight_decay"] == (3 * rates[0].item(), 0.3)[index]
        assert group["eps"] == 0.25
        assert not any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"], group["weight_decay"]))
    step(live, module, gradients_for(module, 1))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_stays_a_tensor(shape: tuple[int, ...]) -> None:
    module = nn.Linear(2, 2)
    for cls in (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
        live = cls(module.parameters(), lr=torch.full(shape, 0.5, dtype=torch.float32))
        learned = torch.tensor(0.125, requires_grad=True)
        for lr in (
            learned,
            0.125,
            {"*": learned},
            lambda step, learned=learned: learned,
            optim.schedule(decay, lr=0.125),
        ):
            detour(live, module, gradients_for(module, 2), lr=lr)
            rate = live.param_groups[0]["lr"]
            assert isinstance(rate, Tensor)
            assert (rate.shape, rate.dtype, rate.requires_grad) == (shape, torch.float32, False)
            assert rate == 0.125
            step(live, module, gradients_for(module, 1))


def decay(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
