"""`apply` under vmap, grad, jvp, jacrev, second order and torch.compile; `apply.bind`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close
from zoo import ZOO, Member, fingerprint, members, perturbed, tensors_in, total
from zoo_modules import MLP, EmptySlots, Fails, Norms
from zoo_refused import WritesParameter

from statelessify import stateless, tree_stack

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward-mode rules are scripted when they are first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def ensemble_of(params: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    return [{k: v.detach() for k, v in perturbed(params).items()} for _ in range(count)]


def close(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-10, check_stride=False)


# ---------------------------------------------------------------- one level


@pytest.mark.parametrize("make", [Norms, EmptySlots, MLP])
def test_jvp_and_jacrev_with_the_buffers_as_aux(make: Callable[[], nn.Module]) -> None:
    apply, params, buffers = stateless(make(), params="detach")
    x = torch.randn(4, 3, 5) if make is Norms else torch.randn(4, 3)
    out, new_buffers = apply(params, buffers, x)
    jacobian, aux = jacrev(apply, has_aux=True)(params, buffers, x)
    close(aux, new_buffers)
    direction = {k: torch.randn_like(v) for k, v in params.items()}
    value, tangent, aux = jvp(lambda p: apply(p, buffers, x), (params,), (direction,), has_aux=True)
    close([value, aux], [out, new_buffers])
    pushed = sum(torch.tensordot(jacobian[k], direction[k], direction[k].ndim) for k in params)
    close(tangent, pushed)
    weight = next(iter(params))
    loss = lambda w: total(apply({**params, weight: w}, buffers, x)[0])
    assert torch.autograd.gradcheck(loss, params[weight])


def test_norm_statistics_per_task_nested_twice() -> None:
    apply, params, buffers = stateless(Norms())
    xs = torch.randn(2, 3, 4, 3, 5)
    out, new_buffers = vmap(vmap(apply, in_dims=(None, None, 0)), in_dims=(None, None, 0))(params, buffers, xs)
    for i, j in [(0, 0), (1, 2)]:
        expected, one = apply(params, buffers, xs[i, j])
        close(out[i, j], expected)
        close({k: v[i, j] for k, v in new_buffers.items()}, one)


# ---------------------------------------------------------------- second order


class Functional(nn.Module):
    """Calls a norm as a function, as users' own modules do."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, (4,))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(4),
    "batch": lambda: nn.BatchNorm1d(4),
    "batch in eval": lambda: nn.BatchNorm1d(4).eval(),
    "batch without statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instance": lambda: nn.Sequential(nn.Unflatten(-1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(4),
    "F.layer_norm": lambda: Functional(F.layer_norm),
    "torch.layer_norm": lambda: Functional(torch.layer_norm),
}
THROUGH = [(norm, through) for norm in NORMS for through in ("func.grad", "backward")]
THROUGH += [(norm, "compiled") for norm in ("layer", "batch without statistics")]


def meta_loss(apply: Any, buffers: Any, params: Any, x: Tensor) -> Tensor:
    inner = lambda p: total(apply(p, buffers, x)[0].sin())
    adapted = {k: params[k] - 0.1 * g for k, g in grad(inner)(params).items()}
    return inner(adapted)


@pytest.mark.parametrize(("norm", "through"), THROUGH)
def test_grad_of_vmap_of_grad_through_norms_equals_a_loop(norm: str, through: str) -> None:
    """Plain torch is silently wrong here by up to 1e-1."""
    torch.compiler.reset()
    apply, params, buffers = stateless(nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Linear(4, 2)), params="detach")
    xs = torch.randn(3, 5, 3)

    def many(params: Any) -> Tensor:
        return vmap(lambda p, x: meta_loss(apply, buffers, p, x), in_dims=(None, 0))(params, xs).sum()

    expected = {k: torch.zeros_like(v) for k, v in params.items()}
    for x in xs:
        value = total(apply(params, buffers, x)[0].sin())
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        adapted = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads, strict=True)}
        outer = torch.autograd.grad(total(apply(adapted, buffers, x)[0].sin()), list(params.values()))
        expected = {k: e + g for (k, e), g in zip(expected.items(), outer, strict=True)}
    if through == "backward":
        many(params).backward()
        found = {k: p.grad for k, p in params.items()}
    else:
        gradient = grad(many)
        if through == "compiled":
            gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
        found = gradient({k: p.detach() for k, p in params.items()})
    close(found, expected)


@pytest.mark.parametrize("name", ["mlp", "norms", "tied", "empty_slots", "complex"])
def test_hessians_agree_with_double_backward(name: str) -> None:
    member = ZOO[name]
    apply, params, buffers = stateless(member.make(), params="detach")
    x, first = member.inputs(), next(iter(params))
    if params[first].is_complex():
        params = {k: v.real.detach().requires_grad_() for k, v in params.items()}
    loss = lambda w: total(apply({**params, first: w}, buffers, x)[0]) ** 2
    close(hessian(loss)(params[first].detach()), torch.autograd.functional.hessian(loss, params[first]))


def test_functional_call_agrees_under_transforms() -> None:
    module = MLP()
    apply, params, buffers = stateless(module, params="detach")
    x = torch.randn(4, 3)
    ours = grad(lambda p: grad(lambda q: total(apply(q, buffers, x)[0]) ** 2)(p)["0.weight"].sum())(params)
    theirs = grad(lambda p: grad(lambda q: total(functional_call(module, q, (x,))) ** 2)(p)["0.weight"].sum())(params)
    close(ours, theirs)


