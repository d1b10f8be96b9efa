"""The gradient of code that takes a tree, by autograd and by `torch.func.grad`, as a tree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from .._close import assert_trees_close
from ._closed import moved
from ._probe import is_inexact, own_leaves

__all__: list[str] = []


class Routes(NamedTuple):
    """The ways to take the gradient of ``value(tree)`` by a tree, and by the tensors that the code closes over."""

    value: Callable[[Any], Tensor]
    closed: dict[str, Tensor]

    def autograd(self, tree: Any) -> Any:
        leaves, spec = tree_flatten(own_leaves(tree))
        own: Any = tree_unflatten(spec, leaves)
        values = own.get("closed", {})
        with moved(self.closed if values else {}, values) as tensors:
            value = self.value({k: part for k, part in own.items() if k != "closed"})
            wanted = [leaf for leaf in leaves if is_inexact(leaf)]
            found: Any = [None] * (len(wanted) + len(tensors))
            if value.requires_grad:
                found = torch.autograd.grad(value, [*wanted, *tensors], allow_unused=True)
        by_leaf = dict(zip(map(id, wanted), found, strict=False))

        def gradient(leaf: Any) -> Any:
            return _zeros(leaf, by_leaf.get(id(leaf)))

        grads: Any = tree_map(gradient, own)
        if values:
            closed = zip(tensors, found[len(wanted) :], strict=True)
            grads["closed"] = {name: _zeros(t, g) for name, (t, g) in zip(self.closed, closed, strict=True)}
        return grads

    def func(self, tree: Any) -> Any:
        leaves, spec = tree_flatten(tree)
        where = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]

        def value(*tensors: Tensor) -> Tensor:
            full = list(leaves)
            for i, tensor in zip(where, tensors, strict=True):
                full[i] = tensor
            return self.value(tree_unflatten(spec, full))

        with silent(True):
            found = torch.func.grad(value, tuple(range(len(where))))(*(leaves[i].detach() for i in where))
        by_place = dict(zip(where, found, strict=True))
        return tree_unflatten(spec, [by_place.get(i, leaf) for i, leaf in enumerate(leaves)])


def _zeros(leaf: Any, grad: Any) -> Any:
    if not is_inexact(leaf):
        return leaf
    return torch.zeros_like(leaf) if grad is None else grad.detach()


def check_func(routes: Routes, tree: Any, required: bool, note: str) -> None:
    """The gradient by `torch.func.grad` is that of autograd, where the code can run under it."""
    try:
        found = routes.func(tree)
    except Exception:
        if required:
            raise
        return
    expected = routes.autograd(tree)
    own = own_leaves(tree)
    value = routes.value({name: part for name, part in own.items() if name != "closed"})
    try:  # all at once: the gradient of one part may be rounding alone, and the others say how large that may be
        same = {name: found[name] for name in expected}
        assert_near(same, expected, ("`torch.func.grad`", "autograd"), note, rounded=float(value.detach().abs()))
    except AssertionError as error:
        raise AssertionError(f"the derivative by `torch.func.grad` is wrong: {error}") from None


def assert_near(
    found: Any, expected: Any, names: tuple[str, str], note: str = "", rtol: float = 1e-8, rounded: float = 0.0
) -> None:
    """Equal up to rounding, relative to the size of the largest leaf, and to that of the number it is derived from."""
    leaves = [leaf for leaf in tree_leaves(expected) if is_inexact(leaf) and leaf.numel()]
    largest = max((float(leaf.detach().abs().max()) for leaf in leaves), default=0.0)
    if any(leaf.dtype not in (torch.float64, torch.complex128) for leaf in leaves):
        rtol = 1e-4
    rounding = max((100 * torch.finfo(leaf.dtype).eps * rounded for leaf in leaves), default=0.0)
    atol = max(1e-2 * rtol * largest, rounding)
    assert_trees_close(found, expected, rtol=rtol, atol=atol, names=names, note=note)


def near(found: Any, expected: Any) -> bool:
    try:
        assert_near(found, expected, ("", ""))
    except AssertionError:
        return False
    return True


@contextmanager
def silent(really: bool) -> Generator[None]:
    """Without the warnings that tell what a mode does not reach, which is what it promises."""
    if not really:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def anew(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The loss as another function, for the library tells once for each what a mode does not reach."""
    return lambda params, batch: loss(params, batch)
