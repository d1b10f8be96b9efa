"""Criteria: functions of a prediction and a target."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import _options
from ._recipe import Call, Printed, call
from ._tasks import KINDS
from ._tensors import tensors

__all__ = ["OnLogits", "losses"]


class OnLogits(nn.Module):
    """A criterion of log-probabilities, given logits.

    Args:
        criterion: of log-probabilities ``(batch, classes, ...)`` and a target.

    Example:
        >>> OnLogits(nn.NLLLoss())(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.6931)
    """

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.criterion(prediction.log_softmax(1), target)


@st.composite
def losses(
    draw: st.DrawFn,
    *,
    kind: str | None = None,
    classes: int | None = None,
    dtype: torch.dtype | None = None,
    smooth: bool = False,
) -> nn.Module:
    """Criteria ``criterion(prediction, target)`` with a scalar value, and all their legal settings.

    Args:
        kind: ``"regression"``: both have one shape and floating-point numbers; ``"classification"``: the prediction is
            logits ``(batch, classes)``, the target ``(batch,)`` int64. None: either.
        classes: how many logits there are, for weights of the classes. None: no weights.
        dtype: of the weights. None: float32.
        smooth: only those with derivatives of every order.

    Returns:
        A strategy of torch's own criteria; hypothesis prints them as code.

    Raises:
        InvalidArgument: at draw time, for an option that no criterion fits.

    Example:
        >>> from hypothesis import find
        >>> find(losses(), lambda loss: True)
        MSELoss()
    """
    _options.one_of("kind", kind, KINDS)
    _options.count("classes", classes)
    _options.floating("dtype", dtype)
    kind = kind or draw(st.sampled_from(KINDS))
    made: Call = draw(_calls(kind, classes, dtype or torch.float32, smooth))
    criterion = made.make()
    criterion._repr_pretty_ = Printed(made.code())
    return criterion


@cache
def _calls(kind: str, classes: int | None, dtype: torch.dtype, smooth: bool) -> st.SearchStrategy[Call]:
    reduction = st.sampled_from(["mean", "sum"])
    if kind == "regression":
        width = st.floats(0.25, 2.0)
        soft = [_settings(nn.MSELoss, reduction=reduction)]
        corners = [
            _settings(nn.HuberLoss, delta=width, reduction=reduction),
            _settings(nn.SmoothL1Loss, beta=width, reduction=reduction),
            _settings(nn.L1Loss, reduction=reduction),
        ]
        return st.one_of(soft if smooth else [*soft, *corners])
    some = tensors((classes,), dtype=dtype, min_value=0.25, max_value=2) if classes else st.nothing()
    weight = st.one_of(st.none(), some)
    smoothing = st.one_of(st.just(0.0), st.floats(0.0625, 0.5))
    soft = [
        _settings(nn.CrossEntropyLoss, weight=weight, reduction=reduction, label_smoothing=smoothing),
        _settings(nn.NLLLoss, weight=weight, reduction=reduction).map(lambda made: Call(OnLogits, (made,), {})),
    ]
    corners = [_settings(nn.MultiMarginLoss, weight=weight, margin=st.floats(0.25, 2.0), reduction=reduction)]
    return st.one_of(soft if smooth else [*soft, *corners])


def _settings(target: Callable[..., nn.Module], **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Call]:
    return st.fixed_dictionaries(options).map(lambda given: call(target, **given))
