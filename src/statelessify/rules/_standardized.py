"""Standardization with a backward pass that is written out, and can be differentiated to any order.

By elementary operations, the second derivative of a norm passes over its input some forty times. Here the gradient is
made of the outputs ``y = (x - mean) * r`` and ``r = 1 / sqrt(var + eps)`` themselves, so each further derivative is one
of the same kind::

    dx = r * (a - mean(a) - y * mean(a * y)) - b * r^2 * y / n

for gradients ``a`` of ``y`` and ``b`` of ``r``, where the means are over the n entries that are standardized together.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched

from .._transforms import below, level_of_tasks, transforming

__all__: list[str] = []

Standardized = tuple[Tensor, Tensor, Tensor]
"""The result, and mean and biased variance (kept dimensions)."""


def standardized(
    x: Tensor, dims: list[int], eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Standardized:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over `dims`, counted from the end."""
    if x.is_floating_point() and x.numel():
        level = level_of_tasks()
        if level == 1:  # below it there is no transform
            found = _of_tasks(level, x, dims, eps, weight, bias)
            if found is not None:
                return found
        elif not transforming():
            return _apply(x, dims, eps, weight, bias)
    return _by_elementary_operations(x, dims, eps, weight, bias)


def _by_elementary_operations(
    x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None
) -> Standardized:
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    var = (centred * centred).mean(dims, keepdim=True)
    out = centred * torch.rsqrt(var + eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out, mean, var


def _of_tasks(
    level: int, x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None
) -> Standardized | None:
    """All tasks at once, as an operation below the level of vmap."""
    values, dim = _unwrap_batched(x, level)
    if dim is None:
        return None
    with below():
        values = values.movedim(dim, 0)
        affine = [None if t is None else _lined_up(*_unwrap_batched(t, level), values.ndim) for t in (weight, bias)]
        found = _apply(values, dims, eps, *affine)
    out, mean, var = (_add_batch_dim(t, 0, level) for t in found)
    return out, mean, var


def _lined_up(tensor: Tensor, dim: int | None, ndim: int) -> Tensor:
    """A tensor that broadcasts to one of `ndim` dimensions, the first of which is the tasks."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    return tensor.reshape(tensor.shape[0], *[1] * (ndim - tensor.ndim), *tensor.shape[1:])


def _apply(x: Tensor, dims: list[int], eps: float, weight: Tensor | None, bias: Tensor | None) -> Standardized:
    affine = [t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in (weight, bias)]
    out, _, _, mean, var = cast("tuple[Tensor, ...]", _Standardize.apply(x, *affine, dims, eps))
    return out, mean, var


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: list[int], eps: float
    ) -> tuple[Tensor, ...]:
        mean = x.mean(dims, keepdim=True)
        centred = x - mean
        var = (centred * centred).mean(dims, keepdim=True)  # `var_mean` takes five times as long
        r = torch.rsqrt(var + eps)
        y = centred.mul_(r)
        out = y.clone() if weight is None else y * weight
        if bias is not None:
            out = out.add_(bias)
        ctx.dims, ctx.bias_shape = dims, None if bias is None else bias.shape
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, r, weight)
        return out, y, r, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        g, a, b, _, _ = grads
        needs = ctx.needs_input_grad[:3]
        shape = ctx.bias_shape if needs[2] else None
        arguments: tuple[Any, ...] = (g, *ctx.saved_tensors, ctx.dims, shape, needs[0], needs[1])
        # In the gradient of a loss there is `g` alone; the others come up where gradients are differentiated.
        if torch.is_grad_enabled() and g is not None and a is None and b is None:
            found = cast("Any", _Pull).apply(*arguments)
        else:
            found = _pulled(*arguments, a=a, b=b)
        return *cast("Any", found), None, None


def _pulled(
    g: Tensor | None,
    y: Tensor,
    r: Tensor,
    weight: Tensor | None,
    dims: list[int],
    bias_shape: torch.Size | None,
    need_x: bool,
    need_weight: bool,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias."""
    product = None if g is None else g * y
    dweight = product.sum_to_size(weight.shape) if product is not None and weight is not None and need_weight else None
    dbias = None if g is None or bias_shape is None else g.sum_to_size(bias_shape)
    if not need_x:
        return None, dweight, dbias
    scale = None  # of the gradient of y, where that is a multiple of `g` over all that is standardized together
    if g is not None:
        if weight is None:
            a = g if a is None else a + g
            product = product if a is g else None
        elif a is None and _constant(weight, dims):
            a, scale = g, weight
        else:
            a, product = g * weight if a is None else a + g * weight, None
    if a is None:
        a = torch.zeros_like(y)
    product = a * y if product is None else product
    slope = r if scale is None else r * scale
    along = -slope * product.mean(dims, keepdim=True)
    if b is not None:
        along = along - b * r * r * (r.numel() / y.numel())
    shift = -slope * a.mean(dims, keepdim=True)
    dx = a * slope
    # Both round alike: a step that is computed again with a graph has to repeat one without.
    dx = torch.addcmul(dx + shift, y, along) if torch.is_grad_enabled() else dx.add_(shift).addcmul_(y, along)
    return dx, dweight, dbias


def _constant(weight: Tensor, dims: list[int]) -> bool:
    """Whether a weight is one number over all that is standardized together."""
    return all(weight.ndim < -dim or weight.shape[dim] == 1 for dim in dims)


class _Pull(torch.autograd.Function):
    """`_pulled`, which remembers its arguments only.

    For gradients u of ``dx``, v of ``dweight`` and t of ``dbias``, with ``a = g * weight`` and the projection
    ``P(u) = u - mean(u) - y * mean(u * y)``::

        dg = weight * r * P(u) + v * y + t          dy = v * g - r * (u * mean(a * y) + a * mean(u * y))
        dweight = sum(g * r * P(u))                 dr = sum(a * P(u))
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, y: Tensor, r: Tensor, weight: Tensor | None, dims: list[int], *options: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.dims = dims
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, y, r, weight)
        return _pulled(g, y, r, weight, dims, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        u, v, t = grads
        g, y, r, weight = ctx.saved_tensors
        dims: list[int] = ctx.dims
        none = (None,) * 4  # for what is no tensor
        dg = None if t is None else t.expand_as(g)
        dy = None
        if v is not None:
            dg = v * y if dg is None else torch.addcmul(dg, v, y)
            dy = v * g
        if u is None:
            return dg, dy, None, None, *none
        a = g if weight is None else g * weight
        along = (u * y).mean(dims, keepdim=True)
        p = torch.addcmul(u - u.mean(dims, keepdim=True), y, along, value=-1)
        dr = (a * p).sum(dims, keepdim=True)
        p = p * r
        dweight = None if weight is None else (g * p).sum_to_size(weight.shape)
        scaled = p if weight is None else p * weight
        dg = scaled if dg is None else dg + scaled
        turned = torch.addcmul(u * (r * (a * y).mean(dims, keepdim=True)), a, r * along)
        dy = -turned if dy is None else dy - turned
        return dg, dy, dr, dweight, *none
