"""Recurrent layers and cells, which have no batching rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from .._transforms import per_task_one
from ._registry import rule

__all__: list[str] = []


def _decomposing(function: Any) -> Any:
    """Run a recurrent function inside one more gradient level.

    There torch takes the composite kernel, step by step from matrix products, instead of a fused one; a batching
    level below it then meets only operations that it knows. The numbers are the same to rounding. The hidden state has
    to be per task, as the kernel adds to it in place.
    """

    def call(input: Tensor, hidden: Any, *others: Any, **kwargs: Any) -> Any:
        one = per_task_one([])
        if one is not None:
            one = one.to(input.device, input.dtype)
            hidden = _times(hidden, one)
            if isinstance(hidden, Tensor) and not hidden.is_floating_point():  # packed: data, sizes, state
                others = (_times(others[0], one), *others[1:])
        slots, tensors = _without_tensors((input, hidden, *others))

        def run(*inner: Tensor) -> Any:
            return function(*_with_tensors(slots, iter(inner)), **kwargs)

        return vjp(run, *tensors)[0]

    return call


def _times(state: Any, one: Tensor) -> Any:
    if not isinstance(state, Tensor):
        return [each * one for each in state]
    return state * one if state.is_floating_point() else state


_TAKEN = object()


def _without_tensors(args: Any) -> tuple[list[Any], list[Tensor]]:
    """Arguments with a mark for each floating tensor, and these tensors, also those in a list or tuple."""
    slots: list[Any] = []
    tensors: list[Tensor] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            inner, more = _without_tensors(arg)
            slots.append(inner)
            tensors += more
        elif isinstance(arg, Tensor) and arg.is_floating_point():
            slots.append(_TAKEN)
            tensors.append(arg)
        else:
            slots.append(arg)
    return slots, tensors


def _with_tensors(slots: Any, tensors: Any) -> list[Any]:
    return [
        next(tensors) if slot is _TAKEN else _with_tensors(slot, tensors) if isinstance(slot, list) else slot
        for slot in slots
    ]


for _function in (
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    torch.lstm_cell,
    torch.gru_cell,
    torch.rnn_tanh_cell,
    torch.rnn_relu_cell,
):
    rule(
        _function,
        why="the fused recurrent kernels have no batching rule",
        upstream="https://github.com/pytorch/pytorch/issues/105982",
    )(_decomposing(_function))
