"""What several checks need: own leaves, one number of an output, gradients by it, seeds, and what was before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ..._random import random_state, set_random_state
from ..._tree import tree_flatten, tree_leaves, tree_map, tree_names, tree_unflatten
from .._close import assert_trees_close
from .._paste import paste

__all__: list[str] = []


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Random numbers from a seed; afterwards torch's generators stand where they stood."""
    before = random_state()
    torch.default_generator.manual_seed(seed)
    if len(before) > 1:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        set_random_state(before)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf can have a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def widened(leaf: Any) -> Any:
    """A copy of a leaf in float64 or complex128; as it is what has no derivative."""
    if not is_inexact(leaf):
        return leaf
    return leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64, copy=True)


def own_leaves(tree: Any, wanted: Sequence[bool] | None = None) -> Any:
    """The tree with tensors of its own, of which those require a gradient that are wanted: all that can."""
    leaves, spec = tree_flatten(tree)
    wanted = list(map(is_inexact, leaves)) if wanted is None else wanted
    pairs = zip(leaves, wanted, strict=True)
    own = [leaf.detach().clone().requires_grad_(w) if isinstance(leaf, Tensor) else leaf for leaf, w in pairs]
    return tree_unflatten(spec, own)


def accepted(call: Callable[[Any], Any], tree: Any) -> list[bool]:
    """Which leaves of a tree may require a gradient: those that can, save running statistics and the like.

    `call` is called with the tree; torch refuses some gradients as soon as a function is called.
    """

    def runs(wanted: list[bool]) -> bool:
        try:
            with seeded(1):
                call(copies(own_leaves(tree, wanted)))
        except RuntimeError:
            return False
        return True

    can = list(map(is_inexact, tree_leaves(tree)))
    if runs(can) or not runs([False] * len(can)):  # else the error is the function's own
        return can
    return [w and runs([i == k for k in range(len(can))]) for i, w in enumerate(can)]


def copies(tree: Any) -> Any:
    """The tree with tensors of its own in the same graph, which may be written into."""

    def own(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(own, tree)


def plain(tree: Any) -> Any:
    """The tree without its graph, in containers that can be compared; sparse tensors become dense."""
    if isinstance(tree, Tensor):
        found = tree.detach()
        return found.to_dense() if found.layout != torch.strided else found.clone()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return {name: plain(value) for name, value in fields.items() if value is not None}
    leaves, spec = tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return tree if isinstance(tree, (bool, int, float, complex, str)) else type(tree).__name__
    return tree_unflatten(spec, [plain(leaf) for leaf in leaves])


def number(tree: Any) -> Tensor | None:
    """A real number that depends on every entry of every tensor, on no two of them alike; None if none has a graph."""
    total: Tensor | None = None
    for position, leaf in enumerate(_tensors(tree)):
        if not is_inexact(leaf) or not leaf.requires_grad:
            continue
        dense = leaf.to_dense() if leaf.layout != torch.strided else leaf
        values = (torch.view_as_real(dense) if dense.is_complex() else dense).reshape(-1).double()
        values = torch.where(values.detach().isfinite(), values, 0)
        weights = torch.linspace(0.5, 1.5 + 0.25 * position, values.numel(), dtype=values.dtype, device=values.device)
        part = (values * weights).sum()
        total = part if total is None else total + part.to(total.device)
    return total


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def needing(tree: Any) -> dict[str, Tensor]:
    """Every leaf that requires a gradient, by name."""
    pairs = zip(tree_names(tree), tree_leaves(tree), strict=True)
    return {name: leaf for name, leaf in pairs if isinstance(leaf, Tensor) and leaf.requires_grad}


def gradients(value: Tensor | None, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient by each tensor; zero where the value does not depend on it."""
    if value is None or not value.requires_grad or not wanted:
        return {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    found: Any = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else cast("Tensor", plain(grad))
        for (name, leaf), grad in zip(wanted.items(), found, strict=True)
    }


class Unwritten:
    """Trees as they were when they were handed to someone, who must not write into them."""

    def __init__(self, **trees: Any) -> None:
        self._trees = trees
        self._before = {name: (tree_flatten(tree), plain(tree)) for name, tree in trees.items()}

    def check(self, who: str, note: str) -> None:
        """Raise an AssertionError that names what `who` has written into."""
        for name, tree in self._trees.items():
            (leaves, spec), before = self._before[name]
            now, other = tree_flatten(tree)
            if other != spec or any(a is not b for a, b in zip(leaves, now, strict=True)):
                raise AssertionError(f"{who} put other tensors into `{name}`, which it was given\n  {note}")
            try:
                assert_trees_close({name: plain(tree)}, {name: before}, rtol=0, atol=0, equal_nan=True, names=AFTER)
            except AssertionError as error:
                raise AssertionError(f"{who} wrote into `{name}`, which it was given:\n  {error}\n  {note}") from None


AFTER = ("after", "before")


def call_of(check: str, subject: Any, args: Any, **options: Any) -> str:
    """The line that repeats a check; what has no code of its own stands there by its name."""
    given = [code_of(subject), *map(paste, args)]
    given += [f"{name}={value if isinstance(value, str) else paste(value)}" for name, value in options.items()]
    return f"to reproduce: {check}({', '.join(given)})"


def code_of(value: Any) -> str:
    """A drawn module's code; the name of a function or class; of anything else what it prints, if that is short."""
    recipe = getattr(value, "_recipe", None)
    if isinstance(getattr(recipe, "code", None), str):
        return cast("Any", recipe).code
    text = getattr(value, "__name__", None) or repr(value)
    return text if "\n" not in text and len(text) <= 60 else type(value).__name__
