"""What outlives its call computes what the call computed, or raises: checkpointing, hooks, closures, generators."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from statelessify import adapt, adapt_tasks, errors, optim, over_tasks, stateless

pytestmark = pytest.mark.usefixtures("float64")

PARTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "layer norm": lambda: nn.LayerNorm(4),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "cumulative norm": lambda: nn.BatchNorm1d(4, momentum=None),
    "instance norm": lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True),
    "dropout": lambda: nn.Dropout(0.5),
}


class Checkpointed(nn.Module):
    """Runs `part` twice, between two linear layers; `how` is "never", "module", "method" or "closure"."""

    def __init__(self, part: str, how: str = "module", reentrant: bool = False) -> None:
        super().__init__()
        self.how, self.reentrant = how, reentrant
        self.first, self.part, self.last = nn.Linear(4, 4), PARTS[part](), nn.Linear(4, 2)

    def block(self, x: Tensor) -> Tensor:
        return self.part(self.first(x)).sin()

    def forward(self, x: Tensor) -> Tensor:
        run = {"module": self.part, "method": self.block, "closure": lambda x: self.block(x) * self.last.bias.sum()}
        for _ in range(2):
            how = "method" if self.how == "never" else self.how
            x = run[how](x) if self.how == "never" else checkpoint(run[how], x, use_reentrant=self.reentrant)
        return self.last(x)


def pair(part: str, how: str) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """The applies of a checkpointed module and of the same one without."""
    torch.manual_seed(5)
    module = Checkpointed(part, how)
    apply, params, buffers = stateless(module)
    plain = Checkpointed(part, "never")
    if how != "method":
        plain.forward = lambda x: _by_hand(plain, x, how)
    return apply, stateless(plain).apply, params, buffers


def _by_hand(module: Checkpointed, x: Tensor, how: str) -> Tensor:
    for _ in range(2):
        x = module.part(x) if how == "module" else module.block(x) * module.last.bias.sum()
    return module.last(x)


def fixed(apply: Any, buffers: Any, x: Tensor) -> Callable[[Any], Tensor]:
    def loss(params: Any) -> Tensor:
        torch.manual_seed(3)
        return apply(params, buffers, x)[0].square().sum()

    return loss


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["module", "method", "closure"])
def test_checkpointing_has_every_derivative(part: str, how: str) -> None:
    """Of parameters that are leaves and of fast weights, by `grad` and by `backward`, in the first call and later."""
    apply, plain, params, buffers = pair(part, how)
    x = torch.randn(5, 4, requires_grad=True)
    for _ in range(2):
        results = []
        for each in (apply, plain):
            loss = fixed(each, buffers, x)
            fast = {name: p * 1.1 for name, p in params.items()}
            zeros = {"allow_unused": True, "materialize_grads": True}  # "module" does not reach the first layer
            first = torch.autograd.grad(loss(fast), list(fast.values()), create_graph=True, **zeros)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [*params.values(), x], **zeros)
            for p in params.values():
                p.grad = None
            loss(params).backward()
            results.append((first, second, [p.grad for p in params.values()]))
        assert_close(*results, rtol=1e-10, atol=1e-12)


@given(st.sampled_from(sorted(set(PARTS) - {"dropout"})), st.integers(1, 3))
def test_meta_gradients_through_checkpointing(part: str, steps: int) -> None:
    apply, plain, params, buffers = pair(part, "method")
    x, found = torch.randn(5, 4), []
    for each in (apply, plain):
        loss = fixed(each, buffers, x)
        adapted = adapt(lambda p, _, loss=loss: loss(p), params, None, optimizer=optim.sgd(0.05), steps=steps)
        found.append(torch.autograd.grad(loss(adapted.params), list(params.values())))
    assert_close(*found, rtol=1e-9, atol=1e-11)


def test_statistics_are_updated_once() -> None:
    apply, plain, params, buffers = pair("batch norm", "method")
    x = torch.randn(5, 4)
    out, new_buffers = apply(params, buffers, x)
    expected = plain(params, buffers, x)[1]
    out.sum().backward()  # runs the block again
    assert_close(new_buffers, expected)
    assert_close(apply(params, buffers, x)[1], expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused() -> None:
    apply, params, buffers = stateless(Checkpointed("linear", "method", reentrant=True))
    with pytest.raises(errors.CheckpointError, match="use_reentrant=False"):
        apply(params, buffers, torch.randn(5, 4, requires_grad=True))
    with torch.no_grad():
        apply(params, buffers, torch.randn(5, 4, requires_grad=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_transforms_is_a_named_error(reentrant: bool) -> None:
    apply, params, buffers = stateless(Checkpointed("linear", "method", reentrant))
    loss = fixed(apply, buffers, torch.randn(5, 4, requires_grad=True))
    with pytest.raises(errors.CheckpointError, match="switch it off"):
        grad(loss)(params)
    with pytest.raises(errors.CheckpointError, match="switch it off"):
        over_tasks(lambda scale: grad(lambda p: loss(p) * scale)(params), in_dims=0)(torch.ones(3))


def test_tasks_with_checkpointing_take_the_loop() -> None:
    """Under vmap the recomputation would come when vmap is over; the numbers are those of the plain module."""
    apply, plain, params, buffers = pair("attention", "method")
    xs, found = torch.randn(3, 5, 4), []
    for each in (apply, plain):
        loss = loss_of(each, buffers)
        warns = pytest.warns(UserWarning, match="outside the call") if each is apply else nullcontext()
        with warns:
            adapted = adapt_tasks(loss, params, xs, optimizer=optim.sgd(0.1), steps=2)
        values = over_tasks(loss, in_dims=0, backend="loop")(adapted.params, xs)
        found.append((values, torch.autograd.grad(values.sum(), list(params.values()))))
    assert_close(*found, rtol=1e-9, atol=1e-11)
    with pytest.raises(errors.LateUseError, match="backend="):
        adapt_tasks(loss_of(apply, buffers), params, xs, optimizer=optim.sgd(0.1), steps=1, backend="vmap")


def loss_of(apply: Any, buffers: Any) -> Callable[..., Tensor]:
    return lambda p, x: apply(p, buffers, x)[0].square().sum()


# ---------------------------------------------------------------- other things that outlive a call


class Late(nn.Module):
    """Returns something that runs after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def later(self, x: Tensor) -> Tensor:
        return (x @ self.weight) * self.scale

    def forward(self, how: str, x: Tensor | None = None) -> Any:
        def items() -> Iterator[Tensor]:
            yield from (self.later(torch.ones(3)), self.weight.sum())

        if how == "written":
            self.seen.add_(1.0)
        if how == "counted":
            self.calls += 1
        if how == "hook":
            out = self.later(x)
            out.register_hook(lambda grad: grad * self.weight.sum())
            return out
        return {
            "closure": lambda x: self.later(x),
            "method": self.later,
            "module": self,
            "generator": items(),
            "written": lambda x: self.later(x) + self.seen,
            "counted": lambda x: self.later(x) * self.calls,
        }[how]


