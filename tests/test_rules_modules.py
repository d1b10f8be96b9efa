"""The rules of modules that branch on values, and what stands in a module's slots: it is known as a parameter."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import check_as_torch, check_second_order, check_tasks, close, flags
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from statelessify import adapt, adapt_tasks, optim, stateless

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

# ---------------------------------------------------------------- adaptive log-softmax


@st.composite
def softmaxes(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    cutoffs = draw(st.sampled_from([[1], [3], [2, 4], [1, 2, 5]]))
    div_value, head_bias = draw(st.sampled_from([1.0, 2.0])), draw(st.booleans())
    module = nn.AdaptiveLogSoftmaxWithLoss(8, 6, cutoffs, div_value, head_bias)
    return module, draw(st.sampled_from([(), (1,), (4,)]))


@given(softmaxes(), flags(3), st.booleans())
def test_adaptive_log_softmax(drawn: tuple[nn.Module, tuple[int, ...]], mapped: list[bool], loss: bool) -> None:
    module, rows = drawn
    apply, params, buffers = stateless(module)
    names = list(params)

    def make() -> tuple[Tensor, ...]:
        return torch.randn(*rows, 8), torch.randint(6, rows), *[torch.randn_like(p) for p in params.values()]

    def call(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        ours = torch._C._len_torch_function_stack()  # `ruled` has a mode, and `apply` has its own skeleton
        out = apply(given, buffers, x, y)[0] if ours else functional_call(module, given, (x, y))
        return out.loss if loss else out.output

    check_as_torch(call, make())
    x, y, weights = mapped
    check_tasks(call, make, [x, y, *[weights] * len(names)])


def test_second_order_of_adaptive_log_softmax() -> None:
    module = nn.AdaptiveLogSoftmaxWithLoss(5, 6, [2, 4], 2.0)
    apply, params, buffers = stateless(module)
    y = torch.tensor([0, 3, 5, 2])

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(params, weights, strict=True))
        ours = torch._C._len_torch_function_stack()
        return (apply(given, buffers, x, y)[0] if ours else functional_call(module, given, (x, y))).loss

    check_second_order(call, [torch.randn(4, 5), *params.values()])


@pytest.mark.parametrize(
    ("x", "y"), [((4, 5), (3,)), ((4, 5), ()), ((5,), (1,)), ((2, 4, 5), (2, 4)), ((4, 6), (4,)), ((4, 5), (4, 1))]
)
def test_shapes_that_adaptive_log_softmax_refuses(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    apply, params, buffers = stateless(nn.AdaptiveLogSoftmaxWithLoss(5, 6, [2, 4], 2.0))
    given = (torch.randn(2, *x), torch.zeros(2, *y, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        apply(params, buffers, given[0][0], given[1][0])
    with pytest.raises(RuntimeError):
        vmap(lambda x, y: apply(params, buffers, x, y)[0].loss)(*given)


# ---------------------------------------------------------------- deep copies


class Copies(nn.Module):
    """Computes with copies of a part that has one weight in two places, and of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.copies: list[Any] = []

    def forward(self, x: Tensor, keep: list[Any] | None = None) -> Tensor:
        both = copy.deepcopy(nn.ModuleList([self.first, self.last]))
        weight = copy.deepcopy(self.first.weight)
        if keep is not None:
            keep += [both, weight]
        return both[1](both[0](x)) @ weight + self.first(x)


def test_deep_copies_of_substituted_parameters() -> None:
    """As of a module's own: leaves, that pass no gradient on."""
    module = Copies()
    apply, params, buffers = stateless(module, params="detach")
    x, keep = torch.randn(2, 3), []
    fast = {name: p * 1.5 for name, p in params.items()}  # not leaves, which torch refuses to copy
    for own in (params, fast, {name: p.detach() for name, p in fast.items()}):
        keep.clear()
        out, _ = apply(own, buffers, x, keep)
        both, weight = keep
        assert both[0].weight is both[1].weight
        assert type(weight) is nn.Parameter or isinstance(weight, nn.Parameter)
        assert weight.is_leaf
        assert weight.requires_grad == own["first.weight"].requires_grad
        assert weight.data_ptr() != own["first.weight"].data_ptr()
        plain = {name: p.detach().requires_grad_() for name, p in own.items()}
        close(out.detach(), functional_call(module, plain, (x,)).detach())
    out = apply(fast, buffers, x)[0]
    expected = torch.autograd.grad(module.first(x).sum(), list(module.first.parameters()))
    found = torch.autograd.grad(out.sum(), [fast["first.weight"], fast["first.bias"]])
    close(found, expected)


