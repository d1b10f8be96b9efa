"""Transforms of gradients for `grad_transform`: of one task, differentiable, finite where all gradients are zero."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._tree import tree_leaves, tree_map
from ..errors import HyperparameterError
from ..typing import GradTransform, Tree
from ._arithmetic import like, root
from ._hyperparameters import Range

__all__ = ["clip_by_global_norm", "clip_by_value", "normalize"]


def clip_by_global_norm(max_norm: float | Tensor) -> GradTransform:
    """Shrink gradients whose norm is above `max_norm`: ``g * min(1, max_norm / |g|)``, ``|g|`` taken over all leaves.

    Args:
        max_norm: a number, or a 0-dim tensor, which may require a gradient.

    Returns:
        A function from gradients to gradients of the same structure, for `grad_transform`; gradients below `max_norm`
        go through it unchanged.

    Raises:
        HyperparameterError: `max_norm` is negative, or not one number.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks (ICML 2013).

    Example:
        >>> from statelessify import optim
        >>> optim.clip_by_global_norm(1.0)({"w": torch.tensor([3.0, 4.0])})["w"].tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    return partial(_clip_by_global_norm, max_norm=_one_number("max_norm", max_norm))


def clip_by_value(limit: float | Tensor) -> GradTransform:
    """Bring every entry of the gradients between ``-limit`` and ``limit``; of a complex one, both its parts.

    Args:
        limit: a number, or a 0-dim tensor, which may require a gradient.

    Returns:
        A function from gradients to gradients of the same structure, for `grad_transform`.

    Raises:
        HyperparameterError: `limit` is negative, or not one number.

    Example:
        >>> from statelessify import optim
        >>> optim.clip_by_value(1.0)({"w": torch.tensor([-3.0, 0.5])})["w"].tolist()
        [-1.0, 0.5]
    """
    return partial(_clip_by_value, limit=_one_number("limit", limit))


def normalize(eps: float | Tensor = 1e-8) -> GradTransform:
    """Give the gradients norm one: ``g / (|g| + eps)``, ``|g|`` taken over all leaves.

    Args:
        eps: a number, or a 0-dim tensor; where all gradients are zero the derivative is ``1 / eps``.

    Returns:
        A function from gradients to gradients of the same structure, for `grad_transform`.

    Raises:
        HyperparameterError: `eps` is negative, or not one number.

    Source: Hazan et al., Beyond convexity: stochastic quasi-convex optimization (NeurIPS 2015).

    Example:
        >>> from statelessify import optim
        >>> round(optim.normalize()({"w": torch.tensor([3.0, 4.0])})["w"].norm().item(), 4)
        1.0
    """
    return partial(_normalize, eps=_one_number("eps", eps))


def _one_number(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.ndim:
            raise HyperparameterError(
                f"`{name}` is a tensor of shape {tuple(value.shape)}; write a number or a 0-dim tensor"
            )
    else:
        Range().check(name, value)
    return value


def _clip_by_global_norm(grads: Tree, max_norm: Any) -> Tree:
    norm, scale = _global_norm(grads)
    limit = like(max_norm, norm)
    above = norm * scale > limit
    factor = torch.where(above, limit / torch.where(above, norm, 1.0), 1.0)

    def clip(g: Tensor) -> Tensor:
        return torch.where(above.to(g.device), _times(g, scale, factor), g)

    return tree_map(clip, grads)


def _clip_by_value(grads: Tree, limit: Any) -> Tree:
    def clip(g: Tensor) -> Tensor:
        if g.is_complex():
            return torch.view_as_complex(clip(torch.view_as_real(g.resolve_conj())))
        bound = like(limit, g)
        return torch.clamp(g, -bound, bound)

    return tree_map(clip, grads)


def _normalize(grads: Tree, eps: Any) -> Tree:
    norm, scale = _global_norm(grads)
    factor = 1 / (norm + like(eps, norm) / scale)

    def divide(g: Tensor) -> Tensor:
        return _times(g, scale, factor)

    return tree_map(divide, grads)


def _times(g: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """``g / scale * factor``."""
    dtype = torch.promote_types(g.real.dtype if g.is_complex() else g.dtype, torch.float32)
    wide = g.to(torch.promote_types(g.dtype, dtype))
    return (wide / scale.to(g.device, dtype) * factor.to(g.device, dtype)).to(g.dtype)


def _global_norm(grads: Tree) -> tuple[Tensor, Tensor]:
    """The norm over all leaves in units of a scale, both 0-dim and at least in float32, and the scale, a constant.

    No square overflows or vanishes, and no derivative depends on the scale.
    """
    parts = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in tree_leaves(grads)]
    parts = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in parts if g.numel()]
    if not parts:
        return torch.zeros(()), torch.ones(())
    device = parts[0].device
    largest = torch.stack([g.detach().abs().amax().to(device) for g in parts]).amax()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    squares = [(g / scale.to(g.device, g.dtype)).square().sum().to(device) for g in parts]
    return root(torch.stack(squares).sum()), scale
