"""`explain`: each blocker and each named error is found, where it is, and a plain module has none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from zoo import fingerprint
from zoo_modules import MLP, Frozen, Norms, PythonState, Tied, shared_submodule
from zoo_networks import Attention
from zoo_refused import WritesParameter

from statelessify import errors, explain, over_tasks, stateless
from statelessify.explain import Explanation, Finding


def found(report: Explanation, topic: str) -> Finding:
    [finding] = [each for each in report.findings if each.topic == topic]
    return finding


# ---------------------------------------------------------------- what it holds


def test_every_tensor_has_its_row() -> None:
    report = explain(Frozen())
    assert [(row.name, row.role) for row in report.held] == [
        ("head.weight", "parameter"),
        ("head.bias", "parameter"),
        ("body.weight", "frozen"),
        ("body.bias", "frozen"),
    ]
    assert report.held[0].shape == (2, 4)
    assert report.held[0].dtype == "float32"
    assert (report.findings, report.tried) == ((), ())


def test_ties_and_shared_submodules_are_named() -> None:
    [tied] = [row for row in explain(Tied()).held if row.also]
    assert (tied.name, tied.also) == ("first.weight", ("second.weight",))
    assert explain(shared_submodule()).shared == (("0", "2", "3"),)


def test_buffers_that_a_call_writes_are_marked() -> None:
    report = explain(Norms(), torch.randn(4, 3, 5))
    statistics = {f"{norm}.{name}" for norm in ("batch", "instance") for name in ("running_mean", "running_var")}
    assert {row.name for row in report.held if row.written} == statistics | {"batch.num_batches_tracked"}
    assert not any(row.written for row in explain(Norms().eval(), torch.randn(4, 3, 5)).held)


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts, self.scale = [nn.Linear(3, 3)], torch.ones(3, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x) * self.scale


def test_what_is_not_registered_is_said_to_be_constant() -> None:
    problems = [finding.problem for finding in explain(Unregistered()).findings]
    assert len(problems) == 2
    assert any("Linear" in problem and "2 parameters" in problem for problem in problems)
    assert any("shape (3,)" in problem for problem in problems)


# ---------------------------------------------------------------- what it allows


def test_a_plain_module_allows_everything() -> None:
    report = explain(MLP(), torch.randn(4, 3))
    assert report.findings == ()
    assert report.tried == ("forward", "gradient", "second order", "vmap", "compile")
    assert "compile: yes" in str(report)


def test_rules_that_apply_are_listed() -> None:
    names = {name for rule in explain(Attention(), torch.randn(2, 3, 4)).rules for name in rule.names}
    assert {"torch.nn.MultiheadAttention", "torch.nn.functional.layer_norm"} <= names
    assert explain(MLP(), torch.randn(4, 3)).rules == ()
    assert [rule.names for rule in explain(nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3])).rules] == [
        ("torch.nn.AdaptiveLogSoftmaxWithLoss",)
    ]


class Legacy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Blocked(nn.Module):
    """A linear layer, and then whatever `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear, self.rnn = how, nn.Linear(3, 3), nn.RNN(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.linear(x)
        match self.how:
            case "branch":
                return x if x.sum() > 0 else -x
            case "item":
                return x * x.mean().item()
            case "legacy":
                return Legacy.apply(x)
            case "packed":
                return self.rnn(pack_padded_sequence(x[:, None], torch.tensor([4])))[0].data
            case "data":
                y = torch.zeros_like(x)
                y.data = x
                return y + x
            case "checkpoint":
                return checkpoint(self.linear, x, use_reentrant=False)
            case "reentrant":
                return checkpoint(self.linear, x, use_reentrant=True)
            case "random":
                return x + torch.rand(3)
            case "detached":
                return x.detach()
            case "once":
                return Once.apply(x)
            case "fails":
                raise KeyError("asked to fail")
            case _:
                raise AssertionError


class Once(Legacy):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("how", ["branch", "item", "legacy", "packed", "data"])
def test_what_vmap_cannot_batch_is_found(how: str) -> None:
    """And `over_tasks` falls back for the same modules, with the same reason."""
    module, x = Blocked(how), torch.randn(4, 3)
    report = explain(module, x)
    assert report.blocked("vmap"), str(report)
    finding = found(report, "vmap")
    assert "loop" in finding.remedy
    assert not report.blocked("gradient")
    apply, params, buffers = stateless(module)
    with pytest.raises(errors.VmapError):
        over_tasks(lambda x: apply(params, buffers, x)[0], in_dims=0, backend="vmap")(x.expand(2, 4, 3))


@pytest.mark.parametrize("width", [None, 3])
def test_a_branch_on_the_input_alone_is_found(width: int | None) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Identity() if width is None else nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.mean() > 0 else self.linear(-x)

    assert explain(Branch(), torch.rand(4, 3)).blocked("vmap")


def test_the_line_that_blocks_is_shown() -> None:
    finding = found(explain(Blocked("branch"), torch.randn(4, 3)), "vmap")
    assert finding.where.startswith("Blocked.forward, line ")
    assert finding.where.endswith("return x if x.sum() > 0 else -x")


@pytest.mark.parametrize(
    ("how", "topic", "word"),
    [
        ("checkpoint", "vmap", "Checkpoint|LateUse"),
        ("reentrant", "forward", "use_reentrant=False"),
        ("detached", "gradient", "depends on a parameter"),
        ("once", "second order", "once_differentiable"),
        ("fails", "forward", "KeyError: 'asked to fail'"),
        ("random", "random", "random"),
    ],
)
def test_other_blockers_are_found(how: str, topic: str, word: str) -> None:
    finding = found(explain(Blocked(how), torch.randn(4, 3)), topic)
    assert any(part in finding.problem for part in word.split("|")), finding
    assert finding.blocks is (topic != "random")


def test_python_state_is_named() -> None:
    assert "fresh copy" in found(explain(PythonState(), torch.randn(4, 3)), "state").problem


@pytest.mark.parametrize("how", ["add_", "data", "rebind"])
def test_a_module_that_writes_its_parameter_is_named(how: str) -> None:
    assert "MutationError" in found(explain(WritesParameter(how), torch.ones(3)), "forward").problem


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "ModuleError: submodule `0` is a ScriptModule": lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 3))),
    "ModuleError: `module` is wrapped in DataParallel": lambda: nn.DataParallel(nn.Linear(3, 3)),
    "ModuleError: `module` is already compiled": lambda: torch.compile(nn.Linear(3, 3)),
    "LazyModuleError: `module` (LazyLinear)": lambda: nn.LazyLinear(2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_stateless_refuses_is_named(message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        module = REFUSED[message]()
    report = explain(module)
    assert found(report, "stateless").problem.startswith(message)
    assert report.blocked("stateless")


def test_a_lazy_module_is_tried_with_its_arguments() -> None:
    module = nn.LazyLinear(2)
    report = explain(module, torch.ones(4, 3))
    assert not any(finding.blocks for finding in report.findings)
    assert nn.parameter.is_lazy(module.weight)


def test_no_module_is_an_error() -> None:
    with pytest.raises(errors.ModuleError):
        explain(torch.sin)


# ---------------------------------------------------------------- how it behaves


@pytest.mark.parametrize("how", ["branch", "random", "once"])
def test_nothing_is_changed(how: str) -> None:
    module, x = Blocked(how), torch.randn(4, 3)
    before, state, inputs = fingerprint(module), torch.get_rng_state(), copy.deepcopy(x)
    explain(module, x)
    assert fingerprint(module) == before
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, inputs)


def test_the_print_says_it_all() -> None:
    text = str(explain(Blocked("branch"), torch.randn(4, 3)))
    for part in ("linear.weight", "float32 [3, 3]", "vmap: no", "second order: yes", "✗ vmap", "→ "):
        assert part in text
