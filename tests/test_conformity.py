"""The checks of `conformity.py` fail where they should: each planted bug is caught by those that are named, only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import conformity
import pytest
import torch
from conformance_report import FAILED, MISSING, PASSED, NotApplicable, table
from conformity import CHECKS, Case
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only

import statelessify
from statelessify._apply import Apply

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward-mode rules are scripted when they are first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

CALL = Apply.__call__
VMAPS = {"vmap params", "vmap params, inputs", "vmap everything"}
SECOND = {"second order", "vmap(second order)", "grad(vmap(grad))"}
FIRST = {"gradient", "vmap(grad)"}


def norms() -> Case:
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.LayerNorm(4)]
    return Case("norms", nn.Sequential(*layers), (torch.randn(5, 3),))


def dropout() -> Case:
    return Case("dropout", nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5)), (torch.randn(4, 3),))


def failing(case: Case) -> set[str]:
    found = set()
    for name, check in CHECKS.items():
        try:
            check(case)
        except NotApplicable:
            pass
        except Exception:
            found.add(name)
    return found


@pytest.mark.parametrize("make", [norms, dropout])
def test_nothing_fails_without_a_bug(make: Callable[[], Case]) -> None:
    assert failing(make()) == set()


# ---------------------------------------------------------------- bugs in calls


def lost_buffer(self: Apply, params: Any, buffers: Any, *args: Any) -> Any:
    out, new_buffers = CALL(self, params, buffers, *args)
    return out, dict(list(new_buffers.items())[1:])


def stale_buffers(self: Apply, params: Any, buffers: Any, *args: Any) -> Any:
    return CALL(self, params, buffers, *args)[0], buffers


def swapped(self: Apply, params: Any, buffers: Any, *args: Any) -> Any:
    other = {"0.bias": params["2.bias"], "2.bias": params["4.bias"], "4.bias": params["0.bias"]}
    return CALL(self, params | other, buffers, *args)


def other_structure(self: Apply, *args: Any) -> Any:
    out, new_buffers = CALL(self, *args)
    return (out,), new_buffers


def detached(self: Apply, *args: Any) -> Any:
    out, new_buffers = CALL(self, *args)
    return out.detach(), new_buffers


def written_parameter(self: Apply, params: Any, *args: Any) -> Any:
    found = CALL(self, params, *args)
    if not is_functorch_wrapped_tensor(params["0.bias"]):
        params["0.bias"].data.add_(1e-12)
    return found


def written_input(self: Apply, params: Any, buffers: Any, x: Tensor) -> Any:
    found = CALL(self, params, buffers, x)
    if not is_functorch_wrapped_tensor(x):
        x.data.add_(1e-12)
    return found


def memory(self: Apply, *args: Any) -> Any:
    out, new_buffers = CALL(self, *args)
    self.calls = getattr(self, "calls", 0) + 1
    return out + (self.calls == 2) * 1e-12, new_buffers


def own_seed(self: Apply, *args: Any) -> Any:
    torch.manual_seed(1)
    return CALL(self, *args)


@pytest.mark.parametrize(
    ("bug", "make", "caught"),
    [
        (lost_buffer, norms, VMAPS | {"purity"}),
        (stale_buffers, norms, VMAPS | {"purity"}),
        (swapped, norms, set(CHECKS)),
        (other_structure, norms, {"forward"}),
        (detached, norms, FIRST | SECOND | {"jvp"}),
        (written_parameter, norms, {"purity"}),
        (written_input, norms, {"purity"}),
        (memory, norms, {"purity"}),
        (own_seed, dropout, {"forward", "gradient", "second order"}),
    ],
)
def test_bugs_in_a_call(bug: Any, make: Any, caught: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Apply, "__call__", bug)
    assert failing(make()) == caught


# ---------------------------------------------------------------- bugs in one derivative, and between tasks


class Wrong(torch.autograd.Function):
    """The identity, wrong in the one respect that `what` names."""

    what = ""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return {"gradient": grad * 1.00001, "second order": grad.detach()}.get(Wrong.what, grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * (1.00001 if Wrong.what == "jvp" else 1.0)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        if in_dims[0] is None:
            return Wrong.apply(x), None
        x = x.movedim(in_dims[0], 0)
        return Wrong.apply(x.flip(0) if Wrong.what == "tasks" else x), 0


@pytest.mark.parametrize(
    ("what", "caught"),
    [
        ("nothing", set()),
        ("gradient", FIRST | SECOND),
        ("second order", SECOND),
        ("jvp", {"jvp"}),
        ("tasks", VMAPS | SECOND - {"second order"} | {"vmap(grad)"}),
    ],
)
def test_bugs_in_a_derivative(what: str, caught: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Apply, *args: Any) -> Any:
        out, new_buffers = CALL(self, *args)
        return Wrong.apply(out), new_buffers

    monkeypatch.setattr(Wrong, "what", what)
    monkeypatch.setattr(Apply, "__call__", wrong)
    assert failing(norms()) == caught


def test_a_bug_in_over_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(*args: Any, **kwargs: Any) -> Any:
        over = statelessify.over_tasks(*args, **kwargs)
        return lambda *trees: tree_map_only(Tensor, lambda leaf: leaf.flip(0), over(*trees))

    monkeypatch.setattr(conformity, "over_tasks", turned)
    assert failing(norms()) == {"vmap everything"}


# ---------------------------------------------------------------- the table


def test_the_table_counts_what_passed() -> None:
    def one(group: str, member: str, *verdicts: str) -> dict[str, Any]:
        return {"group": group, "of": 3, "member": member, "samples": 2, "checks": {"a b": verdicts, "c": [PASSED]}}

    records = [one("zoo", "x", PASSED, MISSING), one("zoo", "x", FAILED), one("zoo", "y", MISSING)]
    lines = [" ".join(line.split()) for line in table([*records, one("nets", "z", PASSED)])]
    assert lines[:4] == ["nets samples a c", "b", "z 2 ok ok", ""]
    assert lines[4:8] == ["zoo samples a c", "b", "x 4 FAIL ok", "y 2 - ok"]
    assert lines[-2:] == ["nets: 1 of 3 (2 samples)", "zoo: 1 of 3 (6 samples)"]
