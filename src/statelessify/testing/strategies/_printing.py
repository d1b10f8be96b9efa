"""Tensors as hypothesis prints them: code that can be pasted into a test.

In effect once the strategies are imported, for every tensor that hypothesis prints.
"""

from __future__ import annotations

from typing import Any

from hypothesis.vendor import pretty
from torch import Tensor

from .._paste import paste

__all__: list[str] = []

LONGEST = 100_000
"""Characters of one tensor; those with more than 400 entries are outlined anyway."""


def print_tensor(tensor: Tensor, printer: Any, cycle: bool) -> None:
    """Write a tensor as ``torch.tensor(...)``; one too long to be pasted, by its shape."""
    code = paste(tensor, LONGEST)
    if tensor.requires_grad and code.endswith(")"):
        code = code[:-1] + ", requires_grad=True)"
    printer.text(code)


def print_call(printer: Any, name: str, parts: dict[str, Any]) -> None:
    """Write a call whose arguments are printed in turn; an argument without a name starts with ``*``."""
    with printer.group(1, f"{name}(", ")"):
        for index, (key, part) in enumerate(parts.items()):
            if index:
                printer.text(",")
                printer.breakable()
            if not key.startswith("*"):
                printer.text(f"{key}=")
            printer.pretty(part)


pretty.for_type_by_name("torch", "Tensor", print_tensor)
