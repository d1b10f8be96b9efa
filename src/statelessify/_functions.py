"""Norms by elementary operations, and what is known about the transforms around a call.

Differentiating ``vmap(func.grad(f))`` through the fused `layer_norm` or `batch_norm` is silently wrong in torch 2.13
(their double-backward formulas do not compose with a batching level), and so is their third derivative in eager
code. They are intercepted as functions, because a user's own module or loss may call them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    _add_batch_dim,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

__all__: list[str] = []


def transforming() -> bool:
    """Whether a functorch transform or a forward-mode level is active here, or dynamo traces."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return peek_interpreter_stack() is not None  # pyright: ignore[reportUnnecessaryComparison]


def unwrapped(tensor: Tensor) -> Tensor:
    """What a tensor holds below all transforms."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def per_task_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """A 0-dim one that carries every active vmap level, or None where there is no level.

    A product with it makes a shared tensor per task, exactly, at any nesting of transforms. `tensors` are the
    inputs of the call: while dynamo traces, the levels can be read off them only.
    """
    one: Tensor | None = None
    if torch.compiler.is_compiling():
        for tensor in tensors:
            mark = torch.zeros_like(tensor, dtype=torch.float32).sum() + 1
            one = mark if one is None else one * mark
        return one
    for level in retrieve_all_functorch_interpreters():
        if isinstance(level, VmapInterpreter):
            with torch._C._DisableFuncTorch():  # a plain tensor, not one that the innermost level wraps
                ones = torch.ones(level.batch_size())
            mark = _add_batch_dim(ones, 0, level.level())
            one = mark if one is None else one * mark
    return one


# Norms -------------------------------------------------------------------------------------------------------------


def _accumulate(x: Tensor) -> Tensor:
    """Half-precision statistics are taken in float32, as the fused kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _standardize(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps)`` over `dims`, with mean and biased variance (kept dimensions)."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    var = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(var + eps), mean, var


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
    out, _, _ = _standardize(_accumulate(input), dims, eps)
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
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
    dims = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1]
    if count < 2:
        raise ValueError(f"batch_norm in training mode needs more than one value per channel, not {list(x.shape)}")
    out, mean, var = _standardize(x, dims, eps)
    _track(running_mean, mean.flatten(), momentum)
    _track(running_var, var.flatten() * (count / (count - 1)), momentum)
    return _affine(out, weight, bias, input.dtype)


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
    dims = list(range(2, x.ndim))
    count = x.shape[2:].numel()
    if count < 2:
        raise ValueError(f"instance_norm needs more than one spatial element, not an input of {list(x.shape)}")
    out, mean, var = _standardize(x, dims, eps)
    _track(running_mean, mean.flatten(1).mean(0), momentum)
    _track(running_var, var.flatten(1).mean(0) * (count / (count - 1)), momentum)
    return _affine(out, weight, bias, input.dtype)


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(normalized_shape), 0))
    _, mean, var = _standardize(_accumulate(input), dims, eps)
    return _layer_norm(input, normalized_shape, weight, bias, eps), mean, torch.rsqrt(var + eps)


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
    _, mean, var = _standardize(_accumulate(input), [0, *range(2, input.ndim)], eps)
    return out, mean.flatten(), torch.rsqrt(var + eps).flatten()


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


_ELEMENTARY: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch.native_batch_norm: _native_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
}


class ElementaryNorms(TorchFunctionMode):
    """Computes layer, batch and instance norm from operations that compose with every transform."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = _ELEMENTARY.get(func)
        return (func if call is None else call)(*args, **(kwargs or {}))


def elementary_norms() -> AbstractContextManager[Any]:
    """The mode, unless it is active already."""
    if not torch.compiler.is_compiling():
        for index in range(torch._C._len_torch_function_stack()):
            if isinstance(torch._C._get_function_stack_at(index), ElementaryNorms):
                return nullcontext()
    return ElementaryNorms()


def norms_for_transforms() -> AbstractContextManager[Any]:
    """The mode where a transform is active; nothing in plain eager code, which stays free of its cost."""
    return elementary_norms() if transforming() else nullcontext()


class OrdinaryTensors(TorchFunctionMode):
    """Copies inference tensors, which autograd refuses, where a function meets them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(ordinary, args), **{name: ordinary(value) for name, value in (kwargs or {}).items()})


def ordinary(leaf: Any) -> Any:
    """A copy of an inference tensor, or of a list or tuple that holds some; anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.clone() if unwrapped(leaf).is_inference() else leaf
    if type(leaf) in (list, tuple):
        return type(leaf)(map(ordinary, leaf))
    return leaf
