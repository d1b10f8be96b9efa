"""What a step is given, checked before anything is computed: parameters, gradients, and the state of this very rule.

No mode needs to see that: it is called under `unseen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from .._tree import first_difference, flatten_up_to, require_floating, tree_flatten, tree_names
from .._words import listed
from ..errors import DtypeError, ShapeError, TreeError
from ..typing import Tree
from ._optimizer import OptState

__all__: list[str] = []


class Names:
    """The names of a tree's leaves, made when they are asked for."""

    def __init__(self, params: Tree) -> None:
        self._params = params
        self._names: list[str] | None = None

    def __call__(self) -> list[str]:
        if self._names is None:
            self._names = tree_names(self._params)
        return self._names


_SHAPE, _KIND = attrgetter("shape"), attrgetter("layout", "dtype", "shape")
_LAYOUT = itemgetter(0)
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _is_quick(leaves: Iterable[Any]) -> bool:
    """Whether these are ordinary tensors, which can be looked at in a few operations that run in C."""
    return not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, leaves))


def shapes_of(params: Tree, leaves: Sequence[Any]) -> list[torch.Size]:
    """The shape of each parameter."""
    if _is_quick(leaves):
        return [*map(_SHAPE, leaves)]
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        require_floating(params, "params")
    return [leaf.shape for leaf in leaves]


def aligned(spec: Any, grads: Tree) -> list[Any]:
    """What stands in `grads` where the parameters have their leaves (None too)."""
    try:
        return flatten_up_to(spec, grads)
    except ValueError:
        raise TreeError(
            f"`params` and `grads` have different structures: {first_difference(spec, tree_flatten(grads)[1])}"
        ) from None


def gradients_of(
    names: Names, leaves: Sequence[Tensor], shapes: Sequence[torch.Size], spec: Any, grads: Tree
) -> list[Tensor]:
    """The gradient of each leaf; zero where there is none."""
    found = list(grads.values()) if spec is None else aligned(spec, grads)  # None: a flat dict like `params`
    if _is_quick(found):
        kinds = [*map(_KIND, found)]
        if kinds == [*map(_KIND, leaves)] and {*map(_LAYOUT, kinds)} == {torch.strided}:
            return found
    sparse: list[int] = []
    for index, (leaf, shape, gradient) in enumerate(zip(leaves, shapes, found, strict=True)):
        if gradient is None:
            found[index] = torch.zeros_like(leaf)
        elif not isinstance(gradient, Tensor):
            raise DtypeError(f"the gradient of `{names()[index]}` is {type(gradient).__name__}, not a tensor")
        elif gradient.shape != shape:
            raise ShapeError(
                f"the gradient of `{names()[index]}` has shape {tuple(gradient.shape)}, the parameter has "
                f"{tuple(shape)}; pass one of the parameter's shape"
            )
        elif gradient.dtype != leaf.dtype:
            raise DtypeError(
                f"the gradient of `{names()[index]}` is {gradient.dtype}, the parameter is {leaf.dtype}; cast it "
                "with `grad.to(param.dtype)`"
            )
        elif gradient.layout != torch.strided:
            sparse.append(index)
    for index in sparse:
        found[index] = found[index].to_dense()
    return found


def require_state(state: Any, rule: str, slots: Iterable[str] = ()) -> None:
    """Refuse what is no state, or that of another rule; `slots` are those that this one has."""
    if not isinstance(state, OptState):
        raise TreeError(f"the state is {type(state).__name__}, not an `OptState`; pass what `init(params)` gives")
    owner = getattr(state.hyperparameters, "rule", "") or rule
    if owner != rule:
        raise _other(state, owner, rule, slots)


def require_options(state: OptState, rule: str, slots: Iterable[str], hyperparameters: Iterable[str]) -> None:
    """Refuse what is no state of a rule with these options."""
    require_state(state, rule, slots)
    if state.slots.keys() - {"step"} != set(slots):
        raise _other(state, rule, rule, slots)
    if state.hyperparameters.keys() != set(hyperparameters):
        raise TreeError(
            f"the state has the hyperparameters {listed(state.hyperparameters)}, but `{rule}` has "
            f"{listed(hyperparameters)}; replace values in `state.hyperparameters`, not names"
        )


def _other(state: OptState, owner: str, rule: str, slots: Iterable[str]) -> TreeError:
    return TreeError(
        f"the state is one of `{owner}` with the slots {listed(state.slots)}, but this optimizer is `{rule}` with "
        f"{listed(slots)}; pass the state of an optimizer of the same kind and options"
    )


def leaves_of(names: Names, spec: Any, slot: str, tree: Tree, wanted: list[torch.Size] | None) -> list[Tensor]:
    """The leaves of a slot in the order of the parameters, checked to be of these shapes; None for any."""
    column, own = tree_flatten(tree)
    if own != spec:  # another kind of container may have the same names
        by_name = dict(zip(tree_names(tree), column, strict=True))
        if by_name.keys() != set(names()):
            raise TreeError(
                f"slot `{slot}` of the state does not fit the parameters {listed(names())}: it has {listed(by_name)}; "
                "pass a state of these parameters"
            )
        column = [by_name[name] for name in names()]
    found = [getattr(leaf, "shape", None) for leaf in column]
    if wanted is not None and found != wanted:
        words = ["no shape" if shape is None else tuple(shape) for shape in found]
        raise ShapeError(
            f"slot `{slot}` of the state does not fit the parameters {listed(names())}: it has {words}, not "
            f"{[tuple(shape) for shape in wanted]}; pass a state of these parameters (with `in_dims=0`, both per task)"
        )
    return column
