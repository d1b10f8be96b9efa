"""The line that repeats a check of an inner loop or an optimizer."""

from __future__ import annotations

from typing import Any

from ...optim import Optimizer
from .._paste import paste
from ._probe import code_of

__all__: list[str] = []


def optimizer_code(optimizer: Any) -> str:
    """What makes an optimizer again, if it can be said; else a name for it."""
    if isinstance(optimizer, Optimizer):
        owner = getattr(optimizer.init, "__self__", None)
        text = repr(owner)
        return f"optim.{text}" if owner is not None and "\n" not in text and " object at " not in text else "optimizer"
    if isinstance(optimizer, type):
        return f"torch.optim.{optimizer.__name__}" if optimizer.__module__.startswith("torch.") else optimizer.__name__
    return "optimizer"


def call_of_loop(check: str, loss: Any, params: Any, support: Any, query: Any, options: dict[str, Any]) -> str:
    """``check(loss, params, ...)`` as code."""
    given = [code_of(loss), paste(params), code_of(support) if callable(support) else paste(support)]
    if query is not None:
        given.append(paste(query))
    given += [f"{name}={value if isinstance(value, str) else repr(value)}" for name, value in options.items()]
    return f"{check}({', '.join(given)})"
