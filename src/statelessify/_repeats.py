"""A step that runs again: in the surroundings of its first run, and with the same results."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ._transforms import unwrapped
from .errors import CheckpointError

__all__: list[str] = []


def autocast_state() -> list[dict[str, Any]]:
    """The settings of `torch.autocast` here, one for each kind of device."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    cached = torch.is_autocast_cache_enabled()
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": cached,
        }
        for kind in kinds
    ]


@contextmanager
def autocast_as(state: list[dict[str, Any]]) -> Generator[None]:
    with ExitStack() as stack:
        for settings in state:
            stack.enter_context(torch.autocast(**settings))
        yield


def kept(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Values to compare with, in the storage of `tensors`."""
    plain = [unwrapped(tensor.detach()) for tensor in tensors]
    return [(tensor, tensor._version) for tensor in plain]


def check_repeats(
    before: Sequence[tuple[Tensor, int]], again: Sequence[Tensor], start: Sequence[Tensor | None], instead: str
) -> None:
    """An error where results are not those of the first run: their derivative would be another function's.

    `start` is what each result was made of, if that has its shape: the difference is what a step has to repeat. A
    result that is rounding alone, beside the largest one, need not be repeated: a gradient that is zero in exact
    arithmetic, as that of a bias before a norm.
    """
    largest: float | None = None
    for index, ((old, version), new, origin) in enumerate(zip(before, again, start, strict=True)):
        new = unwrapped(new.detach())
        if old.shape != new.shape or old._version != version:  # seen through other transforms, or changed since
            continue
        if torch.equal(old, new):  # most often; in one pass over them
            continue
        origin = None if origin is None else unwrapped(origin.detach())
        if largest is None:
            largest = max(map(_largest, before))
        if not bool(_close(old, new, origin if origin is not None and origin.shape == old.shape else None, largest)):
            raise CheckpointError(
                f"an inner step has other results when it is computed again (result {index} of shape "
                f"{tuple(old.shape)}): something that it reads has changed since, or it draws random numbers from a "
                f"generator of its own; pass what changes in `batch` or `carry`, or {instead}"
            )


def _largest(result: tuple[Tensor, int]) -> float:
    old, _ = result
    return float(old.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if old.numel() else 0.0


def _close(old: Tensor, new: Tensor, origin: Tensor | None, largest: float) -> Tensor:
    eps = torch.finfo(old.dtype).eps
    apart = (old - new).abs()
    made = old.abs() if origin is None else (old - origin).abs()
    rounding = 64 * eps * old.abs() + 4 * eps * largest
    same = (apart <= eps**0.5 * made.nan_to_num().amax() + rounding) if old.numel() else apart == 0
    return (same | (old == new) | (old.isnan() & new.isnan())).all()
