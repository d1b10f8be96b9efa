"""Autograd's graph: gradients through it, and the nodes that it consists of."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__: list[str] = []


_run_backward: Any = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


def gradients_of(
    loss: Tensor, inputs: Sequence[Tensor], create_graph: bool, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of one number, None where it does not depend on an input.

    What that function looks at before it starts takes a fifth of the time of a step of a small network: where a look
    at the loss tells as much, the engine is called at once.
    """
    ordinary = type(loss) is Tensor and loss.requires_grad and loss.ndim == 0 and loss.is_floating_point()
    keep = create_graph or retain_graph
    if not ordinary or not inputs or _run_backward is None:
        return torch.autograd.grad(loss, inputs, create_graph=create_graph, retain_graph=keep, allow_unused=True)
    one = torch.ones_like(loss)
    return _run_backward((loss,), (one,), keep, create_graph, tuple(inputs), True, accumulate_grad=False)


def nodes(results: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> Iterator[Any]:
    """The nodes of the graph of `results`, each once, down to what `inputs` were computed by."""
    seen = {tensor.grad_fn for tensor in inputs} | {None}
    stack: list[Any] = [tensor.grad_fn for tensor in results]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(child for child, _ in node.next_functions)


# What the decorator makes of any function, so that it can be recognized.
_ONCE: Any = cast("Any", once_differentiable)(nodes).__code__


def is_once_differentiable(node: Any) -> bool:
    """Whether a node belongs to an `autograd.Function` whose backward is marked as ``@once_differentiable``.

    Under transforms torch wraps the function: the one that the user wrote is then found in closures of the wrapper.
    """
    function = getattr(node, "_forward_cls", None)
    if function is None:  # as of nearly every node
        return False
    stack: list[Any] = [function]
    seen = set[int]()
    while stack:
        item = stack.pop()
        if isinstance(item, type):
            item = getattr(cast("Any", item), "backward", None)
        if not isinstance(item, types.FunctionType) or id(item) in seen:
            continue
        seen.add(id(item))
        if item.__code__ is _ONCE:
            return True
        stack.extend(cell.cell_contents for cell in item.__closure__ or () if cell.cell_contents is not None)
    return False
