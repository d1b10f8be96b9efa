"""Why a gradient is wrong, found out by taking it again with one habit of the code changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__: list[str] = []


class Rewired(TorchFunctionMode):
    """Runs code as if it kept graphs: `habits` are the ways to lose one that are undone."""

    def __init__(self, habits: frozenset[str]) -> None:
        super().__init__()
        self.habits = habits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "create_graph" in self.habits and func in (torch.autograd.grad, Tensor.backward, torch.autograd.backward):
            position = {torch.autograd.grad: 4}.get(func, 3)
            if len(args) > position:
                args = (*args[:position], True, *args[position + 1 :])
            else:
                kwargs["create_graph"] = True
        if "detach" in self.habits:
            if func in (Tensor.detach, torch.detach):
                return args[0] if args else kwargs["input"]
            if func is Tensor.data.__get__:  # type: ignore[attr-defined]
                return args[0]
        if "no_grad" in self.habits and func is torch._C._set_grad_enabled and args and not args[0]:
            return None
        return func(*args, **kwargs)


EXPERIMENTS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"create_graph"}),
        "this equals the gradient without second derivatives: it is right as soon as every `torch.autograd.grad` or "
        "`backward` in the function is called with `create_graph=True`, which is missing",
    ),
    (
        frozenset({"detach"}),
        "it is right as soon as `.detach()` and `.data` in the function cut nothing: one of them cuts the graph",
    ),
    (
        frozenset({"no_grad"}),
        "it is right as soon as `torch.no_grad()` in the function has no effect: a step under it cuts the graph",
    ),
    (
        frozenset({"create_graph", "detach"}),
        "it is right as soon as inner gradients are taken with `create_graph=True` and `.detach()` cuts nothing: both "
        "cut the graph (in higher: `track_higher_grads=False`)",
    ),
    (
        frozenset({"create_graph", "detach", "no_grad"}),
        "it is right as soon as inner gradients are taken with `create_graph=True`, and `.detach()` and "
        "`torch.no_grad()` cut nothing: they cut the graph",
    ),
)


def cause(is_right: Callable[[], bool]) -> str:
    """What has to change for ``is_right()`` to hold, as a line for the message; empty if no experiment says so."""
    for habits, words in EXPERIMENTS:
        try:
            with _quiet(), Rewired(habits):
                right = is_right()
        except Exception:  # code that cannot run like that says nothing
            continue
        if right:
            return words
    return ""


@contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
