"""Every rule of `statelessify.optim`: a legal value for each of its numbers, and parameters that it can train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import optim

_ADAM = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}
VALUES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "adam": _ADAM,
    "adamw": _ADAM,
    "nadam": {**_ADAM, "momentum_decay": 0.3},
    "radam": _ADAM,
    "adamax": _ADAM,
    "adagrad": {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 0.1},
    "adadelta": {"lr": 0.5, "rho": 0.8, "eps": 0.1, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.1, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.5},
    "asgd": {"lr": 0.1, "lambd": 0.2, "alpha": 0.75, "t0": 0.5, "weight_decay": 0.1},
    "rprop": {"lr": 0.1, "etas": (0.7, 1.2), "step_sizes": (0.06, 0.13)},
    "adafactor": {"lr": 0.1, "beta2_decay": -0.8, "eps": (0.5, 2.0), "d": 1.1, "weight_decay": 0.1},
    "lion": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1},
    "muon": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "ns_coefficients": (3.4, -4.7, 2.0), "eps": 1.0},
}
"""Every number of every rule, such that each of them is felt."""

_OTHERS: dict[str, dict[str, Any]] = {"muon": {"dtype": None, "ns_steps": 2}}
SWITCHES: dict[str, tuple[str, ...]] = dict.fromkeys(VALUES, ("maximize",)) | {
    "sgd": ("nesterov", "maximize"),
    "adam": ("amsgrad", "maximize", "decoupled_weight_decay"),
    "adamw": ("amsgrad", "maximize"),
    "nadam": ("decoupled_weight_decay", "maximize"),
    "radam": ("decoupled_weight_decay", "maximize"),
    "rmsprop": ("centered", "maximize"),
    "muon": ("nesterov", "maximize"),
}
REAL = ("adafactor", "muon")  # no complex parameters
WHOLE = {("adafactor", "beta2_decay"), ("muon", "ns_coefficients"), ("muon", "eps")}  # no value per entry

EACH_RULE = pytest.mark.parametrize("rule", VALUES)
NUMBERS = [(rule, name) for rule in VALUES for name in VALUES[rule]]
EACH_NUMBER = pytest.mark.parametrize(("rule", "name"), NUMBERS)
EACH_SWITCH = pytest.mark.parametrize(("rule", "switch"), [(rule, each) for rule in VALUES for each in SWITCHES[rule]])


def make(rule: str, **given: Any) -> optim.Optimizer:
    """The rule with a value other than the default for everything; `given` replaces some of it."""
    return getattr(optim, rule)(**(VALUES[rule] | _OTHERS.get(rule, {}) | given))


def learned_numbers(rule: str) -> dict[str, Any]:
    """Each number of the rule as a tensor that requires a gradient."""
    return {
        name: with_each(value, lambda v: torch.tensor(v, dtype=torch.float64, requires_grad=True))
        for name, value in VALUES[rule].items()
    }


def steps_of(rule: str) -> int:
    """So many that everything has been seen: RAdam's rectification begins at step 6, Rprop waits after a turn."""
    return {"radam": 7, "rprop": 5}.get(rule, 3)


def dtypes_of(rule: str) -> list[torch.dtype]:
    return [torch.float64] if rule in REAL else [torch.float64, torch.complex128]


def shapes_of(rule: str) -> dict[str, tuple[int, ...]]:
    """Five parameters of one shape, as many as are updated together, among others."""
    several = dict.fromkeys([f"tail.{index}" for index in range(5)], (2, 2) if rule == "muon" else (2,))
    if rule == "muon":
        return {"body.w": (2, 3), "body.b": (3, 3), **several, "head.w": (4, 2)}
    return {"body.w": (2, 3), "body.b": (3,), **several, "head.w": ()}


def tensors_of(rule: str, *tasks: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.randn((*tasks, *shape), dtype=dtype) for name, shape in shapes_of(rule).items()}


def gradients_of(rule: str, *tasks: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Gradients for `steps_of` steps, such that no entry stands at a corner of any rule."""
    return [tensors_of(rule, *tasks, dtype=dtype) for _ in range(steps_of(rule))]


def run(optimizer: optim.Optimizer, params: Any, gradients: Iterable[Any], state: Any = None) -> tuple[Any, Any]:
    state = optimizer.init(params) if state is None else state
    for grads in gradients:
        params, state = optimizer.step(params, grads, state)
    return params, state


def with_each(value: Any, fn: Callable[[Any], Any]) -> Any:
    """`fn` of a number, or of each number of a pair."""
    return tuple(map(fn, value)) if isinstance(value, tuple) else fn(value)


class _NoArithmetic(TorchDispatchMode):
    """Fails where floating-point numbers are read, or combined."""

    allowed = ("zeros_like", "new_zeros", "detach", "clone")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        floating = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args))
        if floating and func.overloadpacket.__name__ not in self.allowed:
            pytest.fail(f"{func} was computed before the refusal")
        return func(*args, **(kwargs or {}))


@contextmanager
def refused(error: Any, words: str, *trees: Any) -> Iterator[None]:
    """Expects an error, and that before it nothing was computed, and nothing in the trees changed."""
    before = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, trees)
    with pytest.raises(error, match=words), _NoArithmetic():
        yield
    assert_close(trees, before, 0.0)
