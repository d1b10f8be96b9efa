"""`check_meta_grads`: right inner loops pass in every mode, wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import mlp, regression, regression_batch, small, small_problem
from torch import Tensor, nn

from statelessify import FirstOrder, ForwardMode, Implicit, Unroll, optim, stateless
from statelessify.compat import higher
from statelessify.errors import HyperparameterError
from statelessify.testing import check_meta_grads, problem, seeded

pytestmark = pytest.mark.usefixtures("float64")


OPTIMIZERS: dict[str, Callable[[Tensor], Any]] = {
    "sgd": lambda lr: optim.sgd(lr=lr),
    "momentum": lambda lr: optim.sgd(lr=lr, momentum=lr * 5, nesterov=True, weight_decay=lr),
    "adam": lambda lr: optim.adam(lr=lr, betas=(0.8, lr * 9), eps=0.1),
    "per parameter": lambda lr: optim.sgd(lr={"w": torch.stack([lr, 2 * lr]), "b": 0.1}),
    "schedule": lambda lr: optim.sgd(lr=lambda step: lr / (1 + step)),
    "rmsprop": lambda lr: optim.rmsprop(lr=lr, eps=0.1),
}
MODES = [None, Unroll(checkpoint_every=2), Unroll(truncate=1), Unroll(truncate=3), FirstOrder(), ForwardMode()]


@given(st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from(MODES), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=30)
def test_a_right_loop_is_no_alarm(name: str, mode: Any, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    rate = torch.tensor(0.1, requires_grad=name == "schedule")
    steps = max(steps, mode.truncate or 0) if isinstance(mode, Unroll) else steps
    check_meta_grads(small, *small_problem(), optimizer=OPTIMIZERS[name](rate), steps=steps, gradient=mode, entries=1)


def test_the_second_order_and_fresh_batches() -> None:
    params, support, query = small_problem()
    check_meta_grads(small, params, support, query, optimizer=optim.sgd(lr=torch.tensor(0.1)), steps=2, order=2)
    batches = [support, query]
    check_meta_grads(small, params, lambda step, params: batches[step], query, optimizer=optim.sgd(lr=0.1), steps=2)


def test_classes_of_torch_and_float32() -> None:
    params, support, query = small_problem()
    check_meta_grads(small, params, support, query, optimizer=torch.optim.Adam, steps=3, entries=1)
    fixed = torch.ones(3, dtype=torch.float32)
    params, support = {"w": torch.randn(2, dtype=torch.float32)}, torch.randn(3, 2, dtype=torch.float32)
    loss = lambda p, x: ((torch.tanh(x @ p["w"]) - fixed) @ fixed) ** 2
    check_meta_grads(loss, params, support, optimizer=optim.sgd(lr=torch.tensor(0.1)), steps=2)


def test_gradients_that_are_rounding_alone() -> None:
    """Of a norm of one entry each, by what is normalized: autograd has 5e-17 where `torch.func.grad` has zero."""
    net = nn.Sequential(nn.GroupNorm(1, 1, eps=0.5, affine=False), nn.Flatten(), nn.Linear(1, 2), nn.LogSoftmax(-1))
    net = seeded(net, 245, takes=[(1, 1)], dtype=torch.float64, frozen=["2.bias"])
    labels = torch.tensor([[0, 0]])
    tasks = torch.zeros(1, 2, 1, 1), labels
    loss, params, *_ = problem(net, nn.NLLLoss(), tasks, tasks)
    support, query = (torch.zeros(2, 1, 1), labels[0]), (torch.tensor([[[0.0]], [[1.5]]]), labels[0])
    check_meta_grads(loss, params, support, query, optimizer=optim.sgd(lr=0.5, weight_decay=0.25), steps=1, entries=1)


def test_implicit() -> None:
    def loss(w: Tensor, batch: Tensor) -> Tensor:
        return (2 * (w - batch) ** 2).sum() + ((w - batch) ** 4).sum() + (w * batch[0]).sum()

    options: Any = {"optimizer": optim.sgd(lr=torch.tensor(0.1)), "gradient": Implicit()}
    check_meta_grads(loss, torch.zeros(2), torch.randn(2), torch.randn(2), steps=100, **options)


def test_a_kink_is_skipped() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w - x).relu().sum() + (w**4).sum()

    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 0}
    start = torch.tensor([1.0, 2.0])
    check_meta_grads(loss, start, torch.ones(2), kinks="skip", **options)
    with pytest.raises(AssertionError, match="kink"):
        check_meta_grads(loss, start, torch.ones(2), **options)


# Loops of one's own --------------------------------------------------------------------------------------------------


def by_hand(
    loss: Any = small, steps: int = 3, lr: Any = 0.1, create_graph: bool = True, change: Any = lambda g: g
) -> Callable[[Any, Any], Any]:
    def own(params: Any, support: Any) -> Any:
        for _ in range(steps):
            found = torch.autograd.grad(loss(params, support), list(params.values()), create_graph=create_graph)
            params = {name: p - lr * change(g) for (name, p), g in zip(params.items(), found, strict=True)}
        return params

    return own


def functional(params: Any, support: Any) -> Any:
    for _ in range(3):
        grads = torch.func.grad(small)(params, support)
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
    return params


class Small(nn.Module):
    """`small` for code with modules."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(params["w"])
        self.b = nn.Parameter(params["b"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) * self.b


def with_higher(track: bool) -> Callable[[Any, Any], Any]:
    def own(params: Any, support: Any) -> Any:
        module = Small({name: p.detach() for name, p in params.items()})
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with higher.innerloop_ctx(module, optimizer, track_higher_grads=track) as (fmodel, diffopt):
            fmodel.update_params([params["w"], params["b"]])
            for _ in range(3):
                diffopt.step(((fmodel(support[0]) - support[1]) ** 2).mean())
            w, b = fmodel.parameters()
            return {"w": w, "b": b}

    return own


@pytest.mark.parametrize("own", [by_hand(), functional, with_higher(True)], ids=["by hand", "torch.func", "higher"])
def test_a_loop_of_ones_own(own: Any) -> None:
    check_meta_grads(small, *small_problem(), adapt=own, optimizer=optim.sgd(lr=0.1), steps=3, entries=1)
    torch_sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    check_meta_grads(small, *small_problem(), adapt=own, optimizer=torch_sgd, steps=3, entries=1)


def test_a_first_order_loop_of_ones_own() -> None:
    own = by_hand(create_graph=False)
    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3, "entries": 1}
    check_meta_grads(small, *small_problem(), adapt=own, gradient=FirstOrder(), **options)
    with pytest.raises(AssertionError, match="derivative by autograd is wrong"):
        check_meta_grads(small, *small_problem(), adapt=by_hand(), gradient=FirstOrder(), **options)


