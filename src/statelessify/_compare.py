"""`compare_modes`: what a mode of `gradient=` costs, and how far it is from the exact meta-gradient."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._forward_mode import ForwardMode
from ._implicit import Implicit
from ._loop import Gradient
from ._tree import require_floating, tree_flatten, tree_leaves, tree_unflatten
from ._unroll import FirstOrder, Unroll
from .errors import LossError, StatelessifyError
from .typing import Tree

__all__ = ["Comparison", "ModeResult", "compare_modes"]


class ModeResult(NamedTuple):
    """One mode's row.

    Attributes:
        cosine: of the angle to the exact meta-gradient; 1 is its direction.
        relative_error: ``|g - exact| / |exact|``.
        seconds: for the meta-loss and its gradient, the median over rounds in which every mode runs once.
        mebibytes: the most memory that tensors took at once, above what there was before.
        error: why there is no result, if there is none.
    """

    cosine: float = float("nan")
    relative_error: float = float("nan")
    seconds: float = float("nan")
    mebibytes: float = float("nan")
    error: str | None = None


class Comparison(dict[str, ModeResult]):
    """Rows by the name of their mode; printed, a table."""

    def __str__(self) -> str:
        width = max(map(len, [*self, "mode"]))
        lines = [f"{'mode':<{width}}  {'cosine':>9}  {'rel. error':>10}  {'ms':>9}  {'MiB':>8}"]
        for name, row in self.items():
            figures = (
                row.error.split(";")[0][:80]
                if row.error is not None
                else f"{row.cosine:9.6f}  {row.relative_error:10.1e}  {row.seconds * 1e3:9.2f}  {row.mebibytes:8.2f}"
            )
            lines.append(f"{name:<{width}}  {figures}")
        return "\n".join(lines)


def compare_modes(
    meta_loss: Callable[[Tree, Any], Tensor],
    params: Tree,
    modes: Sequence[Gradient] | Mapping[str, Gradient] | None = None,
    *,
    rounds: int = 5,
) -> Comparison:
    """Take one meta-gradient in several modes: agreement with the exact one, time, and memory.

    Args:
        meta_loss: ``meta_loss(params, gradient) -> scalar``, which hands the mode on to `adapt` or `adapt_tasks`.
        params: what to differentiate with respect to, any tree of floating-point tensors.
        modes: the modes, or names and modes. None: all of them with their defaults. `Unroll()`, which is exact, is
            always the first.
        rounds: how often each is timed.

    Returns:
        A `Comparison`, a dict of `ModeResult` by name. A mode that refuses the problem has its error there.

    Raises:
        LossError: the meta-loss is not a scalar, or depends on nothing in `params`.

    Example:
        >>> import torch
        >>> from statelessify import FirstOrder, adapt, compare_modes, optim
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> def meta_loss(w, gradient):
        ...     target = torch.ones(3)
        ...     adapted = adapt(loss, w, target, optimizer=optim.sgd(lr=0.1), steps=2, gradient=gradient)
        ...     return loss(adapted.params, target)
        >>> found = compare_modes(meta_loss, torch.zeros(3), [FirstOrder()])
        >>> round(found["FirstOrder()"].cosine, 6), round(found["FirstOrder()"].relative_error, 4)
        (1.0, 0.5625)
    """
    require_floating(params, "params")
    exact = Unroll()
    if modes is None:
        modes = [Unroll(checkpoint_every="auto"), FirstOrder(), Implicit(), ForwardMode()]
    named = dict(modes) if isinstance(modes, Mapping) else {repr(mode): mode for mode in modes}
    named = {"Unroll()": exact} | named
    reference = _vector(_meta_gradient(meta_loss, params, exact))
    if not float(_norm(reference)):
        raise LossError("the exact meta-gradient is zero: the meta-loss does not depend on `params`, or is flat there")
    result = Comparison()
    times: dict[str, list[float]] = {}
    for name, mode in named.items():
        try:
            found, peak = _peak(lambda mode=mode: _meta_gradient(meta_loss, params, mode), params)
        except StatelessifyError as error:
            result[name] = ModeResult(error=f"{type(error).__name__}: {error}")
            continue
        vector = _vector(found)
        cosine = reference @ vector / (_norm(reference) * _norm(vector))  # NaN where there is no gradient at all
        error = _norm(vector - reference) / _norm(reference)
        result[name] = ModeResult(float(cosine), float(error), 0.0, peak / 2**20)
        times[name] = []
    for _ in range(rounds):
        for name in times:
            start = time.perf_counter()
            _meta_gradient(meta_loss, params, named[name])
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        result[name] = result[name]._replace(seconds=statistics.median(seconds) if seconds else float("nan"))
    return result


def _meta_gradient(meta_loss: Callable[[Tree, Any], Tensor], params: Tree, mode: Gradient) -> list[Tensor]:
    leaves, spec = tree_flatten(params)
    own = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        value: Any = meta_loss(tree_unflatten(spec, own), mode)
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise LossError(f"the meta-loss returned {value!r}, not a scalar tensor; return one number")
    found: Any = torch.autograd.grad(value, own, allow_unused=True) if value.requires_grad else [None] * len(own)
    result = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(own, found, strict=True)]
    _wait(own)
    return result


def _norm(vector: Tensor) -> Tensor:
    return vector.square().sum().sqrt()


def _vector(tensors: Sequence[Tensor]) -> Tensor:
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([part.detach().reshape(-1).to("cpu", torch.float64) for part in parts])


def _wait(tensors: Sequence[Tensor]) -> None:
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _peak(call: Callable[[], list[Tensor]], params: Tree) -> tuple[list[Tensor], int]:
    """The result, and the most bytes that tensors took at once."""
    if any(leaf.is_cuda for leaf in tree_leaves(params)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    # Not a dispatch mode that sees each tensor: under one, forward-mode derivatives crash torch 2.13.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    recorded: Any = cast("Any", profile).kineto_results
    total = most = 0
    for event in recorded.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return result, most
