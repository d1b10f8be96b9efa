"""Every rule follows torch.optim: each configuration of torch's own optimizer database, and generated ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_naive import SPECS, Values, configs, plain
from problems import assert_close
from torch import Tensor

from statelessify import optim

pytest.importorskip("expecttest", reason="torch's optimizer database needs it")
from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.usefixtures("float64")
FEW = settings(max_examples=max(settings().max_examples // 8, 5))
STEPS = 10
DENSE = [info for info in optim_db if info.optim_cls.__name__ not in ("LBFGS", "SparseAdam")]
THEIRS = {info.optim_cls.__name__.lower(): info.optim_cls for info in DENSE}
DTYPES = {"real": torch.float64, "complex": torch.complex128}
Shapes = list[tuple[int, ...]]
# Four leaves of one shape are stacked, others are not.
SHAPES: Shapes = [(), (2, 3), (), (2, 3), (5,), (), (2, 3), (4, 1, 3), (), (2, 3)]
MATRICES: Shapes = [(2, 3), (2, 3), (5, 2), (2, 3), (2, 3), (1, 1)]
LARGE: Shapes = [(2, 3)] * 4 + [(129, 128)] * 4 + [(5,)]  # more than 2^14 entries: nor are these


def kwargs(info: Any) -> list[Values]:
    return [config.kwargs for config in info.optim_inputs_func(device="cpu")]


def configurations(forms: Callable[[Any], Any]) -> list[Any]:
    """All of the database, once for each form that torch has of an optimizer."""
    return [
        pytest.param(info, index, form, id=f"{name}-{form}-{index}")
        for name, info in zip(THEIRS, DENSE, strict=True)
        for form in forms(info)
        for index in range(len(kwargs(info)))
    ]


def tensors(shapes: Shapes, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {f"p{index}": torch.randn(shape, dtype=dtype) for index, shape in enumerate(shapes)}


def run(optimizer: optim.Optimizer, params: Any, gradients: Any) -> tuple[Any, Any]:
    state = optimizer.init(params)
    for grads in gradients:
        params, state = optimizer.step(params, grads, state)
    return params, state


def run_theirs(make: Callable[[list[Tensor]], Any], params: Any, gradients: Any) -> tuple[list[Tensor], Any]:
    """The parameters, which are those of the optimizer, and its state."""
    leaves = [value.clone() for value in params.values()]
    optimizer = make(leaves)
    for grads in gradients:
        for leaf, grad in zip(leaves, grads.values(), strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
    return leaves, optimizer.state


def flat(leaves: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves])


def against(ours: Any, theirs: Any, shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float64) -> None:
    """Parameters, and all that is in the state, after ten steps."""
    params, gradients = tensors(shapes, dtype), [tensors(shapes, dtype) for _ in range(STEPS)]
    leaves, known = run_theirs(theirs, params, gradients)
    found, state = run(ours, params, gradients)
    assert [leaf.shape for leaf in found.values()] == [leaf.shape for leaf in leaves]
    assert_close(flat(found.values()), flat(leaves), 1e-12)
    for slot, tree in state.slots.items():
        expected = [known[leaf].get(slot) for leaf in leaves]
        # what torch does not even have is empty: rows and columns of a vector
        values = [value for value, wanted in zip(tree.values(), expected, strict=True) if wanted is not None]
        assert sum(value.numel() for value in tree.values()) == sum(value.numel() for value in values)
        assert_close(
            flat(values), flat([wanted for wanted in expected if wanted is not None]).to(values[0].dtype), 1e-12
        )
    tensors_of_torch = {name for leaf in leaves for name, value in known[leaf].items() if isinstance(value, Tensor)}
    assert tensors_of_torch - {"step", "mu"} == set(state.slots)  # ASGD's `mu` is known from the step
    assert {int(known[leaf].get("step", STEPS)) for leaf in leaves} == {int(state.step)} == {STEPS}


def shapes_of(rule: str) -> Shapes:
    return MATRICES if rule == "muon" else SHAPES


def test_the_database_has_as_many_configurations_as_are_tested() -> None:
    counts = {info.optim_cls.__name__: len(kwargs(info)) for info in optim_db}
    assert sum(counts.values()) == 91
    assert len(configurations(lambda info: ["real"])) == 91 - counts["LBFGS"] - counts["SparseAdam"] == 82
    assert set(THEIRS) == set(SPECS) - {"lion"}


@pytest.mark.parametrize(
    ("info", "index", "form"), configurations(lambda info: DTYPES if info.supports_complex else ["real"])
)
def test_each_configuration(info: Any, index: int, form: str) -> None:
    rule, config = info.optim_cls.__name__.lower(), kwargs(info)[index]
    ours = getattr(optim, rule)(**config)
    against(ours, lambda leaves: info.optim_cls(leaves, **config), shapes_of(rule), DTYPES[form])


@pytest.mark.parametrize(("info", "index", "form"), configurations(lambda info: info.supported_impls))
def test_each_implementation_in_torch(info: Any, index: int, form: str) -> None:
    config = kwargs(info)[index]
    numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in config.items()}
    ours = getattr(optim, info.optim_cls.__name__.lower())(**config)
    against(ours, lambda leaves: info.optim_cls(leaves, **numbers, **{form: True}))


@pytest.mark.parametrize("rule", THEIRS)
def test_large_leaves(rule: str) -> None:
    against(getattr(optim, rule)(), THEIRS[rule], LARGE[: 8 if rule == "muon" else 9])


# Torch's centered RMSprop takes the root of a negative number, by rounding, where `alpha` is zero.
ZERO = {"weight_decay", "momentum", "dampening", "lr_decay", "initial_accumulator_value", "lambd", "rho", "alpha"}


def theirs_of(rule: str, config: Values) -> Values:
    """Torch's Muon has no `maximize`, and always computes in bfloat16."""
    return {name: value for name, value in config.items() if rule != "muon" or name not in ("maximize", "dtype")}


