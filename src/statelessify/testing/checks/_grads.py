"""`check_grads`: derivatives by autograd against finite differences, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..._words import nearest
from ...errors import HyperparameterError
from .._paste import paste
from ._complaint import Settings
from ._real import RealFunction
from ._verify import verify

__all__ = ["check_grads"]

Mode = Literal["reverse", "forward"]


def check_grads(
    fn: Callable[[Any], Any],
    tree: Any,
    *,
    order: Literal[1, 2] = 1,
    modes: Sequence[Mode] = ("reverse", "forward"),
    grads: Callable[[Any], Any] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    entries: int = 4,
    kinks: Literal["raise", "skip"] = "raise",
    seed: int = 0,
) -> None:
    """Assert that the derivatives of a function of a tree are what finite differences say.

    Differences are central, extrapolated to step size zero, and taken in float64 where the function accepts that.
    Each knows its own error, so that only a disagreement beyond that error counts.

    Args:
        fn: ``fn(tree)`` returns a tensor or a tree of them; a pure function.
        tree: where to check. Floating and complex leaves are differentiated, each by itself; others go along.
        order: 2 checks the derivative of the gradient as well.
        modes: which modes of autograd: ``"reverse"``, ``"forward"``. The second derivative is taken by reverse over
            reverse and by forward over reverse.
        grads: ``grads(tree)`` returns a tree of gradients of ``fn``, a scalar function: code of your own, of higher or
            of torch.func, which is checked in place of autograd's. Order 2 checks its derivative by autograd.
        rtol: what a derivative may be off, relative to its size. None: 1e-6 in float64, 1e-4 in float32.
        atol: what it may be off besides, per unit of input.
        entries: how many entries of each leaf are checked one by one, beside the whole leaf along random directions.
        kinks: ``"skip"`` passes over entries where the function has a kink.
        seed: of the random directions.

    Raises:
        AssertionError: a derivative is wrong. It names the leaf, the worst entry and both values. Or there is none:
            the function has a kink there, differs from call to call, or changes its input.
        DerivativeError: torch cannot take this derivative in this mode.
        DtypeError: nothing in the tree, or in what the function returns, has a derivative.
        HyperparameterError: an unknown mode or order.
        TreeError: `grads` returns a tree that does not fit.

    Example:
        >>> import torch
        >>> from statelessify.testing.checks import check_grads
        >>> check_grads(lambda p: (p["w"] * p["b"].sin()).sum(), {"w": torch.ones(2), "b": torch.ones(2)}, order=2)
    """
    _check_arguments(order, modes, grads, kinks, entries)
    call = f"check_grads(fn, {paste(tree)}, order={order}, modes={tuple(modes)!r}, seed={seed})"
    verify(RealFunction(fn, tree), order, modes, grads, Settings(rtol, atol, seed, entries, kinks, call))


def check_settings(order: Any, kinks: Any, entries: Any) -> None:
    """Refuse values that no check of derivatives knows."""
    if order not in (1, 2):
        raise HyperparameterError(f"`order={order!r}` is not 1 or 2")
    if kinks not in ("raise", "skip"):
        raise HyperparameterError(f'`kinks={kinks!r}` is not "raise" or "skip"')
    if isinstance(entries, bool) or not isinstance(entries, int) or entries < 0:
        raise HyperparameterError(f"`entries={entries!r}` is not a number of entries; write an integer, 0 or more")


def _check_arguments(order: Any, modes: Any, grads: Any, kinks: Any, entries: Any) -> None:
    check_settings(order, kinks, entries)
    if isinstance(modes, str) or not modes:
        raise HyperparameterError(f'`modes={modes!r}` is not a sequence of modes; write `("reverse", "forward")`')
    for mode in modes:
        if mode not in ("reverse", "forward"):
            raise HyperparameterError(
                f'`modes` has {mode!r}{nearest(str(mode), ("reverse", "forward"))}; write "reverse" or "forward"'
            )
    if grads is not None and not callable(grads):
        raise HyperparameterError("`grads` is no function; write `grads=lambda tree: ...`, which returns the gradients")
