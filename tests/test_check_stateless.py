"""`check_stateless`: quiet about modules and functions that are right, and what it says of those that are wrong."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conformance import cases, module_db
from torch import Tensor, nn
from torch.func import functional_call
from zoo import fingerprint, members
from zoo_modules import Frozen, Tied
from zoo_refused import REFUSED

from statelessify import errors
from statelessify.testing import check_stateless

# Quiet -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # one layer, in float32
@members(lambda m: not m.lazy)
def test_the_zoo(member: Any) -> None:
    module, x = member.make(), member.inputs()
    before, state = fingerprint(module), torch.get_rng_state()
    # `parametrize.cached()` counts for the whole process: while one thread is inside it, others are refused.
    check_stateless(module, x, kwargs=member.kwargs, threads=1 if type(module).__name__ == "Cached" else 2)
    assert fingerprint(module) == before
    assert torch.equal(torch.get_rng_state(), state)


def ours(params: Any, buffers: Any, module: nn.Module, *args: Any) -> Any:
    """What a careful user of `functional_call` writes."""
    buffers = {name: tensor.clone() for name, tensor in buffers.items()}
    return functional_call(module, (params, buffers), args), buffers


@pytest.mark.parametrize(
    "make", [Tied, Frozen, lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())]
)
def test_a_functionalization_of_ones_own(make: Callable[[], nn.Module]) -> None:
    module = make()
    check_stateless(module, torch.randn(4, 3), apply=lambda p, b, x: ours(p, b, module, x), threads=1)


@pytest.mark.parametrize("index", range(0, 114, 7))
def test_torchs_modules(index: int) -> None:
    pytest.importorskip("expecttest", reason="torch's module database needs it")

    for case in cases(module_db[index], True, 1):
        check_stateless(case.module, *case.args, kwargs=case.kwargs, threads=2)


def test_arguments_that_have_no_gradient() -> None:
    check_stateless(nn.SoftMarginLoss(), torch.randn(3), torch.ones(3), threads=1)  # torch refuses that of the target


# Found -------------------------------------------------------------------------------------------------------------

Wrong = Callable[[nn.Module], Callable[..., Any]]


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))


def detached(module: nn.Module) -> Any:
    return lambda p, b, x: ours({**p, "0.weight": p["0.weight"].detach()}, b, module, x)


def detached_input(module: nn.Module) -> Any:
    return lambda p, b, x: ours(p, b, module, x.detach())


def stale(module: nn.Module) -> Any:
    return lambda p, b, x: ours({**p, "0.bias": module[0].bias}, b, module, x)


def not_returned(module: nn.Module) -> Any:
    return lambda p, b, x: (ours(p, b, module, x)[0], b)


def in_place(module: nn.Module) -> Any:
    return lambda p, b, x: (functional_call(module, (p, b), x), b)


def into_the_module(module: nn.Module) -> Any:
    return lambda p, b, x: (functional_call(module, p, x), {k: t.clone() for k, t in module.named_buffers()})


def into_an_input(module: nn.Module) -> Any:
    return lambda p, b, x: ours(p, b, module, x.add_(0))


def into_an_input_for_good(module: nn.Module) -> Any:
    return lambda p, b, x: (ours(p, b, module, x)[0] + 0 * x.mul_(2).sum(), ours(p, b, module, x / 2)[1])


def ignored(module: nn.Module) -> Any:
    return lambda p, b, x: ours(p, dict(module.named_buffers()), module, x)


def other_mask(module: nn.Module) -> Any:
    return lambda p, b, x: ours(p, b, module, x * torch.rand(()).ceil())


def evaluating(module: nn.Module) -> Any:
    return lambda p, b, x: (F.linear(x, p["0.weight"], p["0.bias"]), b)


def silent(module: nn.Module) -> Any:
    return lambda p, b, x: torch.enable_grad()(ours)(p, b, module, x)


def no_pair(module: nn.Module) -> Any:
    return lambda p, b, x: functional_call(module, (p, b), x)


def into_a_parameter(module: nn.Module) -> Any:
    return lambda p, b, x: ours({**p, "0.bias": p["0.bias"].mul_(1.5)}, b, module, x)


def into_a_parameter_by_data(module: nn.Module) -> Any:
    return lambda p, b, x: (ours(p, b, module, x), p["0.bias"].data.zero_())[0]


def loaded(module: nn.Module) -> Any:
    """Its numbers are right."""

    def apply(p: Any, b: Any, x: Tensor) -> Any:
        module.load_state_dict({**p, **b})
        return ours(p, b, module, x)

    return apply


def mode_left(module: nn.Module) -> Any:
    return lambda p, b, x: (ours(p, b, module, x), module.eval())[0]


def one_forgotten(module: nn.Module) -> Any:
    def apply(p: Any, b: Any, x: Tensor) -> Any:
        out, new = ours(p, b, module, x)
        return out, {name: tensor for name, tensor in new.items() if name != "1.running_var"}

    return apply


def without_gradient(module: nn.Module) -> Any:
    return torch.no_grad()(lambda p, b, x: ours(p, b, module, x))


def written_later(module: nn.Module) -> Any:
    """What backward needs is overwritten."""

    def apply(p: Any, b: Any, x: Tensor) -> Any:
        out, new = ours(p, b, module, x)
        hidden = out.exp()
        result = hidden.square()
        hidden.zero_()
        return result.sqrt().log() + 0 * hidden, new

    return apply


def drawn_twice(module: nn.Module) -> Any:
    return lambda p, b, x: (ours(p, b, module, x), ours(p, b, module, x))[1]


FOUND: dict[str, tuple[Callable[[], nn.Module], Wrong, str]] = {
    "a detached slot": (norm, detached, r"leaf `gradient.params.0.weight`: .*`<lambda>` 0.*, the module .*first call"),
    "a detached input": (norm, detached_input, r"leaf `gradient.inputs.0`"),
    "a stale weight": (norm, stale, r"leaf `buffers.1.running_mean`: .*with other values, first call"),
    "buffers not returned": (norm, not_returned, r"leaf `buffers.1.num_batches_tracked`: .*`<lambda>` 0, the module 1"),
    "buffers in place": (
        norm,
        in_place,
        r"wrote into `buffers`, which it was given:\n  leaf `buffers.1.num",
    ),
    "statistics of the module": (
        norm,
        into_the_module,
        r"changed the Sequential: `1.num_batches_tracked` was 0, is 1 .*in its own mode",
    ),
    "in place on an input": (norm, into_an_input_for_good, r"wrote into `args`, .*leaf `args.0`: .*after -?[\d.]+, "),
    "buffers ignored": (norm, ignored, r"leaf `buffers.1.num_batches_tracked`: .*`<lambda>` 1, the module 2.*second"),
    "another mask": (dropout, other_mask, r"leaf `out`: .*in its own mode, with the module's own values, first call"),
    "no dropout": (dropout, evaluating, r"leaf `out`: "),
    "a graph under no_grad": (norm, silent, r"recorded a graph\n  in its own mode, under `torch.no_grad`"),
    "in place on a parameter": (norm, into_a_parameter, r"wrote into `params`, .*leaf `params.0.bias`: 3 of 3 entries"),
    "in place by data": (
        norm,
        into_a_parameter_by_data,
        r"wrote into `params`, .*leaf `params.0.bias`: .*after 0",
    ),
    "loaded": (norm, loaded, r"changed the Sequential: .*the module's own values, second call"),
    "another mode": (norm, mode_left, r"changed the Sequential: .*`training` was True, is False"),
    "a buffer forgotten": (norm, one_forgotten, r"did not return `1.running_var` in `new_buffers`"),
    "no gradient": (norm, without_gradient, r"leaf `gradient.params.0.bias`: .*`apply` 0|<lambda>` 0"),
    "overwritten": (
        norm,
        written_later,
        r"torch takes the gradient of the module, and not that of `apply`: one",
    ),
    "drawn twice": (dropout, drawn_twice, r"leaf `out`: "),
    "no pair": (norm, no_pair, r"did not return a pair `\(output, new_buffers\)`"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_mistake_is_found(name: str) -> None:
    make, wrong, words = FOUND[name]
    module = make()
    with pytest.raises(AssertionError, match=re.compile(words, re.DOTALL)) as caught:
        check_stateless(module, torch.randn(4, 3), apply=wrong(module), threads=1)
    assert str(caught.value).splitlines()[-1].startswith("  to reproduce: check_stateless(Sequential, torch.tensor([[")


def test_in_place_with_the_same_values_is_no_change() -> None:
    check_stateless(module := norm(), torch.randn(4, 3), apply=into_an_input(module), threads=1)


def test_a_module_that_is_written_into() -> None:
    """Its output is right, and so are the buffers that it returns."""
    module = nn.Sequential(nn.Linear(3, 3))
    module.register_buffer("calls", torch.zeros(()))

    def counting(params: Any, buffers: Any, x: Tensor) -> Any:
        module.calls += 1
        return ours(params, buffers, module, x)

    with pytest.raises(AssertionError, match=r"`counting` changed the Sequential: `calls` was 0, is 1 "):
        check_stateless(module, torch.randn(4, 3), apply=counting, threads=1)


def test_one_module_shared_by_all_threads() -> None:
    """`functional_call` puts tensors into the module for the time of the call."""
    module = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    with pytest.raises(AssertionError, match="called from 4 threads at once"):
        check_stateless(module, torch.randn(4, 3), apply=lambda p, b, x: ours(p, b, module, x))


def test_what_raises_in_threads_alone() -> None:
    module, inside = norm(), threading.Lock()

    def alone(params: Any, buffers: Any, x: Tensor) -> Any:
        if not inside.acquire(blocking=False):
            raise ValueError("no second call, please")
        try:
            return ours(params, buffers, module, x)
        finally:
            inside.release()

    words = r"`alone` raised ValueError\('no second call, please'\)\n  in its own mode, called from 4 threads at once"
    with pytest.raises(AssertionError, match=words):
        check_stateless(module, torch.randn(4, 3), apply=alone)


class Locked:
    """A lock, as a cache may hold one, does not pickle."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.lock = module, threading.Lock()

    def __call__(self, params: Any, buffers: Any, x: Tensor) -> Any:
        return ours(params, buffers, self.module, x)


