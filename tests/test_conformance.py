"""Every module of torch's own module database, as a pure function; see `conformity.py` for what is checked.

By default a few samples of each module; with `--conformance` all of them, and a table at the end.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance_report import conform
from conformity import CHECKS, Case
from ordinary import Ordinary
from torch import Tensor
from torch.utils._pytree import tree_map_only

pytest.importorskip("expecttest", reason="torch's module database needs it")

from torch.testing._internal.common_modules import module_db

GROUP = "torch modules"
MOST = 60  # samples of one module in one mode: a list that is longer is thinned evenly
QUICK = {True: 2, False: 1}  # most modules do the same in both modes

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's samples include calls that torch's modules warn about; vmap warns where it is slow, which is no mistake
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # torch's own forward-mode rules are scripted when they are first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


def spread(count: int, most: int) -> list[int]:
    """Indices of at most so many entries, evenly."""
    if count <= most:
        return list(range(count))
    return [round((i + 0.5) * count / most - 0.5) for i in range(most)]


def cases(info: Any, training: bool, most: int) -> Iterator[Case]:
    torch.manual_seed(0)
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
    for index in spread(len(samples), most):
        torch.manual_seed(index)
        how, call = samples[index].constructor_input, samples[index].forward_input
        module = info.module_cls(*how.args, **how.kwargs).to(torch.float64).train(training)
        if info.is_lazy:
            module(*call.args, **call.kwargs)  # shapes are known from here on
        case = Case(f"{info.name}, sample {index}", module, tuple(call.args), dict(call.kwargs))
        if how.kwargs.get("options") is not None:
            # In chunks, torch's LinearCrossEntropyLoss has a second derivative that is silently wrong: compare in one.
            whole = info.module_cls(*how.args, **how.kwargs | {"options": None})
            case = dataclasses.replace(case, fresh=functools.partial(copy.deepcopy, whole))
        yield in_domain(case) if any(t.isnan().any() for t in Ordinary(case, case.values).tensors) else case


def in_domain(case: Case) -> Case:
    """Positive inputs: torch draws some samples of both signs, and then takes logarithms or roots of them."""
    positive = lambda leaf: leaf.abs().nan_to_num(0.5) if leaf.is_floating_point() else leaf
    args, kwargs = tree_map_only(Tensor, positive, (case.args, dict(case.kwargs)))
    return dataclasses.replace(case, args=args, kwargs=kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_torch_module(info: Any, training: bool, request: pytest.FixtureRequest) -> None:
    most = MOST if request.config.getoption("--conformance") else QUICK[training]
    conform(request, GROUP, len(module_db), info.name, list(cases(info, training, most)), CHECKS)


def test_the_whole_database_is_here() -> None:
    assert len({info.name for info in module_db}) == len(module_db) >= 114
