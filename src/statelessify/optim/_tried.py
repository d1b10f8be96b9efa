"""The derivative of a foreign step, tried against finite differences before it is relied upon."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .._transforms import unwrapped
from .._tree import tree_flatten, tree_map, tree_unflatten
from ..errors import DerivativeError, StatelessifyError
from ._optimizer import OptState

__all__: list[str] = []

_STEPS, _NUDGE = 3, 1e-6
_RELATIVE, _ABSOLUTE = 1e-3, 1e-8

Init = Callable[[dict[str, Tensor], dict[str, Any]], OptState]
"""``init(params, hyperparameters)``: a new optimizer, made with these numbers."""

Run = Callable[[dict[str, Tensor], dict[str, Any], OptState], tuple[dict[str, Tensor], OptState]]


def require_derivatives(owner: str, run: Run, init: Init, params: dict[str, Tensor], given: dict[str, Any]) -> None:
    """Refuse a step whose recorded derivatives are not those of its values.

    Three steps are run on random numbers in float64, of the shapes of `params`; `given` are the hyperparameters that
    replace those of the initial state. A derivative by the initial parameters, the gradients of each step, and every
    hyperparameter that is a tensor has to be the finite difference in a random direction.

    Raises:
        DerivativeError: it is not.
    """
    like = {name: (leaf.shape, leaf.is_complex(), leaf.device) for name, leaf in params.items()}
    given = tree_map(_plain, given)
    with ThreadPoolExecutor(1) as outside, torch.random.fork_rng(devices=[]):  # of transforms, modes and no_grad
        try:
            complaint = outside.submit(_complaint, run, init, like, given).result()
        except StatelessifyError:
            raise
        except Exception as error:
            raise DerivativeError(
                f"the derivative of a step of {owner} could not be tried on random numbers in float64: {error}"
            ) from error
    if complaint:
        raise DerivativeError(
            f"the step of {owner} loses a derivative by {complaint}; for values alone call it under "
            "`torch.no_grad()`, else use a rule of `statelessify.optim`, or write the update out of place as an "
            "`optim.Optimizer`"
        )


def _complaint(run: Run, init: Init, like: dict[str, Any], given: dict[str, Any]) -> str:
    torch.manual_seed(0)
    start, weights, *gradients = ([_random(*each) for each in like.values()] for _ in range(2 + _STEPS))
    leaves, spec = tree_flatten(given)
    numbers = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def value(inputs: list[list[Tensor]]) -> Tensor:
        torch.manual_seed(1)  # the same noise each time
        replaced = iter(inputs[-1])
        filled = tree_unflatten(spec, [next(replaced) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        known = tree_map(_wide, init(dict(zip(like, inputs[0], strict=True)), filled))
        known = known._replace(hyperparameters={**known.hyperparameters, **filled})
        moved = dict(zip(like, inputs[0], strict=True))
        for grads in inputs[1:-1]:
            moved, known = run(moved, dict(zip(like, grads, strict=True)), known)
        return torch.stack([_dot(*pair) for pair in zip(moved.values(), weights, strict=True)]).sum()

    inputs = [start, *gradients, numbers]
    variables = [[leaf.clone().requires_grad_() for leaf in each] for each in inputs]
    recorded = value(variables)
    flat = [leaf for each in variables for leaf in each]
    found = torch.autograd.grad(recorded, flat, allow_unused=True) if recorded.requires_grad else (None,) * len(flat)
    slopes = iter(found)
    claimed = [[next(slopes) for _ in each] for each in inputs]
    what = ["the initial parameters", *(f"the gradients of step {1 + k}" for k in range(_STEPS)), "a hyperparameter"]
    moves = [(place, list(range(len(each)))) for place, each in enumerate(inputs[:-1])]
    for place, some in [*moves, *((len(inputs) - 1, [index]) for index in range(len(numbers)))]:
        ways = [torch.randn_like(leaf) if i in some else torch.zeros_like(leaf) for i, leaf in enumerate(inputs[place])]
        said = sum(_dot(s, way).item() for s, way in zip(claimed[place], ways, strict=True) if s is not None)

        def end(sign: float, place: int = place, ways: list[Tensor] = ways) -> float:
            nudged = [leaf + sign * _NUDGE * way for leaf, way in zip(inputs[place], ways, strict=True)]
            with torch.no_grad():
                return value([*inputs[:place], nudged, *inputs[place + 1 :]]).item()

        true = (end(1) - end(-1)) / (2 * _NUDGE)
        if not abs(said - true) <= _RELATIVE * max(abs(said), abs(true)) + _ABSOLUTE:
            return f"{what[place]}: on random numbers it is {said:.3g}, and finite differences give {true:.3g}"
    return ""


def _random(shape: torch.Size, is_complex: bool, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128 if is_complex else torch.float64, device=device)


def _plain(leaf: Any) -> Any:
    """A tensor of one value, in place of one that transforms may hold."""
    if not isinstance(leaf, Tensor):
        return leaf
    value = unwrapped(leaf).detach().flatten()[0].item()
    return torch.full(leaf.shape, value, dtype=torch.float64, device=leaf.device)


def _wide(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.conj() * y).real.sum()
