"""Small problems for the tests of the inner loop: losses of one task, modules with every norm, comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from statelessify import adapt, stateless, tree_stack, tree_unstack

# torch's own decompositions for forward mode are scripted when they are imported
IGNORE_SCRIPT = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Two trees have one structure and, up to rounding, the same numbers; dtypes and shapes are exact."""
    ours, spec = tree_flatten(actual)
    theirs, other = tree_flatten(expected)
    assert spec == other
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert a == b


def fresh(params: Any) -> Any:
    """New leaves that require a gradient."""
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


def gradients(value: Tensor, params: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """The gradient of every parameter through the eager graph, by name."""
    found = torch.autograd.grad(value, list(params.values()), materialize_grads=True, allow_unused=True, **kwargs)
    return dict(zip(params, found, strict=True))


def one_by_one(loss: Any, params: Any, batches: Any, **options: Any) -> Any:
    """The oracle: a Python loop of `adapt` over the tasks, stacked."""
    return tree_stack([adapt(loss, params, batch, **options) for batch in tree_unstack(batches)])


# Functions of one task ---------------------------------------------------------------------------------------------


def mlp(inputs: int = 2, hidden: int = 3) -> dict[str, Tensor]:
    return {
        "first.weight": torch.randn(inputs, hidden),
        "first.bias": torch.randn(hidden),
        "last.weight": torch.randn(hidden, 1),
    }


def regression(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    hidden = torch.tanh(x @ params["first.weight"] + params["first.bias"])
    return ((hidden @ params["last.weight"] - y) ** 2).mean()


def regression_batch(*tasks: int, shots: int = 4, inputs: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(*tasks, shots, inputs), torch.randn(*tasks, shots, 1)


def pull(params: dict[str, Tensor], target: Tensor) -> Tensor:
    """A loss with derivatives of every order: ``sum((w - target)^4)``."""
    return ((params["w"] - target) ** 4).sum()


def recurrent(params: dict[str, Tensor], hidden: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """A loss with a carry through which gradients flow."""
    hidden = torch.tanh(params["w"] * batch + hidden)
    return (hidden**2).sum(), hidden


# Modules, one for each kind of norm --------------------------------------------------------------------------------


class Functional(nn.Module):
    """A user's own module that calls a norm itself."""

    def __init__(self, norm: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.scale, self.shift)


def layer(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],)) * scale[0] + shift[0]


def batch(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, scale, shift, training=True)


def instance(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=shift)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm([4, 3]),
    "layer, no weights": lambda: nn.LayerNorm(3, elementwise_affine=False),
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "batch, running": lambda: nn.BatchNorm1d(4),
    "batch, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "batch, eval": lambda: nn.BatchNorm1d(4).eval(),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "instance, running": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(3),
    "F.layer_norm": lambda: Functional(layer),
    "F.batch_norm": lambda: Functional(batch),
    "F.instance_norm": lambda: Functional(instance),
}


class Problem(NamedTuple):
    """A loss with a carry of one task, and everything that it is called with."""

    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    batches: tuple[Tensor, Tensor]


def norm_problem(norm: str, tasks: int, activation: Callable[[Tensor], Tensor] = torch.tanh) -> Problem:
    """Convolution, norm, linear; inputs ``(tasks, 5, 2, 3)``. The loss itself calls `F.layer_norm` once more."""
    body = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), NORMS[norm]())
    head = nn.Linear(12, 2)
    apply, params, buffers = stateless(nn.Sequential(body, Flat(activation), head), params="detach", buffers="detach")

    def loss(params: Any, buffers: Any, batch: Any) -> tuple[Tensor, Any]:
        x, y = batch
        out, buffers = apply(params, buffers, x)
        return F.mse_loss(F.layer_norm(out, (2,), eps=0.1), y) + 0.1 * (out**2).mean(), buffers

    return Problem(loss, params, buffers, (torch.randn(tasks, 5, 2, 3), torch.randn(tasks, 5, 2)))


class Flat(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x).flatten(1)


# Linear systems ----------------------------------------------------------------------------------------------------


def positive(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Hermitian matrices with eigenvalues between 1/4 and 3/2, for which all solves converge."""
    size = shape[-1]
    q = torch.linalg.qr(torch.randn(*shape, size, dtype=dtype))[0]
    values = 0.25 + 1.25 * torch.rand(*shape, dtype=torch.float64)
    return (q * values[..., None, :].to(q.dtype)) @ q.mH


def times(matrix: Tensor) -> Callable[[Any], Any]:
    return lambda x: matrix @ x


def small(params: Any, batch: Any) -> Tensor:
    x, y = batch
    return ((torch.tanh(x @ params["w"]) * params["b"] - y) ** 2).mean()


def small_problem() -> tuple[Any, Any, Any]:
    params = {"w": torch.randn(2), "b": torch.randn(())}
    return params, (torch.randn(3, 2), torch.randn(3)), (torch.randn(2, 2), torch.randn(2))
