"""Modules that are compositions of torch's layers, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import _options
from ._blocks import Chain
from ._layers import FAMILIES, Layer, Shape, Wanted, embedding
from ._options import require
from ._recipe import Call, Indices, recipe_of, seeded, with_code
from ._tensors import tensors

__all__ = ["inputs_for", "modules"]

NAMES = (*FAMILIES, "embedding")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Plan(NamedTuple):
    """What a module is made of.

    Attributes:
        layers: calls that make them.
        takes: its inputs.
        out: the shape of its output, without the batch dimension.
    """

    layers: tuple[Call, ...]
    takes: tuple[Shape | Indices, ...]
    out: Shape


class Finish(NamedTuple):
    """What is left to choose once its layers are there.

    Attributes:
        dtype: of its tensors.
        training: whether all parts are in training (True), or in eval mode (False); None: each part its own.
        frozen: whether parameters may require no gradient.
    """

    dtype: torch.dtype
    training: bool | None
    frozen: bool


@st.composite
def modules(
    draw: st.DrawFn,
    *,
    layers: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
    smooth: bool = False,
    random: bool = True,
    training: bool | None = None,
    frozen: bool | None = None,
    max_depth: int = 3,
) -> nn.Module:
    """Small modules: chains of torch's layers, with tied and shared weights, buffers and parametrizations.

    Args:
        layers: names of families: ``"linear"``, ``"activation"``, ``"norm"``, ``"conv"``, ``"pool"``, ``"reshape"``,
            ``"recurrent"``, ``"attention"``, ``"dropout"``, ``"residual"``, ``"tied"``, ``"shared"``, ``"buffered"``,
            ``"bilinear"``, ``"parametrized"``, ``"embedding"``. None: all.
        dtype: of floating-point parameters and buffers. None: float32 or float64.
        smooth: only layers with derivatives of every order that finite differences can follow.
        random: whether there may be layers whose output is random, such as dropout.
        training: True: in training mode; False: in eval mode. None: each part in its own.
        frozen: whether there are parameters that require no gradient: False: none. None: any may be.
        max_depth: the most layers in the chain.

    Returns:
        A strategy of modules; `inputs_for` has arguments for them, and hypothesis prints them as code.

    Raises:
        InvalidArgument: at draw time, if the options leave no module.

    Example:
        >>> from hypothesis import find
        >>> find(modules(), lambda module: True)
        Linear(in_features=1, out_features=1, bias=True)
    """
    wanted = Wanted(smooth, random)
    _options.floating("dtype", dtype)
    _options.count("max_depth", max_depth)
    require(frozen in (None, False), f"`frozen={frozen!r}`; write False for none, or None for any")
    plan = draw(plans(tuple(_options.chosen("layers", layers, NAMES)), wanted, max_depth, None))
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    return finished(draw, plan, Finish(dtype, training, frozen is None))


def finished(draw: st.DrawFn, plan: Plan, finish: Finish) -> nn.Module:
    """The module of a plan, with weights, modes and frozen parts."""
    made = plan.layers[0] if len(plan.layers) == 1 else Call(Chain, plan.layers, {})
    module: nn.Module = made.make()
    options: dict[str, Any] = {"takes": [*plan.takes], "dtype": finish.dtype}
    seed = draw(st.integers(0, 999))
    if finish.frozen:
        names = [name for name, _ in module.named_parameters()]
        if draw(_MORE) and names:
            options["frozen"] = draw(some_of(tuple(names)))
    if finish.training is None:
        parts = cast("Any", module).named_modules()
        modes = draw(evaluating(tuple(name for name, _ in parts)))
        options |= {"evaluating": modes} if modes else {}
    elif not finish.training:
        options["evaluating"] = True
    code = ", ".join([made.code(), repr(seed), *(f"{name}={value!r}" for name, value in options.items())])
    return with_code(seeded(module, seed, **options), f"seeded({code})")


@cache
def some_of(names: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), unique=True, min_size=1)


@cache
def evaluating(names: tuple[str, ...]) -> st.SearchStrategy[bool | list[str]]:
    either = st.sampled_from([False, True])
    return either if len(names) == 1 else st.one_of(either, some_of(names))


@cache
def plans(names: tuple[str, ...], wanted: Wanted, max_depth: int, features: Shape | None) -> st.SearchStrategy[Plan]:
    """Plans of modules; `features` is the shape of the input, None for any."""
    starts: list[Callable[[st.DrawFn], Shape | Indices]] = []
    if features is not None:
        starts.append(lambda draw: features)
    else:
        starts += [_start(rank) for rank in (1, 2, 3, 4) if _fitting(names, (2,) * rank, wanted)]
        starts += [_indices] if "embedding" in names else []
    return _plans(names, wanted, max_depth, starts)


@st.composite
def _plans(
    draw: st.DrawFn,
    names: tuple[str, ...],
    wanted: Wanted,
    max_depth: int,
    starts: list[Callable[[st.DrawFn], Shape | Indices]],
) -> Plan:
    require(bool(starts), f"`layers={names!r}` with `random={wanted.random!r}` leave no layer")
    takes = draw(st.sampled_from(starts))(draw)
    calls: list[Call] = []
    if isinstance(takes, Indices):
        first, shape = embedding(draw, takes, wanted)
        calls.append(first)
    else:
        shape = takes
    while not calls or (draw(_MORE) and len(calls) < max_depth):  # drawn at the end as well, so that one can go
        families = _fitting(names, shape, wanted)
        if not families:
            break
        family = families[draw(st.sampled_from(range(len(families))))]
        made, shape = family[draw(st.sampled_from(range(len(family))))].make(draw, shape, wanted)
        calls.append(made)
    return Plan(tuple(calls), (takes,), shape)


_MORE = st.booleans()
_SIDE = st.integers(1, 3)


def _start(rank: int) -> Callable[[st.DrawFn], Shape]:
    return lambda draw: tuple(draw(_SIDE) if index < 2 else 2 for index in range(rank))


def _indices(draw: st.DrawFn) -> Indices:
    return Indices(draw(st.sampled_from([(2,), (1,), ()])), draw(_SIDE))


@cache
def _fitting(names: tuple[str, ...], shape: Shape, wanted: Wanted) -> list[list[Layer]]:
    """The layers for an input of this shape, by family."""
    families = [FAMILIES[name] for name in names if name in FAMILIES]
    found = [[layer for layer in family if layer.fits(shape, wanted)] for family in families]
    return [family for family in found if family]


@st.composite
def inputs_for(draw: st.DrawFn, module: nn.Module, *, batch: int | None = None) -> tuple[Tensor, ...]:
    """Positional arguments for a module from `modules` or `seeded`, or a copy of one.

    Args:
        module: what takes them.
        batch: the first dimension. None: 1 to 3, or 2 to 3 where a batch norm needs several examples.

    Returns:
        A strategy of tuples of tensors, numbers between -2 and 2, of the module's own dtype.

    Raises:
        InvalidArgument: at draw time, for a module that does not say what it takes.

    Example:
        >>> from hypothesis import find
        >>> from statelessify.testing.strategies import seeded
        >>> find(inputs_for(seeded(nn.Linear(2, 1), 0, takes=[(2,)])), lambda args: True)
        (tensor([[0., 0.]]),)
    """
    _options.count("batch", batch)
    recipe = recipe_of(module)
    if recipe is None:
        require(False, f"`{type(module).__name__}` does not say what it takes; write `seeded(module, 0, takes=[(3,)])`")
        raise AssertionError
    own = [t.dtype for t in cast("Any", [*module.parameters(), *module.buffers()]) if t.is_floating_point()]
    dtype = own[0] if own else recipe.dtype
    if batch is None:
        batch = draw(st.integers(2 if any(map(needs_several, module.modules())) else 1, 3))
    return tuple(draw(_argument(item, batch, dtype)) for item in recipe.takes)


@cache
def _argument(item: Shape | Indices, batch: int, dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    if isinstance(item, Indices):
        return tensors((batch, *item.shape), dtype=torch.int64, min_value=0, max_value=item.below - 1)
    return tensors((batch, *item), dtype=dtype, min_value=-2, max_value=2)


def needs_several(part: nn.Module) -> bool:
    """Whether torch refuses a single example, or a group norm could (one value in a group)."""
    return isinstance(part, (*_BATCH_NORMS, nn.GroupNorm))
