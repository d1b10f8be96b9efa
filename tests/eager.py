"""Derivatives of ordinary modules by eager autograd: what the checks in `conformity.py` compare with.

Nothing here imports the library.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from conformance_report import NotApplicable
from ordinary import REFUSALS, SEED, Case, Ordinary, Values, is_real, is_whole
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

STEP = 1e-5  # of finite differences
FEW = 16  # outputs


def math_kernel() -> AbstractContextManager[Any]:
    """The fused attention kernels have no double backward; this one is made of ordinary operations."""
    return sdpa_kernel(SDPBackend.MATH)


KERNELS: tuple[Callable[[], AbstractContextManager[Any]], ...] = (contextlib.nullcontext, math_kernel)


def scalar(tensors: Iterable[Tensor]) -> Tensor:
    """A number that depends on every finite entry in its own way, and not linearly."""
    total = torch.zeros(())
    for tensor in filter(is_real, tensors):
        for part in (tensor.real, tensor.imag) if tensor.is_complex() else (tensor,):
            finite = part.masked_fill(~part.isfinite(), 0)  # one NaN would hide all other entries
            weights = torch.linspace(0.5, 1.5, part.numel()).view(part.shape)
            total = total + (weights * (finite + finite * finite / 2)).sum()
    return total


def inner(gradient: Values, tangents: Values, tasks: tuple[int, ...] = ()) -> Tensor:
    """What a gradient says of a direction; one number for each task, if that is the leading dimension of all."""
    total = torch.zeros(tasks)
    for name, tangent in tangents.items():
        product = (gradient[name] * tangent.conj()).real.masked_fill(tangent == 0, 0)  # there NaN does not matter
        total = total + (product.flatten(len(tasks)).sum(-1) if product.ndim > len(tasks) else product)
    return total


def direction(values: Values, names: Iterable[str], smooth: bool = True) -> Values:
    """A random one; `smooth` leaves out signs and class numbers that are stored as floats."""
    generator = torch.Generator().manual_seed(SEED)
    tangents = {n: torch.randn(values[n].shape, generator=generator, dtype=values[n].dtype) for n in names}
    flat = {n for n in tangents if smooth and n.startswith("inputs/") and is_whole(values[n])}
    return {n: t * 0 if n in flat else t for n, t in tangents.items()}


def where_finite(tangents: Values, gradient: Values) -> Values:
    """Leaves out entries whose gradient is not finite: a logarithm of zero that the module masks afterwards."""
    return {n: t.masked_fill(~gradient[n].isfinite(), 0) for n, t in tangents.items()}


def moved(values: Values, tangents: Values, step: float) -> Values:
    return values | {n: values[n] + step * t for n, t in tangents.items()}


# ---------------------------------------------------------------- what eager autograd can do


@functools.lru_cache(maxsize=2)
def differentiable(case: Case, order: int) -> list[str]:
    """The parameters and the inputs that eager autograd can differentiate with respect to, `order` times.

    Asked separately: a loss that has no gradient for its target has one for its input.

    Raises:
        NotApplicable: there is none.
    """
    found: list[str] = []
    refusal = "no floating tensor goes in"
    for group in (case.names("params"), *([n] for n in case.names("inputs", real=True))):
        try:
            if group:
                derivative(case, case.values, group, order)
                found += group
        except NotApplicable as error:
            refusal = str(error)
    if not found:
        raise NotApplicable(refusal)
    return found


# ---------------------------------------------------------------- derivatives


def derivative(case: Case, values: Values, wrt: Iterable[str], order: int = 1) -> tuple[Values, Tensor]:
    """The gradient of `scalar` of the output, and this number; for order two, both of `scalar` of that gradient.

    Raises:
        NotApplicable: eager autograd has no such derivative.
    """
    refusal: Exception | None = None
    for kernel in KERNELS:
        try:
            with kernel():
                call = Ordinary(case, values, wrt)
                value = scalar(call.tensors)
                gradient = grads(value, call.leaves, create_graph=order == 2)
                if order == 2:
                    value = scalar(gradient.values())
                    gradient = grads(value, call.leaves)
            return {name: grad.detach() for name, grad in gradient.items()}, value.detach()
        except REFUSALS as error:
            refusal = refusal or error
    raise NotApplicable(f"eager autograd: {refusal}") from refusal


def grads(value: Tensor, leaves: Values, create_graph: bool = False, keep: bool | None = None) -> Values:
    """By `torch.autograd.grad`. Zero where there is no path: that is what every functional gradient gives."""
    if not value.requires_grad:
        return {n: torch.zeros_like(leaf) for n, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), None, keep, create_graph, materialize_grads=True)
    return dict(zip(leaves, map(dense, found), strict=True))


def dense(grad: Tensor) -> Tensor:
    """That of a sparse embedding says the same in another layout."""
    return grad if grad.layout == torch.strided else grad.to_dense()


def pushforward(case: Case, values: Values, tangents: Values) -> list[Tensor]:
    """The directional derivatives of the floating outputs, from gradients.

    Few outputs: from the gradient of each. Many: from two backward passes, because a gradient is linear in what it is
    weighted with; where eager autograd refuses the second one, from the gradient of each after all.
    """
    call = Ordinary(case, values, tangents)
    outs = [t for t in call.tensors if is_real(t)]
    if sum(t.numel() for t in outs) > FEW:
        for kernel in KERNELS:
            with contextlib.suppress(*REFUSALS), kernel():
                return _two_passes(Ordinary(case, values, tangents), tangents)
    pushed = []
    for out in outs:
        parts = (out.real, out.imag) if out.is_complex() else (out,)
        rows = [[inner(grads(e, call.leaves, keep=True), tangents) for e in part.reshape(-1)] for part in parts]
        columns = [torch.stack(row).view(out.shape) if row else torch.zeros(out.shape) for row in rows]
        pushed.append(torch.complex(*columns) if out.is_complex() else columns[0])
    return pushed


def _two_passes(call: Ordinary, tangents: Values) -> list[Tensor]:
    outs = [t for t in call.tensors if is_real(t)]
    weights = {str(i): torch.ones_like(t, requires_grad=True) for i, t in enumerate(outs)}
    value = sum(((t * w.conj()).real.sum() for t, w in zip(outs, weights.values(), strict=True)), torch.zeros(()))
    gradient = grads(value, call.leaves, create_graph=True)
    return [g.detach() for g in grads(inner(gradient, tangents), weights).values()]