def test_deep_copies_under_transforms_and_in_the_inner_loop() -> None:
    module = Copies()
    apply, params, buffers = stateless(module, params="detach")
    x = torch.randn(2, 3)
    many = {name: torch.stack([p, 2 * p, p - 1]).detach() for name, p in params.items()}
    rows = [{name: p[index] for name, p in many.items()} for index in range(3)]
    call = lambda p: apply(p, buffers, x)[0]
    expected = torch.stack([functional_call(module, row, (x,)) for row in rows])
    close(vmap(call)(many), expected)
    slopes = vmap(grad(lambda p: call(p).sum()))(many)
    close(slopes["first.weight"], torch.ones(2, 3).mT.matmul(x).expand(3, 3, 3))
    close(jvp(call, (rows[0],), (rows[1],))[1], x @ rows[1]["first.weight"].mT + rows[1]["first.bias"])
    run: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 2}
    loss = lambda p, x: apply(p, buffers, x)[0].square().sum()
    together = adapt_tasks(loss, params, torch.stack([x, x.sin()]), **run)
    for index, each in enumerate((x, x.sin())):
        close({k: p[index] for k, p in together.params.items()}, adapt(loss, params, each, **run).params)


# ---------------------------------------------------------------- parameters


class Looks(nn.Module):
    """Notes whether what it meets in its slots is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.seen: list[Any] = []

    def forward(self, x: Tensor, seen: list[Any]) -> Tensor:
        seen.append([isinstance(t, nn.Parameter) for t in (self.weight, self.frozen, self.mean)])
        seen.append([name for name, _ in self.named_parameters()])
        return (x * self.weight + self.frozen + self.mean).sum()


@pytest.mark.parametrize("policy", ["alias", "clone", "detach"])
def test_what_stands_for_a_parameter_is_one(policy: Any) -> None:
    module, x = Looks(), torch.randn(3)
    apply, params, buffers = stateless(module, params=policy)
    seen: list[Any] = []
    fast = {"weight": params["weight"] * 2}
    for own in (params, fast, {"weight": torch.zeros(3)}, {"weight": torch.zeros(3).requires_grad_()}):
        for _ in range(2):
            new_buffers = apply(own, buffers, x, seen)[1]
            assert all(new_buffers[name] is buffers[name] for name in ("frozen", "mean"))
    call = lambda p, x=x: apply(p, buffers, x, seen)[0]
    many = {"weight": torch.randn(4, 3)}
    ways: list[Any] = [
        lambda: vmap(call)(many),
        lambda: grad(call)({"weight": torch.zeros(3)}),
        lambda: vmap(grad(call))(many),
        lambda: grad(lambda p: vmap(call)(p).sum())(many),
        lambda: jvp(call, (fast,), (fast,)),
        lambda: vmap(lambda x: call(params, x))(torch.randn(4, 3)),
        lambda: adapt(lambda p, x: call(p, x), params, x, optimizer=optim.sgd(lr=0.1), steps=2),
        lambda: apply.bind(params, buffers)(x, seen),
        lambda: torch.inference_mode()(lambda: call(params))(),
    ]
    for way in ways:
        way()
    assert [each for each in seen if each and isinstance(each[0], bool)] == [[True, True, False]] * (8 + len(ways) + 1)
    assert all(each == ["weight", "frozen"] for each in seen if each and isinstance(each[0], str))
    for tensor in (*fast.values(), *many.values(), x, buffers["mean"]):  # nothing is left on the caller's tensors
        assert not hasattr(tensor, "_is_param")
        assert not isinstance(tensor, nn.Parameter)
    assert isinstance(params["weight"], nn.Parameter) == (policy == "alias")


def test_returned_parameters_are_the_callers() -> None:
    """What a call gives back in `new_buffers` is what went in, also where a plain tensor stood for a parameter."""
    apply, params, buffers = stateless(Looks(), buffers="clone")
    for own, rest in ((params, buffers), ({}, {**buffers, **params})):
        for _ in range(2):
            new_buffers = apply(own, rest, torch.randn(3), [])[1]
            assert new_buffers.keys() == rest.keys()
            assert all(new_buffers[name] is rest[name] for name in rest)
            assert not any(hasattr(t, "_is_param") for t in rest.values() if type(t) is Tensor)


@pytest.mark.parametrize("policy", ["alias", "detach"])
def test_gradients_of_sparse_embeddings_stay_sparse(policy: Any) -> None:
    module = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    apply, params, buffers = stateless(module, params=policy)
    index = torch.tensor([1, 3, 1])
    for _ in range(2):  # the first call computes with clones, the others with aliases
        (found,) = torch.autograd.grad(apply(params, buffers, index)[0].sum(), params["0.weight"])
        assert found.is_sparse
        (expected,) = torch.autograd.grad(module(index).sum(), module[0].weight)
        close(found.to_dense(), expected.to_dense())
    apply(params, buffers, index)[0].sum().backward()
    assert params["0.weight"].grad.is_sparse


def test_gradients_reach_leaves_through_hooks() -> None:
    """An alias is in the graph of what it stands for: `.backward()`, hooks and `.grad` are as they were."""
    apply, params, buffers = stateless(nn.Linear(3, 2), params="detach")
    seen: list[Tensor] = []
    params["weight"].register_hook(seen.append)
    for _, again in itertools.product(range(2), (False, True)):
        params["weight"].grad = None
        apply(params, buffers, torch.ones(3))[0].sum().backward(retain_graph=again)
        close(params["weight"].grad, torch.ones(2, 3))
    close(seen, [torch.ones(2, 3)] * 4)
