"""The memory of a device: what is free, and what a piece of work takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TaskError

__all__: list[str] = []

_torch: Any = torch
_autograd: Any = torch.autograd


def device_of(tensors: Iterable[Any]) -> torch.device:
    """Where the memory is taken: the accelerator, if any tensor is there."""
    devices = {leaf.device for leaf in tensors if isinstance(leaf, Tensor)}
    device = min(devices, key=lambda device: (device.type == "cpu", device.index or 0), default=torch.device("cpu"))
    if device.type not in ("cpu", "cuda"):
        raise TaskError(f'`chunk_size="auto"` cannot measure memory on `{device}`; write a number of tasks')
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found: list[int] = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # of a container; "max" where it has no limit of its own
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, limit - used))
    if not found:
        with suppress(AttributeError, ValueError, OSError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if not found:
        raise TaskError("this system does not say how much memory is free; write `memory_budget=` in bytes")
    return min(found)


class _Active(threading.local):
    """What is being measured in this thread, the innermost last."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []


_active = _Active()


class Measured:
    """The memory that new tensors on a device take, in bytes above what there was before.

    On a CPU torch's profiler counts what this thread allocates; on CUDA the allocator counts what all threads do, and
    its peak statistics begin anew.

    Attributes:
        peak: the most at once.
        kept: what is left at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peak = self.kept = 0

    def __enter__(self) -> Measured:
        if _active.measured:
            _active.measured[-1]._pause()
        elif self._device.type == "cpu" and _autograd._profiler_enabled():
            raise TaskError(
                '`chunk_size="auto"` measures memory with the profiler of torch, and one is active in this thread; '
                "write a number of tasks while you profile"
            )
        self._resume()
        _active.measured.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self._pause()
        _active.measured.pop()
        if _active.measured:
            _active.measured[-1]._add(self.peak, self.kept)
            _active.measured[-1]._resume()

    def _add(self, peak: int, kept: int) -> None:
        self.peak = max(self.peak, self.kept + peak)
        self.kept += kept

    def _resume(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        # The older of the two profilers: the newer one belongs to the whole process, and two threads would crash it.
        options = _torch._C._profiler._ExperimentalConfig()
        memory = (False, True, False, False, False)  # and neither shapes, nor stacks, operations or modules
        _autograd._enable_profiler_legacy(_autograd.ProfilerConfig(_autograd.ProfilerState.CPU, *memory, options))

    def _pause(self) -> None:
        if self._device.type == "cuda":
            now = torch.cuda.memory_allocated(self._device) - self._before
            self._add(torch.cuda.max_memory_allocated(self._device) - self._before, now)
            return
        events = [event for thread in _autograd._disable_profiler_legacy() for event in thread]
        total = most = 0
        for event in sorted((e for e in events if e.kind() == "memory_alloc"), key=lambda event: event.start_us()):
            total += event.cpu_memory_usage()
            most = max(most, total)
        self._add(most, total)
