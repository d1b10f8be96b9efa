"""Modules whose code is known: of which it is, and that the short way through a call is as right as the long one."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from zoo_modules import MLP

from statelessify import errors, stateless
from statelessify._known import conduct_of, may_meet_rules
from statelessify.rules import rule
from statelessify.rules._registry import FUNCTIONS, MODULES, RULES, rules

pytestmark = pytest.mark.usefixtures("float64")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "no bias": lambda: nn.Linear(4, 4, bias=False),
    "tanh": nn.Tanh,
    "in place": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "fixed norm": lambda: nn.BatchNorm1d(4).eval(),
    "cumulative norm": lambda: nn.BatchNorm1d(4, momentum=None),
    "no statistics": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
}


class Residual(nn.Module):
    """The user's own code, of the kind that only reads; it writes into what it has computed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x) * self.scale
        out += x
        return F.gelu(out)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 9)))
    layers = [LAYERS[name]() for name in names]
    if draw(st.booleans()):
        layers.append(layers[0])  # one part by two paths
    if isinstance(first := layers[0], nn.Linear) and draw(st.booleans()):
        layers.append(tied := nn.Linear(4, 4))
        tied.weight = first.weight
    net: nn.Module = nn.Sequential(*layers)
    return Residual(net) if draw(st.booleans()) else net


