"""The rules of losses and layers: torch's own numbers, every derivative, one task or many, with every option."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import Call, Make, check_as_torch, check_second_order, check_tasks, close, flags, gradients, ruled
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from statelessify import stateless

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

reductions = st.sampled_from(["none", "mean", "sum"])


class Case(NamedTuple):
    call: Call
    make: Make


def check(case: Case, mapped: list[bool]) -> None:
    check_as_torch(case.call, case.make())
    check_tasks(case.call, case.make, mapped)


# ---------------------------------------------------------------- margin losses


@st.composite
def multi_margins(draw: st.DrawFn) -> Case:
    rows, classes = draw(st.sampled_from([(), (1,), (3,)])), draw(st.integers(1, 4))
    weighted, grid = draw(st.booleans()), draw(st.booleans())
    old = draw(st.sampled_from([{}, {"size_average": False}, {"reduce": False}, {"size_average": True}]))
    options = {"p": draw(st.sampled_from([1, 2])), "margin": draw(st.sampled_from([1.0, 0.3, -0.5, 2]))}
    options |= {"reduction": draw(reductions), **old}

    def make() -> tuple[Tensor, ...]:
        x = torch.randint(-2, 3, (*rows, classes)) / 2.0 if grid else torch.randn(*rows, classes)
        return x, torch.randint(classes, rows), torch.rand(classes)

    def call(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        # The weights of torch's own loss have no gradient.
        return F.multi_margin_loss(x, y, weight=weight.detach() if weighted else None, **options)

    return Case(call, make)


@given(multi_margins(), flags(3))
def test_multi_margin_loss(case: Case, mapped: list[bool]) -> None:
    check(case, mapped)


@st.composite
def multilabel_margins(draw: st.DrawFn) -> Case:
    rows, classes = draw(st.sampled_from([(), (1,), (3,)])), draw(st.integers(1, 5))
    reduction, grid = draw(reductions), draw(st.booleans())

    def make() -> tuple[Tensor, ...]:
        x = torch.randint(-2, 3, (*rows, classes)) / 2.0 if grid else torch.randn(*rows, classes)
        return x, torch.randint(-1, classes, (*rows, classes))  # labels repeated, and some after the -1 that ends them

    return Case(lambda x, y: F.multilabel_margin_loss(x, y, reduction=reduction), make)


@given(multilabel_margins(), flags(2))
def test_multilabel_margin_loss(case: Case, mapped: list[bool]) -> None:
    check(case, mapped)


def test_margins_have_torchs_slope_at_the_kink() -> None:
    x, y = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1])
    check_as_torch(lambda x: F.multi_margin_loss(x, y), [x])
    check_as_torch(lambda x: F.multilabel_margin_loss(x, torch.tensor([[1, -1, -1]])), [x])


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.multi_margin_loss(torch.randn(3, 4), torch.tensor([1])),
        lambda: F.multi_margin_loss(torch.randn(3, 4), torch.tensor([1, 2, 4])),
        lambda: F.multi_margin_loss(torch.randn(3, 4), torch.tensor([1, 2, 3]), p=3),
        lambda: F.multi_margin_loss(torch.randn(3, 4), torch.tensor([1, 2, 3]), reduction="max"),
        lambda: F.gaussian_nll_loss(torch.randn(3), torch.randn(3), torch.tensor([1.0, -1.0, 1.0])),
        lambda: F.gaussian_nll_loss(torch.randn(3), torch.randn(3), -1.0),
        lambda: F.gaussian_nll_loss(torch.randn(3, 4), torch.randn(3, 4), torch.rand(2)),
        lambda: F.gaussian_nll_loss(torch.randn(3, 4), torch.randn(3, 4), torch.rand(3), reduction="max"),
        lambda: F.ctc_loss(torch.randn(4, 2, 3), torch.ones(2, 2).long(), (4, 4), (2, 2), reduction="max"),
    ],
)
def test_what_torch_refuses_is_refused(call: Any) -> None:
    for run in (call, ruled(call)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            run()


# ---------------------------------------------------------------- Gaussian negative log-likelihood


@st.composite
def gaussians(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    shapes = {"full": shape, "without the last": shape[:-1], "last of one": (*shape[:-1], 1)}
    shapes["first of one"] = (1, *shape[1:])
    of_var = shapes[draw(st.sampled_from(list(shapes)))]
    number, small = draw(st.sampled_from([None, 0.7, 1e-9])), draw(st.booleans())
    options = {"full": draw(st.booleans()), "eps": draw(st.sampled_from([1e-6, 0.1])), "reduction": draw(reductions)}

    def make() -> tuple[Tensor, ...]:
        return torch.randn(shape), torch.randn(shape), torch.rand(of_var) * (1e-8 if small else 1) + 1e-9

    def call(x: Tensor, y: Tensor, var: Tensor) -> Tensor:
        return F.gaussian_nll_loss(x, y, var if number is None else number, **options)

    return Case(call, make)


@given(gaussians(), flags(3))
def test_gaussian_nll_loss(case: Case, mapped: list[bool]) -> None:
    # With a variance of 1e-6 (the bound) the loss is large, and so is its rounding error.
    check_as_torch(case.call, case.make(), 1e-8)
    check_tasks(case.call, case.make, mapped, 1e-8)


def test_a_negative_variance_of_one_task_is_refused() -> None:
    x, var = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    call = ruled(lambda x, var: F.gaussian_nll_loss(x, x, var))
    with pytest.raises(ValueError, match="negative"):
        vmap(call)(x, var)
    with pytest.raises(ValueError, match="negative"):
        grad(lambda v: vmap(call)(x, v).sum())(var)


# ---------------------------------------------------------------- linear cross-entropy


@st.composite
def linear_cross_entropies(draw: st.DrawFn) -> tuple[Case, Any]:
    chunked = nn.LinearCrossEntropyOptions(batch_chunk_size=draw(st.sampled_from([None, 1, 2])))
    bias, weighted, probabilities = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    options = {"reduction": draw(st.sampled_from(["mean", "sum"])), "label_smoothing": draw(st.sampled_from([0, 0.2]))}
    if not probabilities and draw(st.booleans()):
        options["ignore_index"] = 0

    def make() -> tuple[Tensor, ...]:
        y = torch.randn(4, 5).softmax(-1) if probabilities else torch.tensor([0, 1, 2, 4])[torch.randperm(4)]
        return torch.randn(4, 3), torch.randn(5, 3), torch.randn(5), y, torch.rand(5)

    def call(x: Tensor, w: Tensor, b: Tensor, y: Tensor, v: Tensor, path: Any = chunked) -> Tensor:
        more = {"linear_bias": b if bias else None, "weight": v.detach() if weighted else None, "options": path}
        return F.linear_cross_entropy(x, w, y.detach(), **more, **options)

    return Case(call, make), lambda *args: call(*args, path=None)


@given(linear_cross_entropies(), flags(3))
@pytest.mark.filterwarnings("ignore:.*chunk.*:UserWarning")
def test_linear_cross_entropy_in_chunks(drawn: tuple[Case, Any], mapped: list[bool]) -> None:
    (call, make), whole = drawn
    args = make()
    expected = gradients(whole, args)
    close(gradients(call, args), expected)  # that the two paths are one function, torch says itself
    for when in ("always", "transforms"):
        close(gradients(ruled(call, when), args), expected)
    x, tangent = args[0], torch.randn(4, 3)
    run = lambda x: ruled(call)(x, *args[1:])
    close(jvp(run, (x,), (tangent,))[1], (grad(lambda x: whole(x, *args[1:]))(x) * tangent).sum())
    tasks = [make() for _ in range(2)]
    mapped = [True, *mapped, True]  # torch's own cross-entropy wants the input per task where the targets are
    stacked = [torch.stack(c) if m else c[0] for c, m in zip(zip(*tasks, strict=True), mapped, strict=True)]
    in_dims = tuple(0 if m else None for m in mapped)
    rows = [[t[i] if m else t for t, m in zip(stacked, mapped, strict=True)] for i in range(2)]
    close(vmap(ruled(call), in_dims)(*stacked), torch.stack([whole(*row) for row in rows]))


@given(linear_cross_entropies())
@pytest.mark.filterwarnings("ignore:.*chunk.*:UserWarning")
def test_second_order_of_linear_cross_entropy_in_eager_code(drawn: tuple[Case, Any]) -> None:
    """Also where the weight is tied to the input, so that one argument depends on another."""
    (call, make), whole = drawn
    x, w, b, y, v = make()
    found = []
    for run in (ruled(call, "always"), whole):
        tied = lambda w, b, run=run: run((w[:4] + x).sin(), w, b, y, v)
        leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
        value = tied(*leaves)
        first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        total = sum((g.sin().sum() for g in first), torch.zeros(()))
        second = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append((value, first, second))
    close(found[0], found[1])


# ---------------------------------------------------------------- rrelu and normalize


@given(st.booleans(), st.sampled_from([(1 / 8, 1 / 3), (0.2, 0.2), (0.0, 1.0)]), st.booleans())
def test_rrelu(training: bool, bounds: tuple[float, float], inplace: bool) -> None:
    """In evaluation torch's own; in training each negative entry of each task has a slope of its own."""
    call = ruled(lambda x: F.rrelu(x * 1, *bounds, training, inplace))
    x = torch.randn(3, 7)
    out = vmap(call, randomness="different")(x)
    if not training:
        close(out, F.rrelu(x, *bounds))
        close(vmap(lambda x: functional(call, x))(x), torch.where(x > 0, 1.0, sum(bounds) / 2))
        return
    slopes = (out / x)[x < 0]
    assert torch.equal(out[x > 0], x[x > 0])
    assert bool(((slopes > bounds[0] - 1e-12) & (slopes < bounds[1] + 1e-12)).all())
    assert bounds[0] == bounds[1] or len(slopes.unique()) == len(slopes)
    torch.manual_seed(1)
    first = vmap(call, randomness="different")(x)
    torch.manual_seed(1)
    close(vmap(lambda x: functional(call, x), randomness="different")(x), first / x)
    same = vmap(call, randomness="same")(x[:1].expand(3, 7))
    assert torch.equal(same, same[:1].expand(3, 7))
    with pytest.raises(RuntimeError, match="random"):
        vmap(call, randomness="error")(x)