def test_torch_vmap_of_apply_with_none_slots() -> None:
    apply, params, buffers = stateless(EmptySlots())
    stacked = tree_stack(ensemble_of(params, 3))
    out, new_buffers = torch.vmap(apply)(stacked, buffers, torch.randn(3, 4, 3))
    assert (out.shape, new_buffers["cache"].shape) == ((3, 4, 2), (3,))
    torch.vmap(apply)(stacked, new_buffers, torch.randn(3, 4, 3))


# ---------------------------------------------------------------- a parameter that forward writes


@pytest.mark.parametrize("around", ["vmap of params", "vmap of inputs", "grad"])
def test_writing_into_a_parameter_is_an_error_under_transforms_too(around: str) -> None:
    apply, params, buffers = stateless(WritesParameter(), params="detach")
    given = {k: v.detach() for k, v in params.items()}
    loss = lambda p, x: apply(p, buffers, x)[0].sum()
    call = {
        "vmap of params": lambda: vmap(loss, in_dims=(0, None))(given, torch.ones(3)),
        "vmap of inputs": lambda: vmap(loss, in_dims=(None, 0))(given, torch.ones(2, 3)),
        "grad": lambda: grad(loss)(given, torch.ones(3)),
    }[around]
    if around == "vmap of params":
        given = tree_stack([given] * 2)
    before = fingerprint(given)
    for _ in range(2):
        with pytest.raises(RuntimeError):  # a `MutationError`, or torch's own for what the transform forbids
            call()
        assert fingerprint(given) == before


def test_compiled_code_writes_into_no_parameter_that_was_passed() -> None:
    torch.compiler.reset()
    apply, params, buffers = stateless(WritesParameter(), params="detach")
    given = {k: v.detach() for k, v in params.items()}
    before = fingerprint(given)
    compiled = torch.compile(lambda p, x: apply(p, buffers, x)[0], backend="aot_eager")
    for _ in range(2):
        with contextlib.suppress(RuntimeError):  # an error is welcome; dynamo cannot see every write
            compiled(given, torch.ones(3))
        assert fingerprint(given) == before


# ---------------------------------------------------------------- compile


@members(lambda m: m.compiles)
def test_compiled_calls_give_the_eager_numbers_each_time(member: Member) -> None:
    torch.compiler.reset()
    module = member.make()
    apply, params, buffers = stateless(module)
    x, before = member.inputs(), fingerprint(module)
    call = lambda p, b, x: apply(p, b, x, **member.kwargs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, expected_buffers = call(params, buffers, x)
    for _ in range(3):
        out, new_buffers = compiled(params, buffers, x)
        close([tensors_in(out), new_buffers], [tensors_in(expected), expected_buffers])
    out, new_buffers = call(params, buffers, x)
    close([tensors_in(out), new_buffers], [tensors_in(expected), expected_buffers])
    assert fingerprint(module) == before


@pytest.mark.parametrize("make", [EmptySlots, Fails])
def test_a_compiled_call_leaves_no_trace(make: Callable[[], nn.Module]) -> None:
    """Neither on a later compiled call, nor on an eager one, nor on a copy."""
    torch.compiler.reset()
    apply, params, buffers = stateless(make())
    x = torch.ones(4, 3)
    compiled = torch.compile(apply, backend="aot_eager")
    first = compiled(params, buffers, x)
    for call in (compiled, apply, apply.train(), compiled):
        close(call(params, buffers, x), first)


def test_vmap_of_grad_compiled_with_running_statistics() -> None:
    torch.compiler.reset()
    apply, params, buffers = stateless(Norms(), params="detach")
    xs = torch.randn(3, 4, 3, 5)
    loss = lambda p, x: (total((found := apply(p, buffers, x))[0]), found[1])
    call = vmap(grad(loss, has_aux=True), in_dims=(None, 0))
    close(torch.compile(call, fullgraph=True, backend="aot_eager")(params, xs), call(params, xs))


# ---------------------------------------------------------------- bind


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def embed(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.norm(self.body(x)), (4,))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_bind_gives_methods_and_submodules() -> None:
    module = Methods()
    apply, params, buffers = stateless(module)
    own, x = perturbed(params), torch.randn(5, 3)
    passed = [own, buffers]
    before, given = fingerprint(module), fingerprint(passed)
    bound = apply.bind(own, buffers)
    out, new_buffers = apply(own, buffers, x)
    close(bound(x), out)
    close({k: v.detach() for k, v in bound.named_buffers()}, new_buffers)
    fresh = apply.bind(own, buffers)
    close(fresh.head(fresh.embed(x)), out)
    close(bound.body(x), F.linear(x, own["body.weight"], own["body.bias"]))
    assert isinstance(bound, Methods)
    assert bound.training
    assert not apply.eval().bind(own, buffers).norm.training
    assert (fingerprint(module), fingerprint(passed)) == (before, given)


@pytest.mark.parametrize("what", ["method", "call", "submodules"])
def test_bind_under_vmap_and_grad_through_norms(what: str) -> None:
    apply, params, buffers = stateless(Methods(), params="detach")
    xs = torch.randn(3, 5, 3)

    def through(params: Any, x: Tensor) -> Tensor:
        bound = apply.bind(params, buffers)
        if what == "submodules":
            return bound.head(bound.norm(bound.body(x)))
        return bound(x) if what == "call" else bound.head(bound.embed(x))

    def meta(params: Any, x: Tensor) -> Tensor:
        inner = lambda p: total(through(p, x).sin())
        return inner({k: params[k] - 0.1 * g for k, g in grad(inner)(params).items()})

    found = grad(lambda p: vmap(meta, in_dims=(None, 0))(p, xs).sum())(params)
    one_by_one = [grad(meta)(params, x) for x in xs]
    close(found, {k: sum(g[k] for g in one_by_one) for k in params})