@given(networks(), st.booleans())
def test_agrees_with_functional_call(module: nn.Module, training: bool) -> None:
    """Values, buffers, first and second derivatives, of the module's own parameters and of fast weights."""
    module.train(training)
    apply, params, buffers = stateless(module)
    assert conduct_of(apply._skeletons.template) != "unknown"
    x = torch.randn(6, 4)
    for scale in (None, 1.1) * 2:
        new = lambda scale=scale: {name: p * scale for name, p in params.items()} if scale else params
        statistics = {name: b.clone() for name, b in buffers.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the one that has second derivatives
            # It leaves tensors in a part that two paths lead to (pytorch#164759): never twice the same module.
            expected = functional_call(copy.deepcopy(module), {**new(), **statistics}, (x,))
            wanted = derivatives(expected, params)
        out, new_buffers = apply(new(), buffers, x)
        assert_close(out, expected)
        assert_close(derivatives(out, params), wanted)
        assert_close(new_buffers, statistics)
        assert all((new_buffers[n] is b) == torch.equal(statistics[n], b) for n, b in buffers.items())


def derivatives(out: Tensor, params: dict[str, Tensor]) -> list[Tensor]:
    if not params:
        return []
    zeros: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(out.sin().sum(), list(params.values()), create_graph=True, **zeros)
    total = sum((g.square().sum() for g in first), torch.zeros(()))
    return [*first, *torch.autograd.grad(total, list(params.values()), **zeros)] if total.requires_grad else [*first]


@given(networks())
def test_transforms_agree_with_a_loop(module: nn.Module) -> None:
    apply, params, buffers = stateless(module.eval())
    xs = torch.randn(2, 3, 4)
    loss = lambda p, x: apply(p, buffers, x)[0].sin().sum()
    for _ in range(2):
        assert_close(vmap(loss, (None, 0))(params, xs), torch.stack([loss(params, x) for x in xs]))
        for name, found in grad(loss)(params, xs[0]).items():
            (expected,) = torch.autograd.grad(loss(params, xs[0]), params[name], allow_unused=True)
            assert_close(found, torch.zeros_like(found) if expected is None else expected)


# ---------------------------------------------------------------- nothing stays


@pytest.mark.parametrize("make", [MLP, lambda: Residual(nn.Linear(3, 3))])
def test_an_idle_skeleton_holds_no_tensor_of_a_call(make: Any) -> None:
    apply, params, buffers = stateless(make())
    fast = {name: p * 2 for name, p in params.items()}
    alive = [weakref.ref(tensor) for tensor in fast.values()]
    gc.disable()
    try:
        for _ in range(3):
            apply(fast, buffers, torch.ones(2, 3))
        with pytest.raises(TypeError):
            apply(fast, buffers, "no tensor")
        del fast
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_fast_weights_are_marked_for_the_time_of_the_call_only() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.same = self.weight

        def forward(self, x: Tensor, inner: Any, fail: bool = False) -> Tensor:
            assert isinstance(self.weight, nn.Parameter)
            out = inner() if inner else x
            assert isinstance(self.weight, nn.Parameter)  # also when a call with the same tensor has ended
            assert isinstance(copy.deepcopy(self.weight), nn.Parameter)
            if fail:
                raise KeyError("asked to fail")
            return out * self.weight

    apply, params, buffers = stateless(Looks())
    x = torch.ones(3)
    for fast in ({"weight": params["weight"] * 2}, {"weight": torch.ones(3)}):
        for _ in range(2):
            apply(fast, buffers, x, lambda fast=fast: apply(fast, buffers, x, None)[0])
            with pytest.raises(KeyError):
                apply(fast, buffers, x, None, fail=True)
            assert vars(fast["weight"]) == {}
        first_runs, second_runs = threading.Event(), threading.Event()
        with ThreadPoolExecutor(2) as pool:  # the first call ends while the second one runs
            first = pool.submit(apply, fast, buffers, x, lambda e=(first_runs, second_runs): e[0].set() or e[1].wait())
            first_runs.wait()
            second = lambda e=second_runs, first=first: e.set() or (first.result() and 1.0)
            assert_close(pool.submit(apply, fast, buffers, x, second).result()[0], fast["weight"])
        assert vars(fast["weight"]) == {}


def test_a_failed_call_leaves_nothing() -> None:
    module = MLP()
    apply, params, buffers = stateless(module)
    for _ in range(3):
        expected = module(torch.ones(2, 3))
        assert_close(apply(params, buffers, torch.ones(2, 3))[0], expected)
        with pytest.raises(RuntimeError):
            apply(params, buffers, torch.ones(2, 5))


def test_a_part_that_is_handed_out_computes_with_the_tensors_of_its_call() -> None:
    class Lends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Residual(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Any:
            return self.part, self.part(x)

    apply, params, buffers = stateless(Lends())
    x, late = torch.ones(2, 3), []
    assert conduct_of(apply._skeletons.template) == "only reads"
    for scale in (1.0, 2.0, 3.0):
        late.append(apply({name: p * scale for name, p in params.items()}, buffers, x)[0])
    for part, out in late:
        assert_close(part(x), out)
        part.inner.bias = None  # a module as any other: nothing hides what is bound anew
        assert_close(part.inner(x), x @ part.inner.weight.T)
        part.inner = None
        assert part.inner is None


def test_writing_into_a_parameter_in_a_later_call_is_an_error() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                if x.sum() > 0:
                    self.weight.mul_(2.0)
            return x * self.weight

    apply, params, buffers = stateless(Sometimes())
    assert conduct_of(apply._skeletons.template) == "only reads"
    for _ in range(2):
        apply(params, buffers, -torch.ones(3))
    with pytest.raises(errors.MutationError, match="`weight`"):
        apply({"weight": params["weight"] * 1.0}, buffers, torch.ones(3))


def test_global_hooks_are_watched() -> None:
    apply, params, buffers = stateless(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    x, seen = torch.ones(2, 3), []
    expected = apply(params, buffers, x)[0]
    hook = nn.modules.module.register_module_forward_hook(lambda part, args, out: seen.append(part))
    try:
        assert_close(apply(params, buffers, x)[0], expected)
    finally:
        hook.remove()
    assert_close(seen[-1](x), expected)  # what was kept computes with the tensors of its call
    seen.clear()
    assert_close(apply(params, buffers, x)[0], expected)
    assert not seen


def test_copies_and_pickles_find_out_for_themselves() -> None:
    apply, params, buffers = stateless(MLP())
    x = torch.ones(2, 3)
    expected = [apply(params, buffers, x)[0] for _ in range(2)][1]
    for other in (copy.deepcopy(apply), pickle.loads(pickle.dumps(apply)), apply.eval()):
        for _ in range(3):
            assert_close(other(params, buffers, x)[0], expected)


# ---------------------------------------------------------------- rules


class Sometimes(nn.Module):
    """Reaches a loss that has a wrong second derivative in some calls only, by a function of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return chunked(x, self.linear.weight, target) if x.sum() > 0 else self.linear(x).sum()


def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions(batch_chunk_size=2))


def test_a_branch_that_was_not_taken_has_its_rules_later() -> None:
    apply, params, buffers = stateless(Sometimes())
    assert may_meet_rules(apply._skeletons.template)
    x, target = torch.rand(5, 3), torch.tensor([0, 1, 2, 3, 0])
    for _ in range(2):
        apply(params, buffers, -x, target)
    found = derivatives(apply(params, buffers, x, target)[0], params)
    assert_close(found, derivatives(F.cross_entropy(F.linear(x, params["linear.weight"]), target), params))


def test_a_rule_that_comes_later_holds_too() -> None:
    class Erf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erf(x)

    apply, params, buffers = stateless(nn.Sequential(Erf(), nn.Softsign()))
    functions = {when: dict(calls) for when, calls in FUNCTIONS.items()}
    for target, expected in ((torch.special.erf, 0.0), (nn.Softsign, 3.0)):
        for _ in range(2):
            apply(params, buffers, torch.ones(2))
        try:
            rule(target, why="to see it", when="always")(lambda *args, to=expected: args[-1] * 0 + to)
            assert apply(params, buffers, torch.ones(2))[0].tolist() == [expected] * 2
        finally:
            del RULES[-1]
            MODULES.pop(target, None)
            for when, calls in functions.items():
                FUNCTIONS[when].clear()
                FUNCTIONS[when].update(calls)


class Branches(nn.Module):
    """Reaches a norm in some calls only."""

    def __init__(self, normed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) if x.sum() > 0 else torch.relu(x)


class BranchesByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return by_layer_norm(x) if x.sum() > 0 else torch.relu(x)


def by_layer_norm(x: Tensor) -> Tensor:
    return torch.layer_norm(x, (4,))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "a function of this file": BranchesByName,
    "a function of torch": lambda: Branches(F.instance_norm),
    "a method of torch's": lambda: Branches(nn.InstanceNorm1d(3)),
    "a norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "within a module that has a rule": lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_an_inner_step_has_its_rule_also_in_a_branch_not_taken_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, params, buffers = stateless(NORMS[name]())
    assert conduct_of(apply._skeletons.template) != "unknown"
    x, met = torch.rand(2, 3, 4), []
    for function, call in FUNCTIONS["gradients"].items():
        if "norm" in function.__name__:
            seen: Callable[..., Any] = lambda *args, call=call, **kwargs: met.append(1) or call(*args, **kwargs)
            monkeypatch.setitem(FUNCTIONS["gradients"], function, seen)
    with rules("gradients"):
        for _ in range(3):
            apply(params, buffers, -x)
        met.clear()
        apply(params, buffers, x)
    assert met


def test_the_rules_of_an_inner_step_are_back_after_each_call() -> None:
    apply, params, buffers = stateless(nn.Linear(4, 4))
    with rules("gradients") as mode:
        for _ in range(3):
            apply(params, buffers, torch.ones(2, 4))
        assert not apply._skeletons.may_meet("gradients")
        with pytest.raises(RuntimeError, match="shapes"):
            apply(params, buffers, torch.ones(2, 5))
        assert torch._C._len_torch_function_stack() == 1
        assert torch._C._get_function_stack_at(0) is mode
