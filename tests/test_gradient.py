"""How a meta-gradient is obtained: the modes, what they reach, and the same numbers in every context of torch's."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import IGNORE_SCRIPT, assert_close, fresh, gradients, mlp, pull, recurrent, regression, regression_batch
from torch import Tensor, nn

from statelessify import FirstOrder, Unroll, adapt, optim, over_tasks

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.FirstOrder:UserWarning"),  # tested by itself, below
]
SEEDS = st.integers(0, 2**31 - 1)
MODES = pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
OPTIMIZERS = {
    "sgd": lambda lr: optim.sgd(lr=lr),
    "momentum": lambda lr: optim.sgd(lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda lr: optim.adam(lr=lr, eps=0.1),
}
RULES = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# First order -------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, steps=st.integers(1, 4))
def test_first_order_takes_inner_gradients_as_constants(seed: int, steps: int) -> None:
    torch.manual_seed(seed)
    params, batch, query = fresh(mlp()), regression_batch(), regression_batch()
    lr, learned = torch.tensor(0.1, requires_grad=True), torch.rand((), requires_grad=True)
    points: list[Any] = []

    def loss(params: Any, batch: Any) -> Tensor:
        return learned * regression(params, batch)

    def batch_at(step: int, params: Any) -> Any:
        points.append(params)
        return batch

    optimizer = optim.sgd(lr=lr)
    adapted = adapt(loss, params, batch_at, optimizer=optimizer, steps=steps, gradient=FirstOrder())
    exact = adapt(loss, params, batch, optimizer=optimizer, steps=steps)
    assert_close(adapted[:3], exact[:3])
    assert not adapted.losses.requires_grad
    outer = regression(adapted.params, query)
    at_the_end = fresh(adapted.params)
    fomaml = gradients(regression(at_the_end, query), at_the_end)
    assert_close(gradients(outer, params, retain_graph=True), fomaml)
    inner = [gradients(loss(here := fresh(point), batch), here) for point in points]
    by_lr = -sum((grad[name] * fomaml[name]).sum() for grad in inner for name in grad)
    assert_close(torch.autograd.grad(outer, lr, retain_graph=True)[0], by_lr)
    assert torch.autograd.grad(outer, learned, allow_unused=True) == (None,)


# Where nothing is recorded -----------------------------------------------------------------------------------------


@MODES
@RULES
@pytest.mark.parametrize("silent", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_and_the_numbers_are_the_same(silent: Any, make: Any, gradient: Any) -> None:
    params, hidden = fresh({"w": torch.randn(3)}), torch.randn(3, requires_grad=True)
    options: Any = {"optimizer": make(torch.tensor(0.1, requires_grad=True)), "steps": 3, "gradient": gradient}
    expected = adapt(recurrent, params, torch.ones(3), carry=hidden, **options)
    alive: list[Any] = []

    def batch_at(step: int, current: Any) -> Tensor:
        alive.append(weakref.ref(current["w"].untyped_storage()))
        return torch.ones(3)

    with silent():
        adapted = adapt(recurrent, params, batch_at, carry=hidden, **options)
        plain = adapt(recurrent, params, torch.ones(3), carry=hidden * 1, **options)
    computed = [adapted.params["w"], adapted.losses, adapted.carry, *adapted.opt_state.slots.values()]
    for value in torch.utils._pytree.tree_leaves(computed):
        assert value.grad_fn is None
        assert not value.requires_grad
    assert_close(adapted, expected)
    assert_close(plain, expected)
    assert params["w"].grad is None
    assert hidden.grad is None


@pytest.mark.parametrize("silent", [torch.no_grad, torch.inference_mode])
def test_memory_is_constant_in_steps_where_nothing_is_recorded(silent: Any) -> None:
    alive: list[Any] = []
    most = 0

    def loss(params: Any, batch: Any) -> Tensor:
        nonlocal most
        alive.append(weakref.ref(hidden := torch.tanh(params["w"] * batch)))
        most = max(most, sum(ref() is not None for ref in alive))
        return (hidden**2).sum()

    with silent():
        adapt(loss, {"w": torch.ones(3, requires_grad=True)}, torch.ones(3), optimizer=optim.adam(), steps=10)
    assert most <= 2


def test_a_loss_may_close_over_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        scale = torch.ones(3)
        adapted = adapt(lambda w, b: ((w * scale - b) ** 2).sum(), scale * 0, scale, optimizer=optim.sgd(0.25), steps=1)
    assert_close(adapted.params.clone(), torch.full((3,), 0.5))


# What the loss closes over -----------------------------------------------------------------------------------------


def loss_closing_over(start: Tensor, body: Tensor, learned: Tensor) -> Callable[[Any, Tensor], Tensor]:
    feature = torch.tanh(body) * 2  # no leaf

    def loss(params: Any, target: Tensor) -> Tensor:
        w = params["w"]
        proximal = ((w - start) ** 2).sum() + w @ start
        return learned * pull({"w": w * feature}, target) + proximal + body @ w**2

    return loss


@MODES
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "no leaf"])
def test_everything_that_the_loss_closes_over_gets_its_gradient(gradient: Any, leaf: bool) -> None:
    inputs = [torch.randn(3), torch.rand(3), torch.rand(())]
    target, query = torch.randn(2, 3)

    def run(start: Tensor, body: Tensor, learned: Tensor, by_hand: bool = False) -> Tensor:
        start = start if leaf else start * 1.5
        loss = loss_closing_over(start, body, learned)
        w = start
        if by_hand:
            for _ in range(2):
                copy = w.clone()
                g = torch.autograd.grad(loss({"w": copy}, target), copy, create_graph=True)[0]
                w = w - 0.01 * (g if gradient == Unroll() else g.detach())
        else:
            w = adapt(loss, {"w": w}, target, optimizer=optim.sgd(lr=0.01), steps=2, gradient=gradient).params["w"]
        return pull({"w": w}, query)

    leaves = [value.clone().requires_grad_() for value in inputs]
    options: Any = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(run(*leaves, by_hand=True), leaves, **options)
    assert_close(torch.autograd.grad(run(*leaves), leaves, **options), expected)
    assert_close(torch.func.grad(run, argnums=(0, 1, 2))(*inputs), expected)


@MODES
@RULES
def test_a_parameter_that_is_not_reached_has_gradient_zero(make: Any, gradient: Any) -> None:
    params = fresh({"w": torch.randn(2), "unused": torch.randn(2)})
    optimizer = make(0.1)

    def run(params: Any) -> Any:
        return adapt(pull, params, torch.ones(2), optimizer=optimizer, steps=2, gradient=gradient)

    def outer(params: Any) -> Tensor:
        return torch.stack([value.sum() for value in run(params).params.values()]).sum()

    assert_close(run(params).params["unused"], params["unused"])
    assert_close(gradients(outer(params), params)["unused"], torch.ones(2))
    constants = {name: value.detach() for name, value in params.items()}
    assert_close(torch.func.grad(outer)(constants), gradients(outer(params), params))
    nothing = adapt(lambda p, b: torch.zeros(()), params, None, optimizer=optim.sgd(lr=0.1), steps=2)
    assert_close(nothing.params, params)


def test_first_order_warns_once_of_what_it_does_not_reach() -> None:
    learned, start = torch.rand((), requires_grad=True), torch.ones(3, requires_grad=True)
    loss = lambda w, b: learned * ((w - b) ** 4).sum()
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2, "gradient": FirstOrder()}
    adapt(lambda w, b: ((w - b) ** 4).sum(), start, torch.zeros(3), **options)
    with pytest.warns(UserWarning, match="closed-over"):
        adapt(loss, start, torch.zeros(3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(loss, start, torch.zeros(3), **options)


def test_first_order_warns_once_of_each_loss_that_is_an_object() -> None:
    class Learned(nn.Module):  # it has no code of its own by which it could be known
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, w: Tensor, batch: Tensor) -> Tensor:
            return self.factor * ((w - batch) ** 4).sum()

    one, other, start = Learned(), Learned(), torch.ones(3, requires_grad=True)
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2, "gradient": FirstOrder()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for loss in (one, other, one, other):
            adapt(loss, start, torch.zeros(3), **options)
    assert ["closed-over" in str(warning.message) for warning in caught] == [True, True]


def test_first_order_does_not_warn_of_a_carry_that_it_reaches() -> None:
    start, hidden = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    loss = lambda w, h, b: ((torch.tanh(w * b + h) ** 2).sum(), torch.tanh(w * b + h))
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2, "gradient": FirstOrder()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = adapt(loss, start, torch.ones(3), carry=hidden, **options)
    assert torch.autograd.grad(adapted.carry.sum(), hidden)[0].abs().min() > 0


def test_first_order_keeps_the_graph_that_a_carry_shares_with_the_loss() -> None:
    start, hidden = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    state = lambda w, h, b: torch.tanh(w * b + h)

    def once(w: Tensor, h: Tensor, b: Tensor) -> Any:
        new = state(w, h, b)
        return (new**2).sum(), new

    twice = lambda w, h, b: ((state(w, h, b) ** 2).sum(), state(w, h, b))
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2, "gradient": FirstOrder(), "carry": hidden}
    found, expected = (
        torch.autograd.grad(adapt(loss, start, torch.ones(3), **options).carry.sum(), (start, hidden))
        for loss in (once, twice)
    )
    assert_close(found, expected)


# The same numbers in every context ---------------------------------------------------------------------------------


def context_problem(make: Any, gradient: Any) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """``meta_loss(w, lr)`` of one flat parameter, at a point."""
    x, query = regression_batch(), regression_batch()

    def loss(w: Tensor, batch: Any) -> Tensor:
        names = ("first.weight", "first.bias", "last.weight")
        parts = w[:6].reshape(2, 3), w[6:9], w[9:].reshape(3, 1)
        return regression(dict(zip(names, parts, strict=True)), batch)

    def meta_loss(w: Tensor, lr: Tensor) -> Tensor:
        adapted = adapt(loss, w, x, optimizer=make(lr), steps=3, gradient=gradient)
        return loss(adapted.params, query)

    return meta_loss, torch.randn(12), torch.tensor(0.1)


@MODES
@RULES
def test_the_learning_rate_alone_of_parameters_that_need_no_gradient(make: Any, gradient: Any) -> None:
    meta_loss, w, lr = context_problem(make, gradient)
    leaves = [value.clone().requires_grad_() for value in (w, lr)]
    both = torch.autograd.grad(meta_loss(*leaves), leaves)
    assert_close(torch.autograd.grad(meta_loss(w, leaves[1]), leaves[1])[0], both[1])
    assert_close(torch.autograd.grad(meta_loss(leaves[0], lr), leaves[0])[0], both[0])
    assert_close(torch.func.grad(lambda lr: meta_loss(w, lr))(lr), both[1])
    assert_close(torch.func.grad(lambda lr: meta_loss(leaves[0], lr))(lr).detach(), both[1])
    assert_close(torch.func.grad(meta_loss, argnums=(0, 1))(w, lr), both)


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
@MODES
@RULES
def test_forward_mode(make: Any, gradient: Any) -> None:
    meta_loss, w, lr = context_problem(make, gradient)
    leaves = [value.clone().requires_grad_() for value in (w, lr)]
    by_w, by_lr = torch.autograd.grad(meta_loss(*leaves), leaves)
    direction = torch.randn(12)
    expected = by_w @ direction + 2 * by_lr
    tangents = direction, torch.tensor(2.0)
    assert_close(torch.func.jvp(meta_loss, (w, lr), tangents)[1], expected)
    assert_close(torch.func.jvp(meta_loss, tuple(leaves), tangents)[1].detach(), expected)
    assert_close(torch.func.jacfwd(meta_loss)(w, lr), by_w)
    for point in ((w, lr), leaves):
        with fwad.dual_level():
            duals = [fwad.make_dual(value, tangent) for value, tangent in zip(point, tangents, strict=True)]
            assert_close(fwad.unpack_dual(meta_loss(*duals)).tangent.detach(), expected)


@MODES
@RULES
def test_a_vmap_of_the_users_own(make: Any, gradient: Any) -> None:
    meta_loss, w, lr = context_problem(make, gradient)
    points = torch.stack([w, -w, w / 2])
    expected = torch.stack([torch.func.grad(meta_loss)(point, lr) for point in points])
    assert_close(torch.vmap(meta_loss, (0, None))(points, lr), torch.stack([meta_loss(p, lr) for p in points]))
    assert_close(torch.vmap(torch.func.grad(meta_loss), (0, None))(points, lr), expected)
    assert_close(torch.func.grad(lambda p: torch.vmap(meta_loss, (0, None))(p, lr).sum())(points), expected)
    leaf = points.clone().requires_grad_()
    assert_close(torch.autograd.grad(torch.vmap(meta_loss, (0, None))(leaf, lr).sum(), leaf)[0], expected)
    with torch.no_grad():
        silent = torch.vmap(meta_loss, (0, None))(leaf, lr)
    assert silent.grad_fn is None
    assert_close(silent, torch.stack([meta_loss(p, lr).detach() for p in points]))


@pytest.mark.parametrize("norm", ["layer", "batch", "instance"])
@pytest.mark.parametrize("outer", ["func", "backward"])
def test_a_vmap_of_the_users_own_through_a_norm_that_the_loss_calls(norm: str, outer: str) -> None:
    """`torch.vmap`, not `over_tasks`: the norm is inside the loss that `adapt` is given."""
    norms: Any = {
        "layer": lambda h, scale: F.layer_norm(h, (3,), scale),
        "batch": lambda h, scale: F.batch_norm(h, None, None, scale, training=True),
        "instance": lambda h, scale: F.instance_norm(h.T[None], weight=scale)[0].T,
    }
    batches, c = torch.randn(3, 5, 2), torch.randn(5, 3)

    def loss(params: Any, x: Tensor) -> Tensor:
        return (norms[norm](torch.tanh(x @ params["w"]), params["scale"]) * c).sum() ** 2

    def meta_loss(params: Any, x: Tensor) -> Tensor:
        return loss(adapt(loss, params, x, optimizer=optim.sgd(lr=0.001), steps=2).params, x)

    def many(params: Any) -> Tensor:
        return torch.vmap(meta_loss, (None, 0))(params, batches).sum()

    params = fresh({"w": torch.randn(2, 3), "scale": torch.rand(3)})
    expected = gradients(torch.stack([meta_loss(params, x) for x in batches]).sum(), params)
    constants = {name: value.detach() for name, value in params.items()}
    found = torch.func.grad(many)(constants) if outer == "func" else gradients(many(params), params)
    assert_close(found, expected)


@pytest.mark.filterwarnings(IGNORE_SCRIPT)
@RULES
def test_second_derivatives_agree_in_every_order_of_modes(make: Any) -> None:
    meta_loss, w, lr = context_problem(make, Unroll())
    expected = torch.autograd.functional.hessian(meta_loss, (w, lr))
    assert_close(torch.func.hessian(meta_loss, argnums=(0, 1))(w, lr), expected)
    assert_close(torch.func.jacrev(torch.func.jacrev(meta_loss, (0, 1)), (0, 1))(w, lr), expected)
    assert_close(torch.autograd.functional.hessian(meta_loss, (w, lr), vectorize=True), expected)


@MODES
def test_an_inner_loop_inside_an_inner_loop(gradient: Any) -> None:
    target = torch.randn(3)
    options: Any = {"optimizer": optim.sgd(lr=0.01), "steps": 2}

    def outer_loss(params: Any, batch: Tensor) -> Tensor:
        return pull(adapt(pull, params, batch, **options).params, batch * 2)

    def run(w: Tensor) -> Tensor:
        return adapt(outer_loss, {"w": w}, target, gradient=gradient, **options).params["w"]

    def by_hand(w: Tensor) -> Tensor:
        for _ in range(2):
            inner = lambda w: w - 0.01 * 4 * (w - target) ** 3
            g = torch.func.grad(lambda w: pull({"w": inner(inner(w))}, target * 2))(w)  # noqa: B023
            w = w - 0.01 * (g.detach() if gradient == FirstOrder() else g)
        return w

    w = torch.randn(3, requires_grad=True)
    expected = torch.func.jacrev(by_hand)(w.detach())
    assert_close(torch.autograd.functional.jacobian(run, w), expected)
    assert_close(torch.func.jacrev(run)(w.detach()), expected)
    with torch.no_grad():
        silent = run(w)
    assert silent.grad_fn is None
    assert_close(silent, by_hand(w.detach()))


@MODES
@pytest.mark.parametrize("compiled", ["adapt", "over_tasks"])
def test_one_graph(compiled: str, gradient: Any) -> None:
    params, (x, y) = mlp(), regression_batch(3)

    def one(params: Any, x: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        optimizer = optim.adam(lr=lr, eps=0.1)
        adapted = adapt(regression, params, (x, y), optimizer=optimizer, steps=2, gradient=gradient)
        return regression(adapted.params, (x, y)) + adapted.losses.sum()

    def meta_loss(params: Any, lr: Tensor) -> Tensor:
        if compiled == "adapt":
            return one(params, x[0], y[0], lr)
        return over_tasks(one, in_dims=(None, 0, 0, None))(params, x, y, lr).sum()

    meta_step = torch.func.grad(meta_loss, argnums=(0, 1))
    found = torch.compile(meta_step, fullgraph=True, backend="aot_eager")(params, torch.tensor(0.1))
    assert_close(found, meta_step(params, torch.tensor(0.1)))