@st.composite
def with_zeros(draw: st.DrawFn, rule: str) -> Values:
    config = draw(configs(rule))
    kept = {"momentum"} if config.get("nesterov") else {"alpha"} if config.get("centered") else set()
    config |= {name: 0.0 for name in sorted(config.keys() & ZERO - kept) if draw(st.booleans())}
    return config | ({"maximize": False, "dtype": torch.bfloat16} if rule == "muon" else {})


@pytest.mark.parametrize("rule", THEIRS)
@FEW
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_generated_hyperparameters(rule: str, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    config = data.draw(with_zeros(rule))
    theirs = theirs_of(rule, config)
    against(getattr(optim, rule)(**config), lambda leaves: THEIRS[rule](leaves, **theirs), shapes_of(rule))


@pytest.mark.parametrize("t0", [-2.5, -1, 0, 1.5, 4])
def test_the_step_from_which_asgd_averages(t0: float) -> None:
    config = plain("asgd", t0=t0)
    against(optim.asgd(**config), lambda leaves: torch.optim.ASGD(leaves, **config))


@pytest.mark.parametrize("rule", THEIRS)
def test_a_dict_by_name_is_parameter_groups(rule: str) -> None:
    first, second = (plain(rule, **given) for given in ({}, {"lr": 0.05, "weight_decay": 0.03}))
    if "weight_decay" not in SPECS[rule].numbers:
        second.pop("weight_decay")
    second["maximize"] = rule != "muon"
    dtype = {"dtype": torch.bfloat16} if rule == "muon" else {}
    both = {name: {"p[012]": first[name], "p[!012]": second[name]} for name in ("lr", "maximize")}
    if "weight_decay" in second:
        both["weight_decay"] = {"p[0-2]": first["weight_decay"], "p[!0-2]": second["weight_decay"]}

    def theirs(leaves: list[Tensor]) -> Any:
        groups = [{"params": leaves[:3]}, {"params": leaves[3:], **theirs_of(rule, second)}]
        return THEIRS[rule](groups, **theirs_of(rule, first))

    against(getattr(optim, rule)(**first | both | dtype), theirs, shapes_of(rule))


@pytest.mark.parametrize("rule", THEIRS)
def test_names_order_and_defaults_of_hyperparameters(rule: str) -> None:
    ours, theirs = (inspect.signature(each).parameters for each in (getattr(optim, rule), THEIRS[rule]))
    absent = {"params", "foreach", "capturable", "differentiable", "fused"}
    wanted = {name: each.default for name, each in theirs.items() if name not in absent}
    assert {name: ours[name].default for name in wanted} == wanted
    positional = [name for name in wanted if theirs[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


# Where torch's own derivative is right -----------------------------------------------------------------------------


DERIVATIVE_IN_TORCH = {  # with what has to be off: without it, buffers are detached, or changed in place and needed
    "sgd": {"momentum": 0.0, "nesterov": False, "dampening": 0.0},
    "adam": {"amsgrad": False},
    "adamw": {"amsgrad": False},
    "rmsprop": {"centered": False},
    **{rule: {} for rule in ("nadam", "radam", "adagrad", "adadelta", "asgd")},
}


@pytest.mark.parametrize("rule", DERIVATIVE_IN_TORCH)
@FEW
@given(data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_the_derivative_is_that_of_torchs_differentiable_optimizer(rule: str, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    config = data.draw(configs(rule)) | DERIVATIVE_IN_TORCH[rule]
    inputs = [tensors([(3,), ()]) for _ in range(7)]
    leaves = [value.requires_grad_() for each in inputs for value in each.values()]
    expected, _ = run_theirs(lambda p: THEIRS[rule](p, **config, differentiable=True), inputs[0], inputs[1:])
    found, _ = run(getattr(optim, rule)(**config), inputs[0], inputs[1:])
    weights = [torch.randn_like(value) for value in expected]

    def derivative(results: list[Tensor]) -> Any:
        value = sum((weight * result).sum() for weight, result in zip(weights, results, strict=True))
        return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)

    assert_close(list(found.values()), expected, 1e-12)
    assert_close(derivative(list(found.values())), derivative(expected), 1e-11)


# Lion, which torch lacks -------------------------------------------------------------------------------------------


@FEW
@given(config=configs("lion"), seed=st.integers(0, 2**31 - 1), dtype=st.sampled_from(list(DTYPES.values())))
def test_lion_is_that_of_pytorch_optimizer(config: Values, seed: int, dtype: torch.dtype) -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(seed)
    params, gradients = tensors(SHAPES, dtype), [tensors(SHAPES, dtype) for _ in range(STEPS)]
    leaves, known = run_theirs(lambda leaves: peer.Lion(leaves, **config), params, gradients)
    found, state = run(optim.lion(**config), params, gradients)
    assert_close(list(found.values()), leaves, 1e-12)
    assert_close(list(state.slots["exp_avg"].values()), [known[leaf]["exp_avg"] for leaf in leaves], 1e-12)


@pytest.mark.parametrize("rule", ["adam", "adamw", "nadam", "radam", "adagrad", "rmsprop"])
def test_tiny_gradients_over_a_tinier_eps(rule: str) -> None:
    config = {"eps": 1e-30} | ({"betas": (0.9, 0.9)} if rule == "radam" else {})
    exponents = torch.arange(-22.0, -8.0, dtype=torch.float32)
    params, gradients = {"p": torch.ones_like(exponents)}, [{"p": 10**exponents}] * STEPS
    expected, _ = run_theirs(lambda leaves: THEIRS[rule](leaves, **config), params, gradients)
    found, _ = run(getattr(optim, rule)(**config), params, gradients)
    assert_close(found["p"], expected[0], 1e-3)