def functional(call: Call, x: Tensor) -> Tensor:
    return grad(lambda x: call(x).sum())(x)


@given(st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from([0, 1, -1]), st.sampled_from([1e-12, 10.0]), st.booleans())
def test_normalize(p: float, dim: int, eps: float, with_out: bool) -> None:
    def call(x: Tensor) -> Tensor:
        if not with_out:
            return F.normalize(x, p, dim, eps)
        out = torch.zeros_like(x)
        given = F.normalize(x, p, dim, eps, out=out)
        assert given is out
        return out

    x = torch.randn(3, 4, 2)
    expected = torch.stack([F.normalize(each, p, dim, eps) for each in x])
    close(vmap(ruled(call))(x), expected)
    if not with_out:
        check_as_torch(call, [x[0]])


@pytest.mark.parametrize("bound", [False, True])
def test_spectral_norm_over_tasks(bound: bool) -> None:
    """Its old form is a hook, which computes with `out=`."""
    apply, params, buffers = stateless(nn.utils.spectral_norm(nn.Linear(3, 4)), params="detach")
    many = {name: torch.stack([p, 2 * p, p - 1]).detach() for name, p in params.items()}
    x = torch.randn(2, 3)

    def call(params: Any) -> Tensor:
        return apply.bind(params, buffers)(x) if bound else apply(params, buffers, x)[0]

    rows = [apply({name: p[i] for name, p in many.items()}, buffers, x)[0] for i in range(3)]
    close(vmap(call)(many), torch.stack(rows))


def test_second_order_of_the_losses() -> None:
    y = torch.tensor([1, 0, 3])
    for p in (1, 2):
        check_second_order(lambda x, p=p: F.multi_margin_loss(x, y, p), [torch.randn(3, 4)])
    check_second_order(F.gaussian_nll_loss, [torch.randn(3), torch.randn(3), torch.rand(3) + 0.1])
    labels = torch.tensor([[1, 2, -1, 0], [0, -1, -1, -1]])
    check_second_order(lambda x: F.multilabel_margin_loss(x, labels), [torch.randn(2, 4)])
    check_second_order(lambda x: F.normalize(x), [torch.randn(3, 4)])
