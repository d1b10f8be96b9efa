"""`check_grads`: right derivatives pass, wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from statelessify.errors import DerivativeError, DtypeError, HyperparameterError, LossError, TreeError
from statelessify.testing import check_grads

numbers = st.floats(-3, 3, allow_subnormal=False).map(lambda x: round(x, 3))
vectors = st.lists(numbers, min_size=1, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))

SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "square": torch.square,
    "cubic": lambda x: x**3 - 2 * x,
    "rational": lambda x: x / (1 + x * x),
    "softmax": lambda x: x.softmax(0),
    "norm": lambda x: (1 + x.square().sum()).sqrt(),
    "zero": lambda x: 0 * x,
    "constant": lambda x: torch.ones(()).to(x),
}
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "large": lambda x: 1e12 * x.sin(),
    "small": lambda x: 1e-12 * x.sin(),
    "offset": lambda x: 1e6 + x.sin(),
}


@given(
    vectors,
    st.lists(st.sampled_from(sorted(SMOOTH)), min_size=1, max_size=3),
    st.sampled_from(sorted(SCALES)),
    st.sampled_from([1, 2]),
)
def test_a_right_derivative_is_no_alarm(x: Tensor, names: list[str], scale: str, order: Any) -> None:
    def fn(tree: dict[str, Tensor]) -> Tensor:
        out = tree["x"]
        for name in names:
            out = SMOOTH[name](out.tanh() if name in ("exp", "cubic", "square") else out)
        return (SCALES[scale](out) * tree["y"]).sum()

    check_grads(fn, {"x": x, "y": torch.ones(())}, order=order)


@given(vectors)
def test_float32(x: Tensor) -> None:
    narrow = torch.ones((), dtype=torch.float32)
    check_grads(lambda v: (v.to(torch.float32).sin() * narrow).sum(), x.to(torch.float32))


class Wrong(torch.autograd.Function):
    """The sine, with a factor in its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 1.01 * grad * x.cos()


class Once(torch.autograd.Function):
    """The sine, with a right derivative that has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.detach().cos()


class Tangent(torch.autograd.Function):
    """The sine, with the sign of its forward-mode derivative reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -tangent * x.cos()


