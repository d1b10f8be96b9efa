"""What a rule is compared with: torch's own function in eager code, plain autograd, finite differences, loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from statelessify.rules._registry import Rules, When

Call = Callable[..., Tensor]
"""A function of tensors: it is differentiated by all that are floating-point, and mapped over any."""

Make = Callable[[], tuple[Tensor, ...]]
"""Its arguments, drawn anew each time in the same shapes."""


def ruled(call: Call, when: When = "transforms") -> Call:
    def run(*args: Any) -> Any:
        with Rules(when):
            return call(*args)

    return run


def scalar(out: Tensor) -> Tensor:
    """A sum in which each entry counts differently."""
    return (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_stride=False)


def floating(args: Sequence[Tensor]) -> list[int]:
    return [index for index, arg in enumerate(args) if arg.is_floating_point()]


def gradients(call: Call, args: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """The value and, by plain autograd, its gradient by each floating argument."""
    leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    out = call(*leaves)
    wanted = [leaves[index] for index in floating(args)]
    found = torch.autograd.grad(
        scalar(out), wanted, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return (out, *found)


def functional_gradients(call: Call, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a call with rules, by `torch.func.grad`."""
    where = floating(args)

    def run(*values: Tensor) -> Tensor:
        return scalar(ruled(call)(*_filled(args, where, values)))

    return grad(run, argnums=tuple(range(len(where))))(*(args[index] for index in where))


def _filled(args: Sequence[Tensor], where: list[int], values: Sequence[Tensor]) -> list[Tensor]:
    filled = list(args)
    for index, value in zip(where, values, strict=True):
        filled[index] = value
    return filled


def check_as_torch(call: Call, args: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Values and gradients in eager code and by `torch.func.grad`, and forward mode."""
    expected = gradients(call, args)
    close(gradients(ruled(call), args), expected, tolerance)
    close(functional_gradients(call, args), expected[1:], tolerance)
    where = floating(args)
    tangents = [torch.randn_like(args[index]) for index in where]
    run = lambda *values: scalar(ruled(call)(*_filled(args, where, values)))
    found = jvp(run, tuple(args[index] for index in where), tuple(tangents))[1]
    products = [(g * t).sum() for g, t in zip(expected[1:], tangents, strict=True)]
    close(found, sum(products, torch.zeros(())), 10 * tolerance)


def check_second_order(call: Call, args: Sequence[Tensor]) -> None:
    """The derivative of the gradient in a direction, against differences of the gradients that torch itself gives."""
    where = floating(args)
    values = tuple(args[index] for index in where)
    directions = tuple(torch.randn_like(value) for value in values)
    found = jvp(lambda *v: functional_gradients(call, _filled(args, where, v)), values, directions)[1]
    step = 1e-6
    sides = []
    for sign in (1, -1):
        moved = [v + sign * step * d for v, d in zip(values, directions, strict=True)]
        sides.append(gradients(call, _filled(args, where, moved))[1:])
    close(found, tuple((right - left) / (2 * step) for right, left in zip(*sides, strict=True)), 1e-5)


def check_tasks(call: Call, make: Make, mapped: Sequence[bool], tolerance: float = 1e-9) -> None:
    """`torch.vmap` with some of the arguments per task, against a loop of torch's own: values and gradients."""
    tasks = [make() for _ in range(3)]
    mapped = [*mapped[: len(tasks[0])]]
    mapped += [False] * (len(tasks[0]) - len(mapped))
    mapped[0] = mapped[0] or not any(mapped)
    columns = list(zip(*tasks, strict=True))
    given = [torch.stack(column) if m else column[0] for column, m in zip(columns, mapped, strict=True)]
    in_dims = tuple(0 if m else None for m in mapped)

    def loop(*args: Tensor) -> Tensor:
        rows = [[a[index] if m else a for a, m in zip(args, mapped, strict=True)] for index in range(3)]
        return torch.stack([call(*row) for row in rows])

    together = lambda *args: vmap(ruled(call), in_dims=in_dims)(*args)
    close(gradients(together, given), gradients(loop, given), tolerance)


def flags(count: int) -> st.SearchStrategy[list[bool]]:
    """Which of the arguments have tasks."""
    return st.lists(st.booleans(), min_size=count, max_size=count)


class Kernels(TorchDispatchMode):
    """The kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