def test_a_meta_gradient_of_ones_own() -> None:
    def own(params: Any, support: Any, query: Any) -> Any:
        return torch.func.grad(lambda p: small(functional(p, support), query))(params)

    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3}
    check_meta_grads(small, *small_problem(), grads=own, order=2, **options)

    def first(params: Any, support: Any, query: Any) -> Any:
        return torch.func.grad(small)({name: p.detach() for name, p in functional(params, support).items()}, query)

    with pytest.raises(AssertionError, match=r"by `grads` is wrong[\s\S]*equals the first-order gradient"):
        check_meta_grads(small, *small_problem(), grads=first, **options)


# Mistakes ------------------------------------------------------------------------------------------------------------


def lost_in(loss: Any) -> Any:
    return {"loss": loss, "optimizer": optim.sgd(lr=0.1), "steps": 2}


def cut(name: str) -> Any:
    """An optimizer that loses the gradient of one hyperparameter."""
    whole = optim.sgd(lr=torch.tensor(0.1), momentum=torch.tensor(0.9))

    def step(params: Any, grads: Any, state: Any) -> Any:
        given = state.hyperparameters
        params, new = whole.step(params, grads, state._replace(hyperparameters={**given, name: given[name].detach()}))
        return params, new._replace(hyperparameters=given)

    return optim.Optimizer(whole.init, step)


def no_grad_step(params: Any, support: Any) -> Any:
    found = torch.autograd.grad(small(params, support), list(params.values()), create_graph=True)
    with torch.no_grad():
        return {name: p - 0.1 * g for (name, p), g in zip(params.items(), found, strict=True)}


WEIGHT = torch.tensor([0.5, 2.0, 1.5])


def weighted(params: Any, batch: Any, weight: Tensor) -> Tensor:
    return ((torch.tanh(batch[0] @ params["w"]) * params["b"] - batch[1]) ** 2 * weight[: len(batch[1])]).mean()


def cut_in_the_inner_loop(weight: Tensor) -> Callable[[Any, Any], Any]:
    """Reads the weight, and loses it when it recomputes."""

    def own(params: Any, support: Any) -> Any:
        return by_hand(lambda p, b: weighted(p, b, weight * 0 + weight.detach()))(params, support)

    return own


