"""Fused kernels whose backward cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

__all__: list[str] = []


class _TwiceDifferentiable(torch.autograd.Function):
    """Runs `fused`, whose backward is fused too, unless a graph of the backward is asked for: then `composed`."""

    @staticmethod
    def forward(ctx: Any, fused: Callable[..., Tensor], composed: Callable[..., Tensor], *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.composed = composed
        with torch._C.DisableTorchFunction():  # else a mode would come back to the rule
            ctx.inner = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
            torch._C._set_grad_enabled(True)  # it is off here; the context manager takes several times as long
            try:
                ctx.out = fused(*ctx.inner)
            finally:
                torch._C._set_grad_enabled(False)
            return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        again = torch.is_grad_enabled()
        # One input may be computed from another: other names keep the gradients of the two apart.
        inputs: Any = [t if t is None else t.view_as(t) for t in ctx.saved_tensors] if again else ctx.inner
        out = cast("Tensor", ctx.composed(*inputs) if again else ctx.out)
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        found = torch.autograd.grad(
            out, [inputs[index] for index in wanted], grads[0], create_graph=again, retain_graph=True
        )
        by_index = dict(zip(wanted, found, strict=True))
        return (None, None, *(by_index.get(index) for index in range(len(inputs))))


def twice_differentiable(
    fused: Callable[..., Tensor], composed: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """``fused(*inputs)`` in eager code, with every derivative; `composed` is the same function of elementary ones."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return cast("Tensor", _apply(fused, composed, *inputs))
    with torch._C.DisableTorchFunction():
        return fused(*inputs)


# What `Function.apply` does before is for transforms, of which there is none here, and takes as long as the rest.
_apply: Any = cast("Any", super(torch.autograd.Function, _TwiceDifferentiable)).apply