POINT = {"w": torch.tensor([0.3, -0.7], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}


def inner(tree: Any, create_graph: bool = True, cut: bool = False) -> Tensor:
    w = tree["w"] if tree["w"].requires_grad else tree["w"].detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad((w**3).sum() * tree["b"], w, create_graph=create_graph)
    return ((w - 0.1 * (g.detach() if cut else g)) ** 2).sum()


MISTAKES: dict[str, tuple[Callable[[Any], Any], dict[str, Any], list[str]]] = {
    "detach": (
        lambda t: (t["w"] * t["w"].detach()).sum() * t["b"],
        {},
        [
            "leaf `w`: the derivative by reverse mode is wrong",
            "worst at [1]",
            "2 of 2 entries",
            "`.detach()`",
            "reproduce: check_grads(",
        ],
    ),
    "detached leaf": (lambda t: t["w"].sum() * t["b"].detach(), {}, ["leaf `b`", "autograd 0,", "differences -0.4"]),
    "data": (lambda t: (t["w"].data * t["b"]).sum(), {}, ["leaf `w`", "`.data`"]),
    "no_grad": (lambda t: t["b"] * _no_grad(t["w"]), {}, ["leaf `w`", "no_grad"]),
    "backward": (lambda t: Wrong.apply(t["w"]).sum(), {"modes": ("reverse",)}, ["leaf `w`", "reverse mode"]),
    "double backward": (
        lambda t: Once.apply(t["w"]).sum(),
        {"modes": ("reverse",), "order": 2},
        ["leaf `w`: the second derivative by reverse mode is wrong"],
    ),
    "jvp": (lambda t: Tangent.apply(t["w"]).sum(), {}, ["leaf `w`: the derivative by forward mode is wrong"]),
    "create_graph": (
        lambda t: inner(t, create_graph=False),
        {"modes": ("reverse",)},
        ["is wrong", "`create_graph=True`, which is missing"],
    ),
    "inner detach": (lambda t: inner(t, cut=True), {"modes": ("reverse",)}, ["leaf `b`", "cuts the graph"]),
    "in place": (lambda t: t["w"].mul_(2).sum(), {}, ["changes its input: leaf `w`", "work on a copy"]),
    "random": (lambda t: (t["w"] * torch.rand(2)).sum(), {}, ["not deterministic", "seed"]),
    "kink": (lambda t: (t["w"] - POINT["w"]).relu().sum(), {}, ["has a kink here", 'kinks="skip"']),
    "not finite": (lambda t: (t["w"].sum() - 1e9).log(), {}, ["is not finite"]),
}


def _no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (2 * x).sum()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_named(name: str) -> None:
    fn, options, words = MISTAKES[name]
    with pytest.raises(AssertionError) as caught:
        check_grads(fn, POINT, **options)
    for word in words:
        assert word in str(caught.value)


def test_nothing_of_the_callers_changes() -> None:
    tree = {"w": torch.ones(2, requires_grad=True), "n": torch.arange(2), "k": 3}
    state = torch.get_rng_state()
    check_grads(lambda t: (t["w"] ** t["k"] * t["n"]).sum() + 0 * torch.rand(()), tree, order=2)
    assert torch.equal(tree["w"], torch.ones(2))
    assert tree["w"].grad is None
    assert tree["w"].requires_grad
    assert torch.equal(state, torch.get_rng_state())


def test_gradients_of_ones_own() -> None:
    def fn(t: Any) -> Tensor:
        return (t["w"] ** 3).sum() * t["b"]

    def grads(t: Any) -> Any:
        return {"w": 3 * t["w"] ** 2 * t["b"], "b": (t["w"] ** 3).sum()}

    check_grads(fn, POINT, grads=grads, order=2)
    with pytest.raises(AssertionError, match=r"leaf `b`: the derivative by `grads` is wrong"):
        check_grads(fn, POINT, grads=lambda t: {**grads(t), "b": torch.zeros(())})
    with pytest.raises(AssertionError, match="second derivative by reverse mode is wrong, of the gradient by `w`"):
        check_grads(fn, POINT, grads=lambda t: {**grads(t), "w": 3 * t["w"].detach() ** 2 * t["b"]}, order=2)
    with pytest.raises(TreeError, match="another structure"):
        check_grads(fn, POINT, grads=lambda t: {"w": t["w"]})
    with pytest.raises(TreeError, match=r"shape \(3,\) for leaf `w`"):
        check_grads(fn, POINT, grads=lambda t: {"w": torch.zeros(3), "b": t["b"]})
    with pytest.raises(LossError, match="returns one real number"):
        check_grads(lambda t: t["w"], POINT, grads=grads)


@pytest.mark.parametrize("order", [1, 2])
def test_complex_leaves(order: Any) -> None:
    z = torch.tensor([0.3 + 0.4j, 1.0 - 2.0j], dtype=torch.complex128)
    check_grads(lambda t: (t.abs().square() + (t * t).imag).sum(), z, order=order)
    with pytest.raises(AssertionError, match="imaginary part"):
        check_grads(lambda t: (t.real * t.real + t.imag * t.imag.detach()).sum(), z, order=order)


def test_a_kink_is_skipped_but_not_a_mistake_beside_it() -> None:
    x = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    check_grads(lambda v: v.relu().sum(), x, kinks="skip")
    with pytest.raises(AssertionError, match=r"worst at \[2\]"):
        check_grads(lambda v: (v.relu() + v * v.detach()).sum(), x, kinks="skip")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"order": 3}, HyperparameterError, "is not 1 or 2"),
        ({"modes": "reverse"}, HyperparameterError, "not a sequence"),
        ({"modes": ("revers",)}, HyperparameterError, "did you mean `reverse`"),
        ({"kinks": "no"}, HyperparameterError, "kinks"),
        ({"entries": -1}, HyperparameterError, "entries"),
        ({"grads": 3}, HyperparameterError, "no function"),
    ],
)
def test_misuse(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_grads(lambda t: t.sum(), torch.ones(2), **options)


def test_what_has_no_derivative() -> None:
    with pytest.raises(DtypeError, match="no leaf to differentiate"):
        check_grads(lambda t: t.sum(), torch.arange(3))
    with pytest.raises(DtypeError, match="no derivative"):
        check_grads(lambda t: float(t.detach().sum()), torch.ones(2))
    with pytest.raises(DerivativeError, match="forward mode"):
        check_grads(lambda t: Once.apply(t).sum(), torch.ones(2))


def test_a_wrong_entry_among_many_is_found() -> None:
    factor = torch.ones(300, dtype=torch.float64)
    factor[217] = 1.001

    def grads(x: Tensor) -> Tensor:
        return factor * x.cos()

    with pytest.raises(AssertionError, match=r"worst at \[217\]: `grads`"):
        check_grads(lambda x: x.sin().sum(), torch.linspace(-1, 1, 300).double(), grads=grads)


def test_entries_of_very_different_size() -> None:
    x = torch.tensor([1e-9, 1.0, 1e6, 0.0], dtype=torch.float64)
    check_grads(lambda v: torch.stack([(1e9 * v[0]).sin(), v[1].sin(), (1e-6 * v[2]).sin(), v[3].sin()]), x, order=2)


@given(st.floats(0.1, 3), st.sampled_from(["sin", "exp", "tanh"]))
def test_noise_within_the_function_is_no_alarm(x: float, name: str) -> None:
    check_grads(lambda v: 50 + SMOOTH[name](v.to(torch.float32)).to(torch.float64), torch.tensor(x).double())


@given(vectors, st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_functions_that_take_float32_alone(x: Tensor, scale: float) -> None:
    x = torch.where(x.abs() < 0.1, 1, x)  # of a zero nobody knows how small a step is
    weight = torch.linspace(-1, 1, x.numel()).expand(2, -1)
    check_grads(lambda v: (weight @ v / scale).tanh(), x.to(torch.float32) * scale)


def test_steps_are_not_smooth() -> None:
    with pytest.raises(AssertionError, match="the differences do not converge"):
        check_grads(lambda v: v.sin() + 0.1 * (1234567891.1 * v).detach().frac(), torch.tensor(0.5).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_where_it_matters(dtype: torch.dtype) -> None:
    check_grads(lambda v: v.sin(), torch.ones(2, dtype=dtype))  # computes in float64 if the input does
    with pytest.raises(DtypeError, match=f"computes in {str(dtype)[6:]}"):
        check_grads(lambda v: v.to(dtype).sin(), torch.ones(2))


def test_torchs_own_check_agrees_with_ours() -> None:
    torch.manual_seed(0)
    layer = nn.LayerNorm(3).to(torch.float64)
    params = {name: p.detach() for name, p in layer.named_parameters()} | {"x": torch.randn(2, 3).double()}

    def fn(t: Any) -> Tensor:
        x = t["x"]
        return torch.func.functional_call(layer, {k: v for k, v in t.items() if k != "x"}, (x,)).square()

    check_grads(fn, params, order=2, modes=("reverse",))
