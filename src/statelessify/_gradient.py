"""The gradient of an inner step."""

from __future__ import annotations

import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ._graph import gradients_of, is_once_differentiable, nodes
from ._transforms import transforming
from ._tree import tree_detach, tree_flatten, tree_leaves, tree_map, tree_names, tree_unflatten
from .errors import DerivativeError
from .rules._registry import rules, rules_here

__all__: list[str] = []

_warned: set[Any] = set()


def _warn_of_lost(total: Tensor, inputs: list[Tensor], aux: Any, given: Any, source: Callable[..., Any]) -> None:
    """Name the tensors that need a gradient and get none through first-order steps; once for each loss."""
    key = getattr(source, "__code__", id(source))
    if key in _warned:
        return
    reached = _leaf_variables([t for t in (*inputs, *tree_leaves(aux)) if isinstance(t, Tensor)]) | {
        id(p): p for p in inputs
    }
    lost = {key: leaf for key, leaf in _leaf_variables([total]).items() if key not in reached}
    if not lost:
        return
    _warned.add(key)
    names = {id(leaf): name for name, leaf in zip(tree_names(given), tree_leaves(given), strict=True)}
    words = [
        f"`{names[key]}`" if key in names else f"a closed-over tensor of shape {tuple(leaf.shape)}"
        for key, leaf in lost.items()
    ]
    warnings.warn(
        f"`FirstOrder()` takes the inner gradients as constants, so the inner loop passes no gradient to "
        f"{', '.join(words)}; write `gradient=Unroll()` if it should, or detach it to silence this",
        stacklevel=6,
    )


def _leaf_variables(results: Iterable[Tensor]) -> dict[int, Tensor]:
    """The leaf tensors that a graph ends in."""
    return {id(node.variable): node.variable for node in nodes(results) if hasattr(node, "variable")}


_differentiable: dict[tuple[int, int], weakref.ref[Any]] = {}
"""Losses whose graph has been looked at, by object and method, for as long as the object lives."""


def _check_twice_differentiable(values: Tensor, inputs: Sequence[Tensor], source: Callable[..., Any]) -> None:
    """Refuse a backward that cuts its own graph: torch takes its second derivative for zero. Once for each loss."""
    method = isinstance(source, types.MethodType)  # made anew at each look, unlike the object that it belongs to
    owner, key = (source.__self__, (id(source.__self__), id(source.__func__))) if method else (source, (id(source), 0))
    if key in _differentiable:
        return
    for node in nodes([values], inputs):
        if is_once_differentiable(node):
            raise DerivativeError(
                f"the loss uses an autograd.Function ({type(node).__name__}) whose backward is marked as "
                "`@once_differentiable`: a meta-gradient would lose its second derivative without an error; remove "
                "the mark and write backward with differentiable operations, or write `gradient=FirstOrder()`"
            )
    with suppress(TypeError):  # not every object can be told to be gone
        _differentiable[key] = weakref.ref(owner, lambda gone: _differentiable.pop(key, None))


_NOTHING = nullcontext()

Evaluate = Callable[[Any], tuple[Tensor, Any]]
"""``evaluate(params) -> (values, aux)``; the gradient is that of ``values.sum()``."""


def value_and_grad(
    evaluate: Evaluate, params: Any, differentiable: bool, source: Callable[..., Any], given: Any
) -> tuple[Tensor, Any, Any]:
    """``(values, aux, grads)`` of a function of `params`, whose gradient is taken of the sum of its values.

    In eager code by `torch.autograd.grad`, inside any transform and under dynamo by `torch.func.grad`: the former fails
    inside vmap, under jvp, for constants and in one graph; the latter costs more. A parameter that is not reached has
    gradient zero either way. Where nothing is recorded, neither values nor `aux` nor gradients have a graph.
    `source` is the user's loss and `given` what it is given beside the parameters, for a warning.
    """
    if transforming():
        return _functional(evaluate, params, differentiable, source)
    return _eager(evaluate, params, differentiable, source, given)


def _eager(
    evaluate: Evaluate, params: Any, differentiable: bool, source: Callable[..., Any], given: Any
) -> tuple[Tensor, Any, Any]:
    recording = torch.is_grad_enabled()
    leaves, spec = tree_flatten(params)
    with _NOTHING if recording else torch.enable_grad():
        inputs = [p if recording and p.requires_grad else p.detach().requires_grad_() for p in leaves]
        known = params if all(map(operator.is_, leaves, inputs)) else tree_unflatten(spec, inputs)
        create = recording and differentiable
        # The third derivative of torch's fused norms is wrong, and that is the second one of the meta-loss.
        with rules("gradients") if create else _NOTHING:
            values, aux = evaluate(known)
        if create:
            _check_twice_differentiable(values, inputs, source)
        total = values.sum() if values.ndim else values
        tensors = [] if aux is None else [t for t in tree_leaves(aux) if isinstance(t, Tensor)]
        aux_needs_graph = recording and any(t.requires_grad for t in tensors)
        if recording and not differentiable:
            _warn_of_lost(total, inputs, aux, given, source)
        if total.requires_grad and inputs:
            found = gradients_of(total, inputs, create, aux_needs_graph)
        else:
            found = (None,) * len(inputs)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
    if not recording:
        # A carry that the loss hands on as it is stays the same tensor, by which it is known.
        aux = tree_map(_without_graph, aux)
    return values if create else values.detach(), aux, tree_unflatten(spec, grads)


def _without_graph(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _functional(
    evaluate: Evaluate, params: Any, differentiable: bool, source: Callable[..., Any]
) -> tuple[Tensor, Any, Any]:
    recording = torch.is_grad_enabled()
    leaves, spec = tree_flatten(params)
    aside: list[Any] = []

    def summed(*inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with rules_here():  # the loss may call them itself
            values, aux = evaluate(tree_unflatten(spec, inputs))
        if recording and differentiable and not torch.compiler.is_compiling():
            _check_twice_differentiable(values, inputs, source)
        parts, aux_spec = tree_flatten(aux)
        aside.append(([None if isinstance(t, Tensor) else t for t in parts], aux_spec))
        return values.sum(), (values, *(t for t in parts if isinstance(t, Tensor)))

    if leaves:
        found, (values, *tensors) = torch.func.grad(summed, argnums=tuple(range(len(leaves))), has_aux=True)(*leaves)
    else:
        found, (_, (values, *tensors)) = (), summed()
    parts, aux_spec = aside[-1]
    remaining = iter(tensors)
    aux = tree_unflatten(aux_spec, [next(remaining) if t is None else t for t in parts])
    grads = tree_unflatten(spec, found)
    if differentiable:
        return values, aux, grads
    return values.detach(), aux, tree_detach(grads)
