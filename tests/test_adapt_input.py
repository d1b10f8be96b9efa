"""What `adapt` takes: any tree of parameters, complex ones, any callable; and what it refuses, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from problems import assert_close, pull
from torch import Tensor, nn

from statelessify import FirstOrder, Implicit, Unroll, adapt, optim
from statelessify.errors import DtypeError, HyperparameterError, LossError

pytestmark = pytest.mark.usefixtures("float64")
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
RULES = pytest.mark.parametrize("make", [lambda lr: optim.sgd(lr, 0.9), lambda lr: optim.adam(lr)], ids=["sgd", "adam"])


class Pair(NamedTuple):
    left: Any
    right: Any


@MODES
@RULES
@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: Pair(a, b),
        lambda a, b: {"z": {"deep": a}, "a": [b, ()]},
        lambda a, b: [(a,), None, {"x": b}],
    ],
    ids=["NamedTuple", "nested", "list"],
)
def test_parameters_are_any_tree(make: Any, gradient: Any, wrap: Any) -> None:
    a, b, target = torch.randn(2), torch.randn(3), torch.randn(2)

    def flat(params: Any, target: Tensor) -> Tensor:
        return ((params["a"] - target) ** 2).sum() + (params["b"] ** 4).sum() * params["a"][0]

    def as_tree(params: Any, target: Tensor) -> Tensor:
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(params) if leaf is not None]
        return flat(dict(zip("ab", sorted(leaves, key=len), strict=True)), target)

    options: Any = {"optimizer": make(0.1), "steps": 2, "gradient": gradient}
    expected = adapt(flat, {"a": a, "b": b}, target, **options).params
    assert_close(adapt(as_tree, wrap(a, b), target, **options).params, wrap(expected["a"], expected["b"]))


def test_one_tensor_is_a_tree() -> None:
    w = torch.randn(3, requires_grad=True)
    adapted = adapt(lambda w, b: ((w - b) ** 2).sum(), w, torch.ones(3), optimizer=optim.adam({"*": 0.1}), steps=2)
    assert isinstance(adapted.params, Tensor)
    assert torch.autograd.grad(adapted.params.sum(), w)[0].shape == (3,)


@pytest.mark.parametrize("gradient", [Unroll(), Unroll(checkpoint_every=1), FirstOrder(), Implicit()], ids=repr)
def test_no_parameters(gradient: Any) -> None:
    """There is nothing to adapt, and the losses are those of the batches: in eager code and in a vmap."""

    def losses(scale: Tensor) -> Tensor:
        def loss(params: Any, batch: Tensor) -> Tensor:
            return (batch * scale).sum()

        options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2, "gradient": gradient}
        adapted = adapt(loss, {}, lambda step, params: torch.full((3,), step + 1.0), **options)
        assert adapted.params == {}
        return adapted.losses

    assert_close(losses(torch.tensor(2.0)), torch.tensor([6.0, 12.0]))
    if not isinstance(gradient, Implicit):
        assert_close(torch.vmap(losses)(torch.tensor([2.0, 3.0])), torch.tensor([[6.0, 12.0], [9.0, 18.0]]))
    assert adapt(pull, {}, None, optimizer=optim.sgd(), steps=0).losses.shape == (0,)


def test_the_same_tensor_under_two_names_is_two_parameters() -> None:
    w = torch.randn(3, requires_grad=True)
    loss = lambda p, b: ((p["a"] * p["b"] - b) ** 2).sum()
    run = lambda w: adapt(loss, {"a": w, "b": w}, torch.ones(3), optimizer=optim.sgd(lr=0.1), steps=2).params["a"].sum()
    assert_close(torch.autograd.grad(run(w), w)[0], torch.func.grad(run)(w.detach()))


@pytest.mark.parametrize(
    "make", [lambda: optim.sgd(lr=0.1, momentum=0.5), lambda: optim.adam(lr=0.1)], ids=["sgd", "adam"]
)
def test_complex_parameters_are_trained_as_pairs(make: Any) -> None:
    start, target = torch.randn(3, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)

    def loss(w: Tensor, target: Tensor) -> Tensor:
        return (w.conj() * target).real.sum() + (w - target).abs().pow(2).sum()

    def linear(w: Tensor, target: Tensor) -> Tensor:
        return (w.conj() * target).real.sum()  # its gradient is a lazily conjugated tensor

    for function in (loss, linear):
        on_pairs = lambda w, target, function=function: function(torch.view_as_complex(w), target)
        expected = adapt(on_pairs, torch.view_as_real(start), target, optimizer=make(), steps=3).params
        adapted = adapt(function, start, target, optimizer=make(), steps=3).params
        assert_close(adapted, torch.view_as_complex(expected))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64, torch.float32])
def test_losses_are_real_also_where_there_are_none(dtype: torch.dtype) -> None:
    loss = lambda w, batch: w.abs().square().sum()
    adapted = [adapt(loss, torch.ones(3, dtype=dtype), None, optimizer=optim.sgd(), steps=n) for n in (0, 2)]
    assert [list(each.losses.shape) for each in adapted] == [[0], [2]]
    assert {each.losses.dtype for each in adapted} == {torch.ones((), dtype=dtype).abs().dtype}


def test_an_object_with_call_is_a_loss() -> None:
    learned = nn.Linear(3, 1)

    class Learned(nn.Module):
        def forward(self, params: Any, batch: Tensor) -> Tensor:
            return learned(params["w"] * batch).square().sum()

    adapted = adapt(Learned(), {"w": torch.ones(3)}, torch.ones(3), optimizer=optim.sgd(lr=0.1), steps=2)
    adapted.params["w"].sum().backward()
    assert learned.weight.grad is not None


BAD_LOSSES = {
    "vector": (lambda w, b: w, "shape (3,)", "mean"),
    "tuple": (lambda w, b: (w.sum(), b), "tuple of 2", "carry"),
    "number": (lambda w, b: 1.0, "float", "return a tensor"),
    "integer": (lambda w, b: w.sum().long(), "int64", "floating-point"),
    "complex": (lambda w, b: w.sum() * 1j, "complex128", "real"),
    "nothing": (lambda w, b: None, "NoneType", "return a tensor"),
}


@pytest.mark.parametrize("bad", BAD_LOSSES.values(), ids=BAD_LOSSES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_is_one_real_number(bad: Any, steps: int) -> None:
    loss, *words = bad
    with pytest.raises(LossError) as caught:
        adapt(loss, torch.ones(3), None, optimizer=optim.sgd(), steps=steps)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("out", [lambda w: w.sum(), lambda w: (w.sum(), 1, 2), lambda w: [w.sum(), 1]])
def test_a_loss_with_a_carry_is_a_pair(out: Any) -> None:
    with pytest.raises(LossError, match="pair"):
        adapt(lambda w, carry, b: out(w), torch.ones(3), None, optimizer=optim.sgd(), steps=1, carry={})


def test_a_carry_that_a_loss_gives_up_stays_given_up() -> None:
    calls: list[Any] = []

    def loss(w: Tensor, carry: Any, batch: Any) -> Any:
        calls.append(carry)
        return w.sum(), None

    adapt(loss, torch.ones(3), None, optimizer=optim.sgd(), steps=2, carry=())
    assert calls == [(), None]


BAD_INPUT: dict[str, tuple[Any, Any, str]] = {
    "integers": (DtypeError, {"params": {"w": torch.ones(3, dtype=torch.int64)}}, "integer"),
    "no tensor": (DtypeError, {"params": {"w": 1.0}}, "float"),
    "negative steps": (HyperparameterError, {"steps": -1}, "steps=-1"),
    "broken steps": (HyperparameterError, {"steps": 1.5}, "steps=1.5"),
    "true steps": (HyperparameterError, {"steps": True}, "steps=True"),
    "tensor steps": (HyperparameterError, {"steps": torch.tensor(1)}, "steps="),
    "no optimizer": (HyperparameterError, {"optimizer": torch.optim.SGD}, "Optimizer"),
    "a rate": (HyperparameterError, {"optimizer": 0.1}, "float"),
    "no mode": (HyperparameterError, {"gradient": "unroll"}, "gradient='unroll'.* is not a mode"),
    "a mode's class": (HyperparameterError, {"gradient": Unroll}, "is not a mode; write `Unroll\\(\\)`"),
    "per task": (HyperparameterError, {"optimizer": optim.sgd(lr=optim.per_task(torch.ones(2)))}, "adapt_tasks"),
    "a state of another shape": (
        ValueError,
        {"optimizer": optim.adam(), "opt_state": optim.adam().init({"w": torch.ones(2, 3)})},
        "w",
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_by_name(bad: Any) -> None:
    error, change, word = bad
    good: Any = {"params": {"w": torch.ones(3)}, "optimizer": optim.sgd(lr=0.1), "steps": 1}
    with pytest.raises(error, match=word):
        adapt(pull, batch=torch.ones(3), **(good | change))
