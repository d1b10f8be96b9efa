"""Muon."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError, HyperparameterError, ShapeError
from ._arithmetic import add, at_least, decayed, is_zero, lerp, like, norm, scaled
from ._hyperparameters import Range, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["muon"]


def muon(
    lr: Any = 1e-3,
    weight_decay: Any = 0.1,
    momentum: Any = 0.95,
    nesterov: Any = True,
    ns_coefficients: Any = (3.4445, -4.7750, 2.0315),
    eps: Any = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """Muon, momentum made orthogonal, for matrices; with the names, defaults and meanings of `torch.optim.Muon`.

    With ``g = grad`` (``-grad`` if `maximize`) and ``(a, b, c) = ns_coefficients``::

        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov else m
        X = u / max(|u|, eps)                                 # transposed if it has more rows than columns
        X = a X + (b X X^T + c (X X^T)^2) X                   # `ns_steps` times
        p = p * (1 - lr * weight_decay) - lr * s * X

    where ``s = sqrt(max(1, rows / columns))``, or ``0.2 sqrt(max(rows, columns))`` for
    ``adjust_lr_fn="match_rms_adamw"``. It is not elementwise.

    Args:
        lr, weight_decay, momentum, eps: hyperparameters (`statelessify.optim` lists what each may be).
        nesterov: look ahead.
        ns_coefficients: three of these, of any sign.
        ns_steps: iterations, an integer below 100.
        adjust_lr_fn: None, ``"original"`` or ``"match_rms_adamw"``.
        dtype: in which the iteration runs. bfloat16 is torch's choice; it is coarse for a meta-gradient, so take
            `torch.float32`, or None for the parameter's own dtype, where that matters.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.
        ShapeError: a parameter that is not a matrix.
        DtypeError: a complex parameter.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); Liu et al., Muon is scalable
    for LLM training (2025, arXiv:2502.16982) for ``"match_rms_adamw"``.

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.muon(lr=torch.tensor(0.02, requires_grad=True), dtype=None)
    """
    numbers = {
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "ns_coefficients": ns_coefficients,
        "eps": eps,
    }
    switches = {"nesterov": nesterov, "maximize": maximize}
    choices = {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn, "dtype": dtype}
    refuse_unknown("muon", unknown, [*numbers, *switches, *choices])
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or not 0 <= ns_steps < 100:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HyperparameterError(f"`ns_steps={ns_steps!r}` is not a number of iterations; write an integer below 100")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise HyperparameterError(
            f'`adjust_lr_fn={adjust_lr_fn!r}` does not exist; write None, "original" or "match_rms_adamw"'
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HyperparameterError(f"`dtype={dtype!r}` is not a floating-point dtype; write `torch.float32`, or None")
    rule = Rule(
        "muon",
        _prepare,
        _update,
        numbers,
        switches,
        {"ns_coefficients": (Range(low=-math.inf),) * 3},
        ("momentum_buffer",),
        choices=choices,
        elementwise=False,
        whole=frozenset({"ns_coefficients", "eps"}),
        check=_check,
    )
    return rule.optimizer()


def _check(name: str, leaf: Tensor) -> None:
    if leaf.is_complex():
        raise DtypeError(f"parameter `{name}` is complex, for which `muon` has no meaning; use `optim.adam`")
    if leaf.ndim != 2:
        raise ShapeError(
            f"parameter `{name}` has shape {tuple(leaf.shape)}, but `muon` is for matrices; `partition` the "
            "parameters, and use `optim.adamw` for the rest"
        )


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    return Coefficients({**values, "decay": decayed(values)})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    g = -g if c["maximize"] else g
    buffer = lerp(slots["momentum_buffer"], g, 1 - c["momentum"])
    u = lerp(g, buffer, c["momentum"]) if c["nesterov"] else buffer
    move = _orthogonal(u, c).to(p.dtype)
    rows, columns = p.shape
    scale = 0.2 * math.sqrt(max(rows, columns))
    if c["adjust_lr_fn"] != "match_rms_adamw":
        scale = math.sqrt(max(1, rows / columns))
    p = p if is_zero(c["weight_decay"]) else scaled(p, c["decay"])
    return add(p, move, -(c["lr"] * scale)), {"momentum_buffer": buffer}


def _orthogonal(u: Tensor, c: Values) -> Tensor:
    """Newton-Schulz iteration towards the nearest matrix with orthonormal rows or columns."""
    tall = u.shape[0] > u.shape[1]
    x = u if c["dtype"] is None else u.to(c["dtype"])
    x = x.T if tall else x
    x = x / at_least(norm(x), c["eps"])
    first, second, third = (like(value, x) for value in c["ns_coefficients"])
    for _ in range(c["ns_steps"]):
        gram = x @ x.T
        x = _affine(x, _affine(gram, gram, gram, second, third), x, first, 1)
    return x.T if tall else x


def _affine(x: Tensor, a: Tensor, b: Tensor, on_x: Any, on_product: Any) -> Tensor:
    """``on_x * x + on_product * a @ b``."""
    if isinstance(on_x, Tensor) or isinstance(on_product, Tensor):
        return on_x * x + on_product * (a @ b)
    return torch.addmm(x, a, b, beta=on_x, alpha=on_product)
