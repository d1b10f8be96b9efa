"""Patched modules: a module whose weights are a list of tensors that may be replaced, and remember what they were."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import NamesError
from . import utils
from ._base import MonkeyPatchBase, weights_of
from ._copies import own_buffer, patched_copy
from ._differences import differs

__all__ = ["buffer_sync", "make_functional", "monkeypatch"]

# Names under which programs import them from here, private as they are.
_MonkeyPatchBase, _torch, _typing, _utils = MonkeyPatchBase, torch, typing, utils


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """Make a patched copy of a module, as `higher.monkeypatch`: it can be called and used like the module.

    The module itself is never changed. ``fmodel(x)`` uses the latest weights, ``fmodel(x, params=list)`` makes these
    the latest. ``fmodel.parameters(time=0)`` are the initial ones.

    Args:
        module: any module; lazy ones only after their first call.
        device: where weights and buffers are moved to.
        copy_initial_weights: whether the initial weights are detached copies (policy ``"detach"``: leaves that require
            a gradient where the module's do). With False they are copies in the graph (``"clone"``), through which
            gradients reach the module's parameters, as MAML needs.
        track_higher_grads: whether all weights over time are kept, on the graph. False is for test time: each update is
            detached, and memory does not grow with steps. It is not first-order MAML, for gradients do not reach the
            initial weights then: that is `statelessify.FirstOrder`.

    Returns:
        The patched module, an instance of the module's own class.

    Raises:
        ModuleError: not a module, or one without a pure form.
        LazyModuleError: a lazy module that has seen no input yet.
        FastWeightsError: a module that is patched already.

    Example:
        >>> import torch
        >>> from statelessify import monkeypatch
        >>> net = torch.nn.Linear(2, 1)
        >>> fmodel = monkeypatch(net, copy_initial_weights=False)
        >>> fmodel(torch.ones(2)).sum().backward()
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    fmodel, _ = patched(module, device, copy_initial_weights, track_higher_grads)
    return fmodel


def patched(
    module: nn.Module, device: torch.device | str | None, copy_initial_weights: bool, track_higher_grads: bool
) -> tuple[Any, list[Tensor]]:
    """`monkeypatch`, and the module's own weights."""
    fmodel, weights = patched_copy(module, "detach" if copy_initial_weights else "clone", device)
    weights_of(fmodel).track(track_higher_grads)
    return fmodel, weights


def make_functional(module: nn.Module, encapsulator: Callable[[Any, nn.Module], Any] | None = None) -> Any:
    """Make a patched copy of a module without weights, as `higher.patch.make_functional`.

    Args:
        module: any module; lazy ones only after their first call.
        encapsulator: called with the patched module and the module at the end, to set weights or buffers.

    Returns:
        The patched module. Call it with ``params=``, a list of tensors in the order of ``module.parameters()``; it
        keeps them as its latest weights. Its buffers are copies of the module's.

    Raises:
        ModuleError: not a module, or one without a pure form.
        LazyModuleError: a lazy module that has seen no input yet.
        FastWeightsError: a module that is patched already.

    Example:
        >>> import torch
        >>> from statelessify import make_functional
        >>> fmodel = make_functional(torch.nn.Linear(2, 1))
        >>> fmodel(torch.ones(2), params=[torch.ones(1, 2), torch.zeros(1)])
        tensor([2.])
    """
    fmodel, _ = patched_copy(module, None)
    if any(part._buffers for part in module.modules()):
        differs("buffers")
    if encapsulator is not None:
        encapsulator(fmodel, module)
    return fmodel


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None) -> None:
    """Copy the buffers of a module to a patched copy of it, once, as `higher.patch.buffer_sync`.

    Args:
        module: where the buffers come from; it is not changed, and later changes of either do not reach the other.
        fmodule: the patched module.
        device: where the copies are moved to.

    Raises:
        NamesError: `fmodule` lacks a submodule; nothing has been copied then.

    Example:
        >>> import torch
        >>> from statelessify import buffer_sync, monkeypatch
        >>> net = torch.nn.BatchNorm1d(2)
        >>> fmodel = monkeypatch(net)
        >>> out = net(torch.ones(3, 2))
        >>> buffer_sync(net, fmodel)
        >>> fmodel.running_mean
        tensor([0.1000, 0.1000])
    """
    pairs = [("", module, fmodule)]
    for prefix, part, own in pairs:
        for name, child in part._modules.items():
            path = f"{prefix}.{name}" if prefix else name
            if name not in own._modules:
                raise NamesError(f"`fmodule` has no submodule `{path}`, which `module` has: patch this very module")
            if child is not None:
                pairs.append((path, child, cast("nn.Module", own._modules[name])))
    copies: dict[int, Any] = {}  # a buffer that stands in two places is one tensor in the copy too
    for _, part, own in pairs:
        for name, buffer in part._buffers.items():
            if isinstance(buffer, Tensor):
                buffer = copies.setdefault(id(buffer), own_buffer(buffer, device))
            own._buffers[name] = buffer
