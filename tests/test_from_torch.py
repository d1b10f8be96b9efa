"""`from_torch` of a live optimizer, and `to_torch_` back: as if there had been torch steps only, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from live import (
    CLASSES,
    assert_same,
    default_dtype,
    detour,
    gradients_for,
    module_for,
    pure_steps,
    round_trip,
    state_of,
    step,
    untouched,
    without,
)
from problems import assert_close
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from statelessify import optim

pytest.importorskip("expecttest", reason="torch's optimizer database needs it")
from torch.testing._internal.common_optimizers import optim_db

DENSE = [info for info in optim_db if info.optim_cls in CLASSES]
EACH_CLASS = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
MORE: dict[str, list[dict[str, Any]]] = {  # what the database does not have
    "SGD": [{"momentum": 0.9, "dampening": -0.5, "maximize": True}],
    "Adam": [{"lr": torch.tensor(0.01)}, {"betas": (0.0, 0.5)}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "AdamW": [{"lr": torch.tensor([0.01]), "amsgrad": True}],
    "Adagrad": [{"lr_decay": 0.3, "initial_accumulator_value": 0.2, "maximize": True}],
    "ASGD": [{"t0": 2, "lambd": 0.1, "alpha": 0.5}, {"t0": 0, "weight_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9}, {"centered": True}],
    "Adafactor": [{"eps": (0.1, 0.2), "lr": 0.5}],
    "Muon": [{"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
}


def database() -> list[Any]:
    return [
        pytest.param(info.optim_cls, kwargs, id=f"{info.optim_cls.__name__}-{index}")
        for info in DENSE
        for index, kwargs in enumerate(
            [
                *[config.kwargs for config in info.optim_inputs_func(device="cpu")],
                *MORE.get(info.optim_cls.__name__, []),
            ]
        )
    ]


def test_every_dense_optimizer_is_in_the_table() -> None:
    assert {info.optim_cls for info in DENSE} == set(CLASSES)
    assert len(database()) == 82 + sum(map(len, MORE.values()))


@pytest.mark.parametrize(("cls", "config"), database())
def test_there_and_back(cls: Any, config: dict[str, Any]) -> None:
    for warm, dtype in ((0, torch.float64), (3, torch.float32), (3, torch.float64)):
        with default_dtype(dtype):
            own = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in config.items()}
            module = module_for(cls)
            make = lambda module, own=own: cls(module.parameters(), **copy.deepcopy(own))
            round_trip(make, module, gradients_for(module, 6 + warm), before=warm)


OTHERS = {torch.complex64: 1e-5, torch.complex128: 1e-8, torch.bfloat16: 0.02}  # torch's step counts are float32 here


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("info", DENSE, ids=lambda info: info.optim_cls.__name__)
def test_there_and_back_in_other_dtypes(info: Any, dtype: torch.dtype) -> None:
    if dtype.is_complex and not info.supports_complex:
        pytest.skip("torch has no complex form of it")
    if dtype == torch.bfloat16 and info.optim_cls is torch.optim.Muon:
        pytest.skip("torch normalizes its own buffer in place")
    for warm, options in ((0, {}), (3, {}), (3, GROUPS[info.optim_cls][0])):
        module = nn.ParameterList([p.detach().to(dtype) for p in module_for(info.optim_cls) if p.numel()])
        make = lambda own, options=options: info.optim_cls(own.parameters(), **{**options, "lr": 0.01})
        round_trip(make, module, gradients_for(module, 6 + warm), before=warm, tolerance=OTHERS[dtype])


@EACH_CLASS
def test_a_detour_of_no_steps_changes_no_number(cls: Any) -> None:
    module = module_for(cls)
    for steps in (0, 2):
        live = cls(module.parameters())
        step(live, module, gradients_for(module, steps))
        before = copy.deepcopy((state_of(live), module.state_dict()))
        detour(live, module, [])
        assert_same((state_of(live), module.state_dict()), before)


@pytest.mark.parametrize("warm", [0, 2])
def test_no_state_is_made_where_torch_has_none(warm: int) -> None:
    module = module_for(torch.optim.SGD)
    live = torch.optim.SGD(module.parameters())
    step(live, module, gradients_for(module, warm))
    known = list(live.state)
    assert list(detour(live, module, gradients_for(module, 2)).state) == known == []


# Layouts -----------------------------------------------------------------------------------------------------------


def layouts() -> list[Any]:
    return [
        pytest.param(info.optim_cls, config.kwargs, form, id=f"{info.optim_cls.__name__}-{form}-{index}")
        for info in DENSE
        for form in ("foreach", "fused")
        if form in info.supported_impls
        for index, config in enumerate(info.optim_inputs_func(device="cpu"))
        if not any(isinstance(value, Tensor) for value in config.kwargs.values())
    ]


@pytest.mark.parametrize(("cls", "config", "form"), layouts())
def test_the_layout_of_another_implementation(cls: Any, config: Any, form: str) -> None:
    for dtype, tolerance in {torch.float32: 1e-6, torch.float64: 1e-12}.items():  # other kernels, in another order
        with default_dtype(dtype):
            module = nn.ParameterList([p for p in module_for(cls) if p.numel()])
            make = lambda own: cls(own.parameters(), **config, **{form: True})
            round_trip(make, module, gradients_for(module, 9), tolerance=tolerance)


@pytest.mark.parametrize(
    "cls", [info.optim_cls for info in DENSE if info.has_capturable_arg], ids=lambda cls: cls.__name__
)
def test_the_capturable_layout(cls: Any) -> None:
    """No step of torch runs in it on a CPU, but checkpoints come with it."""
    module = module_for(cls)
    gradients = gradients_for(module, 6)
    usual = cls(module.parameters())
    step(usual, module, gradients[:3])
    other = copy.deepcopy(module)
    capturable = cls(other.parameters())
    saved = copy.deepcopy(usual.state_dict())
    for group in saved["param_groups"]:
        group["capturable"] = True
    capturable.load_state_dict(saved)
    layout = copy.deepcopy(capturable.state_dict())
    assert_same(
        detour(capturable, other, gradients[3:]).state_dict()["state"],
        detour(usual, module, gradients[3:]).state_dict()["state"],
    )
    assert_same(other.state_dict(), module.state_dict())
    assert_same(capturable.state_dict()["param_groups"], layout["param_groups"])


@EACH_CLASS
@pytest.mark.parametrize("kind", [int, float])
def test_step_counts_as_python_numbers(cls: Any, kind: type) -> None:
    """Checkpoints of old versions have them; torch mends them when they are loaded."""

    def as_numbers(live: Any, module: nn.Module) -> None:
        for own in live.state.values():
            own.update({slot: kind(own[slot].item()) for slot in ("step",) if slot in own})

    module = module_for(cls)
    gradients = gradients_for(module, 9)
    other = copy.deepcopy(module)
    live, reference = cls(module.parameters()), cls(other.parameters())
    step(live, module, gradients[:3])
    as_numbers(live, module)
    detour(live, module, gradients[3:6])
    assert all(type(own["step"]) is kind for own in live.state.values() if "step" in own)
    live.load_state_dict(live.state_dict())
    step(live, module, gradients[6:])
    step(reference, other, gradients)
    assert_same(state_of(live), state_of(reference))
    assert_same(module.state_dict(), other.state_dict())


# Groups ------------------------------------------------------------------------------------------------------------

ADAMS: list[dict[str, Any]] = [
    {"lr": 0.1, "betas": (0.5, 0.6)},
    {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True},
    {"lr": 0.001, "eps": 0.1},
]
GROUPS: dict[type, list[dict[str, Any]]] = {
    **dict.fromkeys((torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam), ADAMS),
    **{cls: [*ADAMS, {"amsgrad": True}, {"amsgrad": True, "lr": 0.1}] for cls in (torch.optim.Adam, torch.optim.AdamW)},
    torch.optim.Adadelta: [{"rho": 0.5}, {"lr": 0.1, "maximize": True}, {"weight_decay": 0.2}],
    torch.optim.Adafactor: [{"beta2_decay": -0.5}, {"lr": 0.1, "maximize": True}, {"weight_decay": 0.2, "d": 2.0}],
    torch.optim.Adagrad: [{"lr_decay": 0.5}, {"lr": 0.1, "maximize": True}, {"initial_accumulator_value": 0.3}],
    torch.optim.ASGD: [{"t0": 1}, {"lr": 0.1, "lambd": 0.3, "maximize": True}, {"alpha": 0.1}],
    torch.optim.Muon: [{"momentum": 0.5, "nesterov": False}, {"lr": 0.1}, {"weight_decay": 0.2, "momentum": 0.0}],
    torch.optim.RMSprop: [{"momentum": 0.9}, {"centered": True, "maximize": True}, {"alpha": 0.5, "momentum": 0.0}],
    torch.optim.Rprop: [{"etas": (0.3, 1.5)}, {"lr": 0.1, "maximize": True}, {"step_sizes": (0.01, 0.02)}],
    torch.optim.SGD: [
        {"momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.0, "maximize": True},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1},
    ],
}


def grouped(cls: type, **options: Any) -> Any:
    """An optimizer with the leaves dealt to its groups, the last first."""
    deal = GROUPS[cls]

    def make(module: nn.Module) -> Any:
        leaves = list(module.parameters())[::-1]
        return cls([{"params": leaves[index :: len(deal)], **own} for index, own in enumerate(deal)], **options)

    return make


@EACH_CLASS
@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("state", [False, True], ids=["parameters", "state"])
def test_groups_with_numbers_and_switches_of_their_own(cls: Any, warm: int, state: bool) -> None:
    module = module_for(cls)
    round_trip(grouped(cls), module, gradients_for(module, warm + 6), before=warm, state=state)


@EACH_CLASS
def test_a_group_that_is_added_later(cls: Any) -> None:
    module = module_for(cls)
    later = 2
    make = lambda own: cls(list(own.parameters())[later:], lr=0.1)
    add = lambda live, own: live.add_param_group({"params": list(own.parameters())[:later], **GROUPS[cls][1]})
    round_trip(make, module, gradients_for(module, 9), change=add, state=False)


@EACH_CLASS
def test_step_counts_that_differ(cls: Any) -> None:
    """Some parameters had no gradient in the beginning, one in none of the torch steps."""
    module = module_for(cls)
    gradients = gradients_for(module, 9)
    gradients[0] = without(gradients[:1], "0", "2", "5")[0]
    gradients[1] = without(gradients[1:2], "2", "3")[0]
    gradients[:3] = without(gradients[:3], "1")
    gradients[7:8] = without(gradients[7:8], "1", "4")
    round_trip(lambda own: cls(own.parameters(), lr=0.1), module, gradients)


@EACH_CLASS
def test_no_gradient_counts_as_zero(cls: Any) -> None:
    module = module_for(cls)
    gradients = gradients_for(module, 6)
    other, live = copy.deepcopy(module), cls(module.parameters(), **GROUPS[cls][0])
    step(live, module, without(gradients[:3], "1"))
    reference = cls(other.parameters(), **GROUPS[cls][0])
    step(reference, other, without(gradients[:3], "1"))
    detour(live, module, without(gradients[3:], "1", "2"))
    zero = [{name: torch.zeros_like(g) if name in "12" else g for name, g in each.items()} for each in gradients[3:]]
    step(reference, other, zero)
    assert_same(state_of(live), state_of(reference))
    assert_same(module.state_dict(), other.state_dict())


@EACH_CLASS
def test_a_rate_that_a_scheduler_has_changed(cls: Any) -> None:
    module = module_for(cls)
    gradients = gradients_for(module, 9)
    other = copy.deepcopy(module)
    pairs = [(own, cls(own.parameters(), lr=0.1)) for own in (module, other)]
    schedulers = [StepLR(live, 1, gamma=0.5) for _, live in pairs]
    for (own, live), scheduler in zip(pairs, schedulers, strict=True):
        for each in gradients[:3]:
            step(live, own, [each])
            scheduler.step()
    (_, live), (_, reference) = pairs
    detour(live, module, gradients[3:6])
    step(reference, other, gradients[3:6])
    for (own, live), scheduler in zip(pairs, schedulers, strict=True):
        for each in gradients[6:]:
            step(live, own, [each])
            scheduler.step()
    assert_same(state_of(live), state_of(reference))
    assert_same(module.state_dict(), other.state_dict())
    assert reference.param_groups[0]["lr"] == 0.1 / 64


# What is not written -----------------------------------------------------------------------------------------------


@EACH_CLASS
@pytest.mark.parametrize("warm", [0, 2])
def test_nothing_live_is_touched(cls: Any, warm: int) -> None:
    module = module_for(cls)
    live = grouped(cls)(module)
    gradients = gradients_for(module, warm + 2)
    step(live, module, gradients[:warm])
    for name, p in module.named_parameters():
        p.grad = gradients[-1][name]
    with untouched(live, module):
        pure_steps(optim.from_torch(live, module=module), module, gradients[warm:])


@EACH_CLASS
def test_a_pure_optimizer_does_not_follow_its_live_one(cls: Any) -> None:
    module = module_for(cls)
    live = cls(module.parameters(), lr=torch.tensor(0.1) if cls in (torch.optim.SGD, torch.optim.Adam) else 0.1)
    gradients = gradients_for(module, 6)
    step(live, module, gradients[:3])
    start = copy.deepcopy(module)
    pure = optim.from_torch(live, module=module)
    expected = pure_steps(pure, start, gradients[3:])
    step(live, module, gradients[3:])
    for group in live.param_groups:
        group["lr"] = group["lr"].fill_(0.5) if isinstance(group["lr"], Tensor) else 0.5
    assert_close(pure_steps(pure, start, gradients[3:]), expected, 0.0)
