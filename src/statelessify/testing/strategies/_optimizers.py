"""Every rule of `statelessify.optim`, with legal settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from ... import optim
from ..._tree import tree_leaves, tree_names
from ...typing import Tree
from . import _options
from . import _printing as _printing
from ._options import require

__all__ = ["optimizers"]


class Span(NamedTuple):
    """The values of a number: the first that comes to mind, and others.

    Attributes:
        low, high: bounds.
        zero: whether it may also be zero, which many rules treat apart.
        whole: whether it is one number for each parameter, not for each entry.
    """

    low: float
    high: float
    zero: bool = False
    whole: bool = False


RATE = Span(0.0078125, 0.5)
DECAY = Span(0.0078125, 0.25, zero=True)
BETA = Span(0.5, 0.9375, zero=True)
EPS = Span(0.0078125, 0.25)
_ADAM: dict[str, Any] = {"lr": RATE, "betas": (BETA, BETA), "eps": EPS, "weight_decay": DECAY}

NUMBERS: dict[str, dict[str, Span | tuple[Span, ...]]] = {
    "sgd": {"lr": RATE, "momentum": BETA, "dampening": DECAY, "weight_decay": DECAY},
    "adam": _ADAM,
    "adamw": _ADAM,
    "nadam": {**_ADAM, "momentum_decay": DECAY},
    "radam": _ADAM,
    "adagrad": {
        "lr": RATE,
        "lr_decay": DECAY,
        "weight_decay": DECAY,
        "initial_accumulator_value": DECAY,
        "eps": EPS,
    },
    "adadelta": {"lr": RATE, "rho": BETA, "eps": EPS, "weight_decay": DECAY},
    "rmsprop": {"lr": RATE, "alpha": BETA, "eps": EPS, "weight_decay": DECAY, "momentum": BETA},
    "asgd": {"lr": RATE, "lambd": DECAY, "alpha": Span(0.5, 1.0), "t0": Span(0.5, 4.0), "weight_decay": DECAY},
    "adamax": _ADAM,
    "adafactor": {
        "lr": RATE,
        "beta2_decay": Span(-1.0, -0.5, whole=True),
        "eps": (EPS, EPS),
        "d": Span(1.0, 2.0),
        "weight_decay": DECAY,
    },
    "lion": {"lr": RATE, "betas": (BETA, BETA), "weight_decay": DECAY},
    "rprop": {"lr": RATE, "etas": (Span(0.25, 0.75), Span(1.0625, 1.5)), "step_sizes": (Span(0.001, 0.01), RATE)},
    "muon": {"lr": RATE, "weight_decay": DECAY, "momentum": BETA, "eps": Span(0.0078125, 0.25, whole=True)},
}
"""Rule -> its numbers, simplest rules first."""

SWITCHES: dict[str, tuple[str, ...]] = {
    "sgd": ("nesterov",),
    "adam": ("amsgrad", "decoupled_weight_decay"),
    "adamw": ("amsgrad",),
    "nadam": ("decoupled_weight_decay",),
    "radam": ("decoupled_weight_decay",),
    "rmsprop": ("centered",),
    "muon": ("nesterov",),
}
"""Rule -> its switches, beside `maximize`, which all have."""

NOT_SMOOTH = ("adamax", "adafactor", "lion", "rprop", "muon")
"""Rules with a sign, a maximum or a division by a norm, at whose corners there is no derivative."""

REAL_ONLY = ("adafactor", "muon")


@st.composite
def optimizers(
    draw: st.DrawFn,
    *,
    rules: tuple[str, ...] | None = None,
    hyperparameters: str | None = None,
    smooth: bool = False,
    params: Tree | None = None,
) -> optim.Optimizer:
    """Optimizers with any legal choice of their numbers and switches, such that some steps stay finite.

    Args:
        rules: names in `statelessify.optim`. None: all.
        hyperparameters: what the numbers are: ``"numbers"``, or ``"tensors"``, 0-dim ones of float64 that require a
            gradient; with `params`, ``"dicts"`` from names to tensors. None: any of these, each its own.
        smooth: only rules and switches whose step has derivatives (of every order, where no gradient is zero), and with
            an `eps` that finite differences can live with.
        params: what the optimizer is to train; without it a rule may be drawn that does not fit them: Muon is for
            matrices, and Adafactor not for complex parameters.

    Returns:
        A strategy of optimizers; hypothesis prints them as the call that makes them.

    Raises:
        InvalidArgument: at draw time, if the options leave no rule.

    Example:
        >>> from hypothesis import find
        >>> found = find(optimizers(hyperparameters="tensors"), lambda optimizer: True)
        >>> found.init({}).hyperparameters["lr"].requires_grad
        True
    """
    names = _options.chosen("rules", rules, NUMBERS)
    _options.one_of("hyperparameters", hyperparameters, ("numbers", "tensors", "dicts"))
    require(
        hyperparameters != "dicts" or params is not None,
        '`hyperparameters="dicts"` without `params`, whose names they have; pass `params` as well',
    )
    legal = [name for name in names if not (smooth and name in NOT_SMOOTH) and fits(name, params)]
    require(
        bool(legal),
        f"`rules={rules!r}` with `smooth={smooth!r}` and these `params` leave no rule; smooth are all but "
        f"{_options.listed(NOT_SMOOTH)}, Muon is for matrices only, and Adafactor and Muon for real numbers",
    )
    named = tuple(tree_names(params)) if params is not None else ()
    rule = draw(st.sampled_from(legal))
    return draw(_calls(rule, hyperparameters, smooth, named))


def fits(rule: str, params: Tree | None) -> bool:
    """Whether a rule is for these parameters."""
    leaves: list[Any] = tree_leaves(params) if params is not None else []
    complex_ = any(leaf.is_complex() for leaf in leaves)
    return not ((rule in REAL_ONLY and complex_) or (rule == "muon" and any(leaf.ndim != 2 for leaf in leaves)))


@cache
def _calls(rule: str, kind: str | None, smooth: bool, names: tuple[str, ...]) -> st.SearchStrategy[optim.Optimizer]:
    """Calls of one rule; what is left out has its default, save where that is for other sizes than ours."""
    make: Callable[..., optim.Optimizer] = getattr(optim, rule)
    spans = NUMBERS[rule]
    needed = {"lr", *(("eps",) if smooth and "eps" in spans else ())}
    numbers = {name: _values(span, kind, names, smooth) for name, span in spans.items()}
    switches = [each for each in (*SWITCHES.get(rule, ()), "maximize") if not (smooth and each == "amsgrad")]
    fixed: dict[str, Any] = {"dtype": st.sampled_from([None, torch.float32])} if rule == "muon" else {}
    options = {**numbers, **fixed, **dict.fromkeys(switches, st.booleans())}
    if rule == "muon":
        options["ns_steps"] = st.integers(1, 5)
        options["adjust_lr_fn"] = st.sampled_from(["original", "match_rms_adamw"])
    return _call(rule, make, options, needed | fixed.keys())


@st.composite
def _call(
    draw: st.DrawFn,
    rule: str,
    make: Callable[..., optim.Optimizer],
    options: dict[str, st.SearchStrategy[Any]],
    needed: set[str],
) -> optim.Optimizer:
    given = {name: draw(values) for name, values in options.items() if name in needed or draw(_GIVEN)}
    return draw(st.builds(make, **_just(_legal(rule, given))))  # `builds`, so that hypothesis prints the call


_GIVEN = st.booleans()


def _just(given: Mapping[str, Any]) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.just(value) for name, value in given.items()}


def _legal(rule: str, given: dict[str, Any]) -> dict[str, Any]:
    """Mend what does not go together: Nesterov's momentum needs one, and no dampening; a centered square a memory."""
    if rule == "sgd" and given.get("nesterov"):
        given = {name: value for name, value in given.items() if name != "dampening"}
        if _is_zero(given.get("momentum", 0)):
            given["momentum"] = 0.9
    if rule == "rmsprop" and given.get("centered") and _is_zero(given.get("alpha", 0.99)):
        given["alpha"] = 0.9  # without a memory its divisor is the root of a difference of equal numbers
    return given


def _is_zero(value: Any) -> bool:
    return any(leaf == 0 for leaf in tree_leaves(value))


def _values(
    span: Span | tuple[Span, ...], kind: str | None, names: tuple[str, ...], smooth: bool
) -> st.SearchStrategy[Any]:
    if not isinstance(span, Span):
        return st.tuples(*(_values(each, kind, names, smooth) for each in span))
    positive = st.floats(span.low, span.high)
    numbers = st.one_of(st.just(0.0), positive) if span.zero else positive
    learned = _learned(positive if smooth else numbers)  # differences at zero would take negative numbers as well
    by_name = st.fixed_dictionaries(dict.fromkeys(names, learned)) if names else st.nothing()
    return {"numbers": numbers, "tensors": learned, "dicts": by_name, None: st.one_of(numbers, learned, by_name)}[kind]


@st.composite  # not `map`, which hypothesis would print as a call
def _learned(draw: st.DrawFn, numbers: st.SearchStrategy[float]) -> torch.Tensor:
    return torch.tensor(draw(numbers), dtype=torch.float64, requires_grad=True)
