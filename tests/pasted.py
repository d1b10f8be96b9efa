"""What hypothesis prints, pasted; and the smallest example."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import Phase, currently_in_test_context, find, settings
from hypothesis.control import current_build_context
from hypothesis.strategies import SearchStrategy
from hypothesis.vendor.pretty import RepresentationPrinter
from torch import nn

from statelessify import optim
from statelessify.testing import strategies

NAMES = {**vars(optim), **vars(strategies), "torch": torch, "nn": nn}
"""What the imports of a test file bring."""


def printed(value: Any) -> str:
    """What hypothesis prints for an object that was drawn."""
    printer = RepresentationPrinter(context=current_build_context() if currently_in_test_context() else None)
    printer.pretty(value)
    return printer.getvalue()


def again(value: Any) -> Any:
    """The object that the printed code of an object makes."""
    return eval(printed(value), dict(NAMES))


def smallest(strategy: SearchStrategy[Any], condition: Callable[[Any], bool] = lambda value: True) -> Any:
    """What an example that meets a condition shrinks to."""
    chosen = settings(max_examples=2000, database=None, deadline=None, phases=[Phase.generate, Phase.shrink])
    return find(strategy, condition, settings=chosen, random=Random(0))
