"""Drawn problems: finite, printed as code that makes them again, and small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis.errors import InvalidArgument
from pasted import again, smallest
from torch import Tensor, nn

from statelessify import adapt_tasks, optim, over_tasks
from statelessify.testing import assert_trees_close, problems
from statelessify.testing.strategies import Problem


def outer(problem: Problem, params: dict[str, Tensor]) -> Tensor:
    """The mean loss over the queries."""
    return over_tasks(problem.loss)(params, problem.queries).mean()


@given(problems())
def test_loss_and_gradient_are_finite(problem: Problem) -> None:
    value = outer(problem, problem.params)
    assert value.isfinite()
    assert value.requires_grad
    grads = torch.autograd.grad(value, list(problem.params.values()), allow_unused=True, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.filterwarnings("ignore:torch.vmap cannot batch:UserWarning")  # weighted, smoothed cross-entropy
@given(problems(dtype=torch.float64, smooth=True))
def test_the_inner_loop_is_finite(problem: Problem) -> None:
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss, params, supports, queries, _ = problem
    adapted = adapt_tasks(loss, params, supports, optimizer=optim.sgd(lr=rate), steps=2)
    value = over_tasks(loss, in_dims=0)(adapted.params, queries).sum()
    (grad,) = torch.autograd.grad(value, [rate], allow_unused=True, materialize_grads=True)
    assert value.dtype == torch.float64
    assert grad.isfinite()


@given(problems())
def test_the_printed_code_makes_the_same_problem(problem: Problem) -> None:
    copied = again(problem)
    assert_trees_close(copied[1:4], problem[1:4], rtol=0, atol=0)
    assert outer(copied, copied.params).item() == outer(problem, problem.params).item()


@given(problems())
def test_the_module_is_left_alone(problem: Problem) -> None:
    before = {name: tensor.clone() for name, tensor in problem.module.state_dict().items()}
    outer(problem, problem.params).backward()
    assert_trees_close(dict(problem.module.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in problem.module.parameters())


@given(problems(kind="classification", layers=("conv", "norm"), training=True, dtype=torch.float64, max_tasks=1))
def test_options(problem: Problem) -> None:
    (x, y), (_, labels) = problem.supports, problem.queries
    assert (x.dtype, y.dtype, labels.dtype) == (torch.float64, torch.int64, torch.int64)
    assert x.shape[0] == 1
    assert all(part.training for part in problem.module.modules())
    assert not any(isinstance(part, (nn.Tanh, nn.GRU)) for part in problem.module.modules())


def test_the_smallest() -> None:
    found = smallest(problems())
    assert type(found.module) is nn.Linear
    assert found.supports[0].shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "ranking"}, "`kind='ranking'`; write one of 'regression', 'classification', or None"),
        ({"dtype": torch.int64}, "`dtype=torch.int64`; write a floating-point dtype"),
        ({"max_tasks": 0}, "`max_tasks=0`; write a whole number from 1 on"),
        ({"layers": ("lienar",)}, r"`layers` names `lienar`, which there is not \(did you mean `linear`"),
        ({"layers": ("embedding",)}, "leave no layer"),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], words: str) -> None:
    strategy = problems(**options)
    with pytest.raises(InvalidArgument, match=words):
        smallest(strategy)
