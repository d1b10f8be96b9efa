"""`optim.sgd`, `optim.adam`: torch.optim as oracle, every form of hyperparameter, derivatives, extremes, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from torch import Tensor

from statelessify import adapt, optim
from statelessify.errors import DtypeError, HyperparameterError, HyperparameterNameError, NamesError, TreeError

pytestmark = pytest.mark.usefixtures("float64")
RULES: dict[str, Any] = {"sgd": optim.sgd, "adam": optim.adam}
NUMBERS = {"sgd": ["lr", "momentum", "dampening", "weight_decay"], "adam": ["lr", "eps", "weight_decay", "betas"]}
EACH_NUMBER = pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule in RULES for name in NUMBERS[rule]])
SHAPES = {"body.w": (2, 3), "body.b": (3,), "head.w": ()}


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}


def run(optimizer: optim.Optimizer, params: Any, gradients: Any) -> tuple[Any, Any]:
    state = optimizer.init(params)
    for grads in gradients:
        params, state = optimizer.step(params, grads, state)
    return params, state


def make(rule: str, **given: Any) -> optim.Optimizer:
    """The rule with everything switched on; `given` replaces some of it."""
    usual: Any = {
        "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
        "adam": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1},
    }
    return RULES[rule](**(usual[rule] | given))


# torch.optim -------------------------------------------------------------------------------------------------------

POSITIVE = st.floats(1e-4, 0.3)  # larger rates make the iteration itself unstable, and rounding grows with it
FRACTION = st.one_of(st.just(0.0), st.floats(0.01, 0.99))
DECAY = st.one_of(st.just(0.0), POSITIVE)


def against_torch(ours: optim.Optimizer, theirs: Callable[[Any], Any], seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    params = tensors(dtype)
    gradients = [tensors(dtype) for _ in range(10)]
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    reference = theirs(list(leaves.values()))
    for grads in gradients:
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        reference.step()
    found, state = run(ours, params, gradients)
    assert_close(found, {name: leaf.detach() for name, leaf in leaves.items()}, 1e-12)
    assert int(state.step) == 10
    for slot, tree in state.slots.items():
        assert_close(tree, {name: reference.state[leaf][slot] for name, leaf in leaves.items()}, 1e-12)


@given(
    seed=st.integers(0, 2**31 - 1),
    lr=POSITIVE,
    momentum=FRACTION,
    dampening=st.floats(-0.5, 1.0),
    weight_decay=DECAY,
    nesterov=st.booleans(),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_sgd_is_torch_sgd(seed: int, dampening: float, dtype: torch.dtype, **config: Any) -> None:
    config["nesterov"] = config["nesterov"] and config["momentum"] > 0
    config["dampening"] = 0.0 if config["nesterov"] else dampening
    against_torch(optim.sgd(**config), lambda leaves: torch.optim.SGD(leaves, **config), seed, dtype)


@given(
    seed=st.integers(0, 2**31 - 1),
    lr=POSITIVE,
    betas=st.tuples(FRACTION, FRACTION),
    eps=st.floats(1e-8, 0.1),
    weight_decay=DECAY,
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_adam_is_torch_adam(seed: int, dtype: torch.dtype, **config: Any) -> None:
    against_torch(optim.adam(**config), lambda leaves: torch.optim.Adam(leaves, **config), seed, dtype)


@pytest.mark.parametrize("rule", RULES)
def test_precision_is_that_of_the_parameters_not_of_the_default(rule: str) -> None:
    params, gradients = tensors(), [tensors() for _ in range(4)]
    expected, _ = run(make(rule), params, gradients)
    torch.set_default_dtype(torch.float32)
    try:
        found, _ = run(make(rule), params, gradients)
    finally:
        torch.set_default_dtype(torch.float64)
    assert_close(found, expected, 1e-14)


@EACH_NUMBER
def test_the_dtype_of_a_parameter_stays(rule: str, name: str) -> None:
    value = {"*": torch.tensor(0.5)}, {"*.w": torch.tensor(0.5), "body.b": torch.rand(3)}
    for spec in value:
        given: Any = {name: (spec, spec) if name == "betas" else spec}
        found, state = run(make(rule, **given), tensors(torch.float32), [tensors(torch.float32)] * 2)
        leaves = torch.utils._pytree.tree_leaves((found, state.slots))
        assert {leaf.dtype for leaf in leaves} == {torch.float32}


# Hyperparameters ---------------------------------------------------------------------------------------------------


def forms(value: float) -> dict[str, Any]:
    """One value, written in every way."""
    tensor = torch.tensor(value)
    return {
        "tensor": tensor,
        "names": dict.fromkeys(SHAPES, value),
        "globs": {"body.*": tensor, "head.w": value},
        "everything": {"*": tensor},
        "broadcast": {"body.w": torch.full((2, 1), value), "body.b": torch.full((1,), value), "head.*": tensor},
        "full": {name: torch.full(shape, value) for name, shape in SHAPES.items()},
        "schedule": lambda step: value,
        "schedule of a tensor": lambda step: tensor + 0 * step,
        "schedule of a dict": lambda step: {"*.w": tensor, "body.b": torch.full((3,), value)},
        "dict of schedules": {"body.*": lambda step: tensor, "head.*": value},
    }


@EACH_NUMBER
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("form", forms(0.0))
def test_every_form_of_a_hyperparameter(rule: str, name: str, form: str, dtype: torch.dtype) -> None:
    params, gradients = tensors(dtype), [tensors(dtype) for _ in range(3)]
    if name == "betas":
        plain: Any = (0.5, 0.6)
        spec: Any = (forms(0.5)[form], forms(0.6)[form])
    else:
        plain, spec = 0.3, forms(0.3)[form]
    expected = run(make(rule, **{name: plain}), params, gradients)
    found = run(make(rule, **{name: spec}), params, gradients)
    assert_close(found[0], expected[0], 1e-13)
    assert_close(found[1].slots, expected[1].slots, 1e-13)
    assert found[1].hyperparameters[name] is spec or found[1].hyperparameters[name] == spec


def test_different_values_for_different_parameters_and_steps() -> None:
    params, grads = tensors(), tensors()
    rates = {"body.w": torch.rand(2, 3), "body.b": torch.rand(3), "head.w": torch.rand(())}
    found, _ = optim.sgd(lr=rates).step(params, grads, optim.sgd(lr=rates).init(params))
    assert_close(found, {name: params[name] - rates[name] * grads[name] for name in params})
    seen: list[Tensor] = []

    def schedule(step: Tensor) -> float:
        seen.append(step)
        return [0.1, 0.2][int(step)]

    found, _ = run(optim.sgd(lr=schedule), params, [grads, grads])
    assert_close(found, {name: params[name] - (0.1 + 0.2) * grads[name] for name in params})
    assert [int(step) for step in seen] == [0, 1]
    assert {(step.dtype, step.ndim) for step in seen} == {(torch.int64, 0)}
    pair = optim.adam(betas=lambda step: (0.9, 0.99))
    assert_close(run(pair, params, [grads])[0], run(optim.adam(betas=(0.9, 0.99)), params, [grads])[0])
    by_name = optim.adam(betas={"body.*": (0.5, 0.6), "head.*": (0.9, 0.99)})
    assert_close(run(by_name, params, [grads] * 2)[0]["head.w"], run(pair, params, [grads] * 2)[0]["head.w"])


def test_the_state() -> None:
    params = {"a": [torch.randn(2), torch.randn(())]}
    state = optim.adam(amsgrad=True).init(params)
    assert isinstance(state, optim.OptState)
    assert state.step.shape == ()
    assert state.step.dtype == torch.int64
    assert set(state.slots) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert_close(state.slots["exp_avg"], {"a": [torch.zeros(2), torch.zeros(())]})
    assert state.hyperparameters == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    assert optim.sgd().init(params).slots == {}
    frozen = [leaf.clone() for leaf in params["a"]]
    before = state.step.clone(), state.slots["exp_avg"]["a"][0].clone()
    optim.adam(amsgrad=True).step(params, params, state)
    assert_close(params["a"], frozen)
    assert_close((state.step, state.slots["exp_avg"]["a"][0]), before)


# Derivatives -------------------------------------------------------------------------------------------------------

DIFFERENTIATED: dict[str, Any] = {
    "sgd": lambda lr, a, b, c: optim.sgd(lr, momentum=a, dampening=b, weight_decay=c),
    "sgd, nesterov": lambda lr, a, b, c: optim.sgd(lr, momentum=a, weight_decay={"w": b + c}, nesterov=True),
    "adam": lambda lr, a, b, c: optim.adam(lr, betas=(a, b), eps=c, weight_decay=c),
    "adam, by name": lambda lr, a, b, c: optim.adam({"w": lr}, betas=({"*": a}, lambda step: b), eps=c, amsgrad=True),
}


@pytest.mark.parametrize("optimizer", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_finite_differences_by_start_and_every_hyperparameter(optimizer: Any) -> None:
    grads = torch.randn(3, 2)

    def after(w: Tensor, grads: Tensor, *numbers: Tensor) -> Tensor:
        params, _ = run(optimizer(*numbers), {"w": w}, [{"w": g} for g in grads])
        return params["w"]

    inputs = [torch.randn(2), grads, torch.rand(2) if "name" in str(optimizer) else torch.tensor(0.1)]
    inputs += [torch.tensor(0.7), torch.tensor(0.6), torch.tensor(0.1)]
    leaves = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(after, leaves)
    assert torch.autograd.gradgradcheck(after, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-12, 1e-8, 1e-4, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_adams_first_step_and_its_derivative_at_any_gradient(sign: float, size: float, dtype: torch.dtype) -> None:
    """From a fresh state ``p - lr * g / (|g| + eps)``, whose derivative is ``-lr * eps / (|g| + eps)^2``."""
    lr, eps = 0.1, 1e-8
    g = torch.tensor(sign * size, dtype=dtype, requires_grad=True)
    optimizer = optim.adam(lr=lr, eps=eps)
    start = torch.zeros((), dtype=dtype)
    found, _ = optimizer.step(start, g, optimizer.init(start))
    slope = torch.autograd.grad(found, g, create_graph=True)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert math.isclose(found.item(), -lr * sign * size / (size + eps), rel_tol=tolerance, abs_tol=1e-35)
    assert abs(slope.item() + lr * eps / (size + eps) ** 2) <= tolerance * lr / (size + eps)
    second = torch.autograd.grad(slope, g)[0]
    assert second.isfinite()
    if dtype == torch.float64 and 0 < size < 1:
        assert math.isclose(second.item(), 2 * lr * eps * sign / (size + eps) ** 3, rel_tol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adams_meta_gradient_at_a_gradient_of_zero(dtype: torch.dtype, amsgrad: bool) -> None:
    lr, eps = 0.1, 0.01
    curvature = torch.tensor([1.0, 2.0], dtype=dtype)
    optimizer = optim.adam(lr=lr, eps=eps, amsgrad=amsgrad)

    def one(w: Tensor) -> Tensor:
        return adapt(lambda w, c: 0.5 * (c * w**2).sum(), w, curvature, optimizer=optimizer, steps=1).params

    w = torch.zeros(2, dtype=dtype, requires_grad=True)
    expected = torch.diag(1 - lr * curvature / eps)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert_close(torch.autograd.functional.jacobian(one, w), expected, tolerance)
    assert_close(torch.func.jacrev(one)(w.detach()), expected, tolerance)
    many = lambda w: adapt(lambda w, c: (c * w**2).sum(), w, curvature, optimizer=optimizer, steps=3).params.sum()
    assert torch.autograd.grad(many(w), w)[0].isfinite().all()
    assert torch.autograd.functional.hessian(many, w).isfinite().all()


# Errors ------------------------------------------------------------------------------------------------------------

BAD_NUMBERS = [-0.1, -1, math.nan, math.inf, -math.inf, "0.1", None, True, [0.1], (0.1, 0.2), 1j]


@EACH_NUMBER
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=str)
def test_a_bad_value_is_refused_by_name(rule: str, name: str, value: Any) -> None:
    if (name == "dampening" and isinstance(value, (int, float)) and math.isfinite(value) and value is not True) or (
        name == "betas" and isinstance(value, tuple)
    ):
        assert make(rule, **{name: value}) is not None
        return
    with pytest.raises(HyperparameterError, match=f"`{name}"):
        make(rule, **{name: value})
    if name != "betas":
        with pytest.raises(HyperparameterError, match=f"`{name}.*body"):
            make(rule, **{name: {"body.*": value, "head.*": 0.1}})


BETAS = [(0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (1.0, 0.9), (-0.1, 0.9), (0.9, math.nan), 0.9, torch.tensor(0.9)]
BETAS += [torch.tensor([0.9, 0.99]), {"*": (0.9,)}, {"*": 0.9}, (0.9, "0.99"), ((0.9, 0.9), 0.9)]


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_betas_are_a_pair_below_one(betas: Any) -> None:
    with pytest.raises(HyperparameterError, match="betas"):
        run(optim.adam(betas=betas), tensors(), [tensors()])


@pytest.mark.parametrize("config", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(config: Any) -> None:
    with pytest.raises(HyperparameterError, match="nesterov"):
        optim.sgd(nesterov=True, **config)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("name", "words"), [("lrr", "did you mean `lr`"), ("weight_deacy", "`weight_decay`"), ("foreach", "leave it out")]
)
def test_a_misspelt_hyperparameter_is_refused(rule: str, name: str, words: str) -> None:
    with pytest.raises(HyperparameterNameError, match=words) as caught:
        RULES[rule](**{name: 0.1})
    assert isinstance(caught.value, TypeError)


BAD_SPECS: dict[str, tuple[Any, Any, str]] = {
    "matches nothing": (NamesError, {"body.*": 0.1, "haed.*": 0.1}, "`haed.*` matches no name.*did you mean `head.w`"),
    "not all": (NamesError, {"body.*": 0.1}, "`head.w` is matched by no key"),
    "twice": (NamesError, {"*": 0.1, "head.w": 0.2}, "`head.w` is matched by `\\*`, `head.w`"),
    "no name": (NamesError, {0: 0.1}, "`0`"),
    "a vector for all": (HyperparameterError, torch.ones(3), "shape \\(3,\\)"),
    "a shape too many": (HyperparameterError, {"*": torch.ones(3)}, "head.w"),
    "another shape": (HyperparameterError, {"*.w": 0.1, "body.b": torch.ones(2)}, "`body.b` of shape \\(3,\\)"),
    "per task": (HyperparameterError, optim.per_task(torch.ones(3)), "adapt_tasks"),
}


@EACH_NUMBER
@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "schedule"])
@pytest.mark.parametrize("bad", BAD_SPECS.values(), ids=BAD_SPECS)
def test_a_value_that_does_not_fit_the_parameters(rule: str, name: str, bad: Any, wrapped: bool) -> None:
    error, spec, words = bad
    value: Any = (lambda step: spec) if wrapped else spec
    with pytest.raises(error, match=words):
        run(make(rule, **{name: (value, 0.9) if name == "betas" else value}), tensors(), [tensors()])


@pytest.mark.parametrize("tree", [0.1, torch.tensor(0.1), {}, {"a": 0.1}, [torch.tensor(1.0)]], ids=str)
def test_per_task_takes_tensors_with_a_task_dimension(tree: Any) -> None:
    with pytest.raises(HyperparameterError, match="per_task"):
        optim.per_task(tree)


@pytest.mark.parametrize("rule", RULES)
def test_parameters_are_floating_and_gradients_are_like_them(rule: str) -> None:
    with pytest.raises(DtypeError, match=r"params.*w"):
        make(rule).init({"w": torch.ones(2, dtype=torch.int32)})
    params = {"w": torch.ones(2)}
    with pytest.raises(TreeError, match="v"):
        make(rule).step(params, {"v": torch.ones(2)}, make(rule).init(params))
