"""Weight norm: torch's own in value and slope, with a second derivative that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_checks import check_as_torch, check_tasks, flags, ruled
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from statelessify import optim, stateless
from statelessify.testing import check_grads, check_meta_grads, shapes

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


@st.composite
def arguments(draw: st.DrawFn) -> tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]:
    """The call, and what draws a direction and a length."""
    shape = draw(shapes(min_dims=1, max_dims=3))
    dim = draw(st.integers(-1, len(shape) - 1))
    lengths = () if dim == -1 else tuple(n if d == dim else 1 for d, n in enumerate(shape))

    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(shape) + 0.1, torch.rand(lengths) + 0.5

    return lambda v, g: torch._weight_norm(v, g, dim), make


@given(arguments())
@settings(max_examples=40)
def test_as_torch(drawn: Any) -> None:
    call, make = drawn
    check_as_torch(call, make())


@given(arguments())
@settings(max_examples=15)
def test_second_derivatives(drawn: Any) -> None:
    call, make = drawn
    check_grads(lambda args: ruled(call, "always")(*args), make(), order=2, modes=("reverse",), entries=2)


@given(arguments(), flags(2))
def test_tasks(drawn: Any, mapped: list[bool]) -> None:
    call, make = drawn
    check_tasks(call, make, mapped)


def legacy(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(layer)


@pytest.mark.parametrize("normed", [parametrizations.weight_norm, legacy])
@pytest.mark.parametrize(("layer", "width"), [(nn.Linear, 3), (nn.Conv1d, 1)])
def test_meta_gradients(normed: Callable[[nn.Module], nn.Module], layer: Callable[..., nn.Module], width: int) -> None:
    apply, params, buffers = stateless(normed(layer(width, 2, **({} if width == 3 else {"kernel_size": 2}))))
    params = {name: param.detach() for name, param in params.items()}
    x = torch.randn(4, 3) if width == 3 else torch.randn(4, 1, 3)

    def loss(params: Any, batch: Tensor) -> Tensor:
        out, _ = apply(params, buffers, batch)
        return F.mse_loss(out, torch.ones_like(out))

    check_meta_grads(loss, params, x, optimizer=optim.sgd(lr=0.3), steps=2)


def test_torch_alone_is_wrong() -> None:
    """When this fails, torch has mended it and the rule can go."""
    make = lambda: (torch.randn(2, 3), torch.rand(2, 1) + 0.5)
    with pytest.raises(AssertionError, match="derivative"):
        check_grads(lambda args: torch._weight_norm(*args), make(), order=2, modes=("reverse",))