class Forgetful:
    """Its scale is gone when it comes out of a pickle."""

    scale = 2.0

    def __init__(self, module: nn.Module) -> None:
        self.module, self.scale = module, 1.0

    def __call__(self, params: Any, buffers: Any, x: Tensor) -> Any:
        return ours(params, buffers, self.module, x * self.scale)

    def __getstate__(self) -> Any:
        return {"module": self.module}


def test_what_does_not_pickle() -> None:
    module = norm()
    words = r"`apply` does not pickle, and the module does: TypeError.*lock.*\n  in its own mode, unpickled"
    with pytest.raises(AssertionError, match=words):
        check_stateless(module, torch.randn(4, 3), apply=Locked(module), threads=1)
    with pytest.raises(AssertionError, match=re.compile(r"leaf `out`: .*in its own mode, unpickled", re.DOTALL)):
        check_stateless(module, torch.randn(4, 3), apply=Forgetful(module), threads=1)


def test_untied_weights() -> None:
    module = Tied()
    params = dict(module.named_parameters(remove_duplicate=False))

    def untied(params: Any, buffers: Any, x: Tensor) -> Any:
        return functional_call(module, (params, buffers), x, tie_weights=False), buffers

    with pytest.raises(AssertionError, match=r"`second.weight` is tied to `first.weight`"):
        check_stateless(module, torch.randn(4, 3), apply=untied, params=params)
    with pytest.raises(AssertionError, match=r"leaf `gradient.params.first.weight`"):
        check_stateless(module, torch.randn(4, 3), apply=untied, threads=1)


# Refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_refuses_is_its_own_error(name: str) -> None:
    member, parameter = REFUSED[name]
    with pytest.raises(errors.MutationError, match=parameter):
        check_stateless(member.make(), member.inputs())


def test_misuse() -> None:
    with pytest.raises(errors.ModuleError, match="not a torch"):
        check_stateless(F.relu, torch.ones(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(errors.LazyModuleError, match="lazy"):
        check_stateless(nn.LazyLinear(1), torch.ones(1))
    with pytest.raises(errors.NamesError, match=r"`wieght` is no tensor of Linear.* \(did you mean `weight`\?\)"):
        check_stateless(nn.Linear(1, 1), torch.ones(1), params={"wieght": torch.ones(1, 1)})
