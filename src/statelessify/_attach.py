"""Values with a derivative of one's own: how the modes join what they have computed to the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ._transforms import forward_mode, transforming
from .errors import DerivativeError

__all__: list[str] = []

Tensors = Sequence[Tensor]
Function = Callable[[list[Tensor]], list[Tensor]]
"""Of tensors alone, so that it can be differentiated and run again."""


class Pullback(Protocol):
    """``pullback(inputs, outputs, cotangents, wanted)``: the gradient of each input, None where it is not wanted.

    Where gradients are recorded it is differentiable itself.
    """

    def __call__(
        self, inputs: Tensors, outputs: Tensors, cotangents: Tensors, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]: ...


def attach(values: Tensors, inputs: Tensors, pullback: Pullback, keep_outputs: bool = False) -> list[Tensor]:
    """The values, as a function of the inputs whose derivative is `pullback`; `outputs` are empty unless kept."""
    if forward_mode():
        raise DerivativeError(
            "this mode of `gradient=` has no forward derivative, which `torch.func.jvp`, `jacfwd` and "
            "`torch.func.hessian` take; write `gradient=Unroll()`, or use reverse mode (`grad`, `jacrev`)"
        )
    if not values or not (transforming() or any(tensor.requires_grad for tensor in inputs)):
        return list(values)
    # Views: functions that a loop around this one sees, which an `autograd.Function` is not.
    given = (tensor.view_as(tensor) for tensor in inputs)
    return list(cast("Any", _Attached).apply(pullback, keep_outputs, len(values), *values, *given))


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pullback: Pullback, keep: bool, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.pullback, keep, ctx.count, *tensors = inputs
        given = tensors[ctx.count :]
        ctx.given = len(given)
        ctx.save_for_backward(*given, *(output if keep else ()))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3 + ctx.count :]
        found = ctx.pullback(saved[: ctx.given], saved[ctx.given :], cotangents, wanted)
        return (None,) * (3 + ctx.count) + tuple(found)


def detached(tensors: Tensors) -> list[Tensor]:
    """The tensors without their graphs, at all levels of transforms; one that stands twice stays one."""
    done: dict[int, Tensor] = {}
    return [done.setdefault(id(tensor), tensor.detach()) for tensor in tensors]


def vjp(fn: Function, inputs: Tensors, wanted: Sequence[bool], once: bool = False) -> tuple[list[Tensor], Function]:
    """``fn(inputs)``, and its pullback to those inputs that are wanted; `once`: it is called once only.

    In eager code the inputs are cut off from their graphs unless the result shall be differentiable, and separate from
    each other in any case: one may depend on another.
    """
    if transforming():
        chosen = [index for index, w in enumerate(wanted) if w]

        def of_chosen(*some: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            every = list(inputs)
            for index, tensor in zip(chosen, some, strict=True):
                every[index] = tensor
            out = fn(every)
            if torch.compiler.is_compiling():
                return out, out
            # What depends on tensors of an outer level alone may seem to need a gradient here, and torch fails on it.
            reached = [o if o.grad_fn is not None or any(o is t for t in some) else o.detach() for o in out]
            return reached, out

        found: Any = torch.func.vjp(of_chosen, *(inputs[index] for index in chosen), has_aux=True)
        _, pull, out = found
        return out, lambda cotangents: list(pull(cotangents))
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [
            t.view_as(t) if create and t.requires_grad else t.detach().requires_grad_(w)
            for t, w in zip(inputs, wanted, strict=True)
        ]
        out = fn(own)
    sources = [t for t, w in zip(own, wanted, strict=True) if w]
    edges = [get_gradient_edge(o) if o.requires_grad else None for o in out]  # which do not hold the values

    def pull_eagerly(cotangents: list[Tensor]) -> list[Tensor]:
        create = torch.is_grad_enabled()
        keep = create or not once
        pairs = [(edge, c) for edge, c in zip(edges, cotangents, strict=True) if edge is not None]
        if not pairs or not sources:
            return [torch.zeros_like(source) for source in sources]
        outputs, given = zip(*pairs, strict=True)
        options: Any = {"retain_graph": keep, "create_graph": create, "allow_unused": True}
        found: Any = torch.autograd.grad(outputs, sources, given, **options)
        return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]

    return out, pull_eagerly