MISTAKES: dict[str, tuple[Callable[[], dict[str, Any]], list[str]]] = {
    "create_graph": (
        lambda: {"adapt": by_hand(create_graph=False)},
        ["leaf `params.b`", "`create_graph=True`, which is missing", "reproduce: check_meta_grads(small, {'w': torch"],
    ),
    "detached gradients": (lambda: {"adapt": by_hand(change=torch.detach)}, ["is wrong", "cuts the graph"]),
    "detach in the loss": (
        lambda: lost_in(lambda p, b: small({**p, "w": p["w"] * p["w"].detach()}, b)),
        ["leaf `params.b`", "as soon as `.detach()` and `.data` in the function cut nothing"],
    ),
    "no_grad": (lambda: {"adapt": no_grad_step}, ["leaf `params.b`", "`torch.no_grad()`"]),
    "off by one": (
        lambda: {"adapt": by_hand(steps=2), "optimizer": optim.sgd(lr=0.1), "steps": 3},
        ["it has taken 2 steps, not 3", "leaf `b`", "a plain loop"],
    ),
    "another rate": (
        lambda: {"adapt": by_hand(lr=0.11), "optimizer": torch.optim.SGD, "steps": 3},
        ["the adapted parameters are wrong: leaf `b`"],
    ),
    "lr": (lambda: {"optimizer": cut("lr"), "steps": 2}, ["leaf `hyperparameters.lr`", "autograd 0,", "cuts"]),
    "momentum": (lambda: {"optimizer": cut("momentum"), "steps": 2}, ["leaf `hyperparameters.momentum`"]),
    "a closed-over tensor": (
        lambda: {"adapt": cut_in_the_inner_loop(WEIGHT.clone().requires_grad_()), "entries": 1},
        ["leaf `closed.0 of shape (3,)`", "autograd 0,"],
    ),
    "truncation": (
        lambda: (
            {"adapt": lambda p, b: by_hand(steps=1)({k: v.detach().requires_grad_() for k, v in p.items()}, b)}
            | {"optimizer": optim.sgd(lr=0.1), "steps": 1, "gradient": FirstOrder()}
        ),
        ["leaf `params.b`", "autograd 0,"],
    ),
    "higher": (lambda: {"adapt": with_higher(False)}, ["leaf `params.b`", "track_higher_grads=False"]),
    "noise": (lambda: {"adapt": by_hand(change=lambda g: g * torch.rand(()))}, ["not deterministic"]),
    "in place": (
        lambda: {"adapt": lambda p, b: by_hand()({k: v.detach().mul_(2).requires_grad_() for k, v in p.items()}, b)},
        ["`adapt` changes its input: leaf `params.b`"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_named(name: str) -> None:
    options, words = MISTAKES[name]
    given = {"loss": small, **options()}
    with pytest.raises(AssertionError) as caught:
        check_meta_grads(given.pop("loss"), *small_problem(), **given)
    for word in words:
        assert word in str(caught.value)


def test_closed_over_tensors_are_reached_and_left_as_they_were() -> None:
    params, support, query = small_problem()
    weight, rate = WEIGHT.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    loss = lambda p, b: weighted(p, b, weight)
    for mode in (None, Unroll(checkpoint_every=1), Unroll(truncate=1), FirstOrder()):
        optimizer = optim.sgd(lr=lambda step: rate * 0.9**step)
        check_meta_grads(loss, params, support, query, optimizer=optimizer, steps=2, gradient=mode, entries=1)
    assert torch.equal(weight, WEIGHT)
    assert rate.grad is None
    assert weight.grad is None
    body = torch.tanh(weight)  # made before: what it was made from is none of the loop's business
    check_meta_grads(lambda p, b: weighted(p, b, body), params, support, adapt=by_hand(), entries=1)
    body.sum().backward()


def test_a_module() -> None:
    apply, params, buffers = stateless(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)))
    loss = lambda p, batch: F.mse_loss(apply(p, buffers, batch[0])[0], batch[1])
    check_meta_grads(loss, params, regression_batch(), regression_batch(), optimizer=optim.sgd(lr=0.1), steps=2)
    assert all(p.grad is None for p in params.values())


def test_an_mlp_with_adam() -> None:
    check_meta_grads(regression, mlp(), regression_batch(), optimizer=optim.adam(lr=0.1), steps=2, entries=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs an inner loop"),
        ({"optimizer": optim.sgd(lr=0.1)}, "go together"),
        ({"steps": 1, "adapt": by_hand()}, "go together"),
        ({"optimizer": 3, "steps": 1}, "is no optimizer"),
        ({"optimizer": lambda p: torch.optim.SGD(p), "steps": 1}, "a pure function"),
        ({"adapt": by_hand(), "gradient": FirstOrder()}, "a pure function"),
        ({"optimizer": optim.sgd(lr=0.1), "steps": 1, "gradient": FirstOrder(), "order": 2}, "no derivative"),
        ({"optimizer": optim.sgd(lr=0.1), "steps": 1, "gradient": Unroll}, "is not a mode"),
        ({"optimizer": optim.sgd(lr=0.1), "steps": 1, "kinks": "no"}, "kinks"),
    ],
)
def test_misuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(HyperparameterError, match=words):
        check_meta_grads(small, *small_problem(), **options)