@pytest.mark.parametrize("how", ["closure", "method", "written"])
def test_a_closure_computes_with_the_tensors_of_its_call(how: str) -> None:
    apply, params, buffers = stateless(Late())
    other = {"weight": params["weight"].detach() + 1}
    x = torch.ones(3)
    late, later = apply(params, buffers, how)[0], apply(other, buffers, how)[0]
    if how == "written":
        with pytest.raises(errors.LateUseError, match="seen"):
            late(x)
        return
    for call, tensors in [(late, params), (later, other), (late, params)]:
        assert_close(call(x), (x @ tensors["weight"]) * 2)
    assert torch.autograd.grad(late(x).sum(), params["weight"])[0].shape == (3, 3)


def test_a_generator_and_a_hook_do_too() -> None:
    apply, params, buffers = stateless(Late())
    generator = apply(params, buffers, "generator")[0]
    apply({"weight": params["weight"] + 1}, buffers, "method")
    assert_close(next(generator), torch.ones(3) @ params["weight"] * 2)
    x = torch.ones(3, requires_grad=True)
    out, _ = apply(params, buffers, "hook", x)
    assert_close(torch.autograd.grad(out.sum(), x)[0], params["weight"].sum(1) * 2 * 36)


def test_what_a_later_run_cannot_know_is_an_error() -> None:
    apply, params, buffers = stateless(Late())
    with pytest.raises(errors.LateUseError, match="outside the call"):
        apply(params, buffers, "counted")[0](torch.ones(3))


def test_kept_tensors_live_as_long_as_what_keeps_them() -> None:
    apply, params, buffers = stateless(Late())
    fast = {"weight": params["weight"] * 2}
    dead = weakref.ref(fast["weight"])
    gc.disable()
    try:
        late, _ = apply(fast, buffers, "closure")
        assert dead() is not None
        del late, fast
        assert dead() is None
    finally:
        gc.enable()


def test_what_a_transform_leaves_behind_is_an_error() -> None:
    apply, params, buffers = stateless(Late())
    kept: list[Any] = []
    vmap(lambda x: kept.append(apply(params, buffers, "closure")[0]) or x)(torch.ones(2))
    with pytest.raises(errors.LateUseError):
        kept[0](torch.ones(3))


def test_a_full_backward_hook_sees_the_tensors_of_its_call() -> None:
    module, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), []
    module[1].register_full_backward_hook(lambda part, grad_in, grad_out: seen.append(part.weight))
    apply, params, buffers = stateless(module)
    fast = {name: p * 2 for name, p in params.items()}
    x = torch.ones(2, 3)
    again = {name: p * 2 for name, p in params.items()}
    ours = torch.autograd.grad(apply(fast, buffers, x)[0].sum(), list(params.values()))
    theirs = torch.autograd.grad(functional_call(module, again, (x,)).sum(), list(params.values()))
    assert_close(ours, theirs)
    assert_close(seen[0], fast["1.weight"])
