"""A function of a tree as a function of real tensors, and what every check asks of it first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..._tree import flatten_up_to, tree_flatten, tree_names, tree_unflatten
from ...errors import DtypeError, TreeError
from ._probe import is_inexact

__all__: list[str] = []


class RealFunction:
    """``fn(tree)`` as a function of a list of real tensors, one for each leaf that has a derivative.

    A complex leaf counts as its real and imaginary parts, whose derivatives are those of torch's convention. Integer
    tensors and what is no tensor go along as they are.

    Attributes:
        names: of the leaves that have a derivative.
        outputs: names of the outputs that have one, after a call.
    """

    def __init__(self, fn: Callable[[Any], Any], tree: Any, what: str = "fn") -> None:
        self.fn = fn
        self.what = what
        self.leaves, self.spec = tree_flatten(tree)
        self.where = [i for i, leaf in enumerate(self.leaves) if is_inexact(leaf)]
        names = tree_names(tree)
        self.names = [names[i] for i in self.where]
        self.outputs: list[str] = []
        self.pairs: list[bool] = []
        if not self.where:
            raise DtypeError(
                "`tree` has no leaf to differentiate: no tensor of a floating or complex dtype; pass floating tensors"
            )

    def point(self, wide: bool = False) -> list[Tensor]:
        """The leaves as real tensors of their own; `wide`: in float64."""
        found = [_real(self.leaves[i].detach().clone().resolve_conj()) for i in self.where]
        return [p.to(torch.float64) for p in found] if wide else found

    def tree(self, point: Sequence[Tensor]) -> Any:
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for i, part in zip(self.where, point, strict=True):
            leaves[i] = torch.view_as_complex(part) if self.leaves[i].is_complex() else part
        return tree_unflatten(self.spec, leaves)

    def __call__(self, point: Sequence[Tensor]) -> list[Tensor]:
        return self.of(self.tree(point))

    def of(self, tree: Any) -> list[Tensor]:
        """The outputs for a tree, as real tensors."""
        result = self.fn(tree)
        leaves, _ = tree_flatten(result)
        names = tree_names(result)
        kept = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
        if not kept:
            given = type(result).__name__ if not isinstance(result, Tensor) else f"a tensor of {result.dtype}"
            raise DtypeError(
                f"`{self.what}` returned {given}, which has no derivative; return floating tensors (`.item()` and "
                "numpy cut the graph)"
            )
        self.outputs = [names[i] for i in kept]
        self.pairs = [leaves[i].is_complex() for i in kept]
        return [_real(leaves[i]) for i in kept]

    def given(self, grads: Callable[[Any], Any], point: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that the user's function returns, as real tensors; None is zero."""
        result = grads(self.tree(point))
        try:
            found = flatten_up_to(self.spec, result)
        except ValueError as error:
            raise TreeError(f"`grads` returned a tree of another structure than `tree`: {error}") from None
        parts: list[Tensor] = []
        for name, i, p in zip(self.names, self.where, point, strict=True):
            gradient = found[i]
            if gradient is None:
                parts.append(torch.zeros_like(p))
                continue
            if not isinstance(gradient, Tensor) or gradient.shape != self.leaves[i].shape:
                shape = f"of shape {tuple(gradient.shape)}" if isinstance(gradient, Tensor) else "that is no tensor"
                raise TreeError(
                    f"`grads` returned a gradient {shape} for leaf `{name}`, which has shape "
                    f"{tuple(self.leaves[i].shape)}"
                )
            wrapped = gradient.to(gradient.dtype.to_complex()) if self.leaves[i].is_complex() else gradient
            parts.append(_real(wrapped))
        return parts

    def entry_words(self, leaf: int, index: tuple[int, ...]) -> tuple[list[int], str]:
        """The index of an entry in the user's leaf, and which part of a complex one it is."""
        if self.leaves[self.where[leaf]].is_complex():
            return list(index[:-1]), ("real part: ", "imaginary part: ")[index[-1]]
        return list(index), ""


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def check_repeatable(function: RealFunction, point: list[Tensor]) -> list[Tensor]:
    """The outputs; an AssertionError if a second call differs, an input has changed, or a value is not finite."""
    tree = function.tree([p.clone().requires_grad_() for p in point])
    held, spec = tree_flatten(tree)
    names = tree_names(tree)
    before = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in held]
    try:
        outputs = [output.detach().clone() for output in function.of(tree)]
    except RuntimeError:
        with suppress(Exception), torch.no_grad():  # torch refuses in-place changes of leaves that need a gradient
            for leaf in held:
                if is_inexact(leaf):
                    leaf.requires_grad_(False)
            function.of(tree)
        _check_untouched(function.what, names, held, before)
        raise
    _check_untouched(function.what, names, held, before)
    again = [output.detach() for output in function([p.clone().requires_grad_() for p in point])]
    if tree_flatten(tree)[1] != spec:
        raise AssertionError(f"`{function.what}` changes its input: entries were added or removed; work on a copy")
    for name, one, two in zip(function.outputs, outputs, again, strict=True):
        where = f" (output `{name}`)" if name else ""
        if one.shape != two.shape:
            raise AssertionError(f"`{function.what}` is not deterministic: two calls differ in shape{where}")
        if not bool(one.isfinite().all()):
            raise AssertionError(
                f"the value of `{function.what}` is not finite{where}: there is no derivative to check; choose "
                "another point"
            )
        size = float(one.abs().max()) if one.numel() else 0.0
        gap = float((one - two).abs().max()) if one.numel() else 0.0
        if not gap <= 1e3 * torch.finfo(one.dtype).eps * size:
            raise AssertionError(
                f"`{function.what}` is not deterministic: two calls with the same tensors differ by {gap:.2g}{where}; "
                "seed its random numbers inside (`torch.manual_seed`, a `torch.Generator`), or switch dropout off"
            )
    return outputs


def _check_untouched(what: str, names: list[str], held: list[Any], before: list[Any]) -> None:
    for name, leaf, old in zip(names, held, before, strict=True):
        if isinstance(leaf, Tensor) and not bool(((leaf == old) | ((leaf != leaf) & (old != old))).all()):
            raise AssertionError(f"`{what}` changes its input: leaf `{name}` was written in place; work on a copy")
