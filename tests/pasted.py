"""What hypothesis prints, pasted."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis.vendor import pretty
from torch import nn

from statelessify.testing import strategies


def again(value: Any) -> Any:
    """The object that the printed code of an object makes."""
    return evaluate(pretty.pretty(value))


def evaluate(code: str) -> Any:
    """The value of code in a test module with the usual imports."""
    return eval(code, {"torch": torch, "nn": nn, **{name: getattr(strategies, name) for name in dir(strategies)}})
