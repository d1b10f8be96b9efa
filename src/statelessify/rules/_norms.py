"""Norms by elementary operations.

Differentiating ``vmap(func.grad(f))`` through the fused `layer_norm` or `batch_norm` is silently wrong in torch 2.13
(their double-backward formulas do not compose with a batching level), and so is their third derivative in eager
code. They are intercepted as functions, because a user's own module or loss may call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._registry import rule
from ._standardized import standardized

__all__: list[str] = []

_norm = partial(
    rule,
    why="the double backward of the fused norms is wrong under vmap, and their third derivative everywhere",
    upstream="https://github.com/pytorch/pytorch/issues/186256",
    when="gradients",
)


def _accumulate(x: Tensor) -> Tensor:
    """Half-precision statistics are taken in float32, as the fused kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@_norm(F.layer_norm, torch.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    if tuple(input.shape[input.ndim - len(normalized_shape) :]) != tuple(normalized_shape):
        raise RuntimeError(f"layer_norm over {list(normalized_shape)} does not fit an input of {list(input.shape)}")
    dims = list(range(-len(normalized_shape), 0))
    out, _, _ = standardized(_accumulate(input), dims, eps, weight, bias)
    return out.to(input.dtype)


def _per_channel(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.reshape(1, -1, *[1] * (x.ndim - 2))


def _affine(out: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight, bias = _per_channel(weight, out), _per_channel(bias, out)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(dtype)


@torch.no_grad()
def _track(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_((1 - momentum) * running + momentum * value.detach())


@_norm(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x = _accumulate(input)
    if not training:
        mean, var = _per_channel(running_mean, x), _per_channel(running_var, x)
        if mean is None or var is None:
            raise ValueError("batch_norm in evaluation mode needs `running_mean` and `running_var`")
        return _affine((x - mean) * torch.rsqrt(var + eps), weight, bias, input.dtype)
    dims = [-x.ndim, *range(2 - x.ndim, 0)]
    count = x.numel() // x.shape[1]
    if count == 1:
        raise ValueError(f"batch_norm in training mode needs more than one value per channel, not {list(x.shape)}")
    out, mean, var = standardized(x, dims, eps, _per_channel(weight, x), _per_channel(bias, x))
    if count:  # of nothing there are no statistics
        _track(running_mean, mean.flatten(), momentum)
        _track(running_var, var.flatten() * (count / (count - 1)), momentum)
    return out.to(input.dtype)


@_norm(F.instance_norm)
def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = _accumulate(input)
    dims = list(range(2 - x.ndim, 0))
    count = x.shape[2:].numel()
    if count == 1:
        raise ValueError(f"instance_norm needs more than one spatial element, not an input of {list(x.shape)}")
    out, mean, var = standardized(x, dims, eps, _per_channel(weight, x), _per_channel(bias, x))
    if count:
        _track(running_mean, mean.flatten(1).mean(0), momentum)
        _track(running_var, var.flatten(1).mean(0) * (count / (count - 1)), momentum)
    return out.to(input.dtype)


@_norm(torch.native_layer_norm)
def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(normalized_shape), 0))
    _, mean, var = standardized(_accumulate(input), dims, eps)
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, torch.rsqrt(var + eps)


@_norm(torch.native_batch_norm)
def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        return out, input.new_empty(0), input.new_empty(0)
    _, mean, var = standardized(_accumulate(input), [-input.ndim, *range(2 - input.ndim, 0)], eps)
    return out, mean.flatten(), torch.rsqrt(var + eps).flatten()


@_norm(torch.batch_norm)
def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@_norm(torch.instance_norm)
def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
