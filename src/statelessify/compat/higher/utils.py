"""Nested containers, and copies of a module's weights: higher's helpers, which programs import by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["flatten", "get_func_params"]


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dicts (by values), lists, tuples and sets, depth first.

    Example:
        >>> flatten({"lr": 0.1, "betas": (0.9, [0.99])})
        [0.1, 0.9, 0.99]
    """
    if not _is_container(x):
        return [x]
    items: Iterable[Any] = cast("dict[Any, Any]", x).values() if isinstance(x, dict) else x
    return [leaf for item in items for leaf in flatten(item)]


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """Detached weights of a module, in the order of ``module.parameters()``, which require a gradient as they do.

    Args:
        module: any module.
        device: where the tensors are moved to.
        safe_copy: whether they have storage of their own; with False, and no move, they share the module's.

    Example:
        >>> [tuple(p.shape) for p in get_func_params(torch.nn.Linear(2, 1))]
        [(1, 2), (1,)]
    """
    return [_copy_tensor(p, safe_copy, device) for p in module.parameters()]


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    copy = t.detach().clone() if safe_copy else t.detach()
    copy = copy if device is None else copy.to(device)
    return copy.requires_grad_(t.requires_grad)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """A container of the same kinds with another leaf for each leaf."""
    if not _is_container(target):
        return map_fn(target)
    kind = cast("Any", type(target))
    if isinstance(target, dict):
        return kind({key: _recursive_map(value, map_fn) for key, value in cast("dict[Any, Any]", target).items()})
    found = [_recursive_map(value, map_fn) for value in target]
    return kind(*found) if hasattr(kind, "_fields") else kind(found)


def _recursive_copy_and_cast(  # pyright: ignore[reportUnusedFunction] (optimizers use it)
    target: Any, device: torch.device | str | None
) -> Any:
    return _recursive_map(target, lambda x: _copy_tensor(x, True, device) if isinstance(x, Tensor) else x)


def _is_container(target: Any) -> bool:
    return isinstance(target, (list, tuple, dict, set))


def _find_param_in_list(param: Tensor, l: Iterable[Tensor]) -> int | None:  # noqa: E741 (higher's own name)
    return next((index for index, p in enumerate(l) if p is param), None)


def _get_param_mapping(module: nn.Module, seen: list[Tensor], mapping: list[int]) -> list[int]:
    """For each slot of the module, depth first, the index of its weight in `seen`; both lists are added to."""
    for param in module._parameters.values():
        if param is not None:
            index = _find_param_in_list(param, seen)
            if index is None:
                index = len(seen)
                seen.append(param)
            mapping.append(index)
    for child in module._modules.values():
        if child is not None:
            _get_param_mapping(child, seen, mapping)
    return mapping
