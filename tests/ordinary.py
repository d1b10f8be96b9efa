"""A module that is to be checked, and one call of it as plain torch does it: values loaded into a module of its own.

It is what the checks in `conformity.py` compare with, so nothing here imports the library.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from zoo import tensors_in

Values = dict[str, Tensor]  # flat: "params/0.weight", "buffers/running_mean", "inputs/2" (the leaf of that number)

SEED = 7
TASKS = 3
REFUSALS = (RuntimeError, NotImplementedError)  # how eager autograd says that it cannot


def is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A module in the mode that is wanted, in float64, and what it is called with.

    Args:
        name: for messages.
        module: never called and never written to.
        args: any tree; its tensors may be nested.
        kwargs: likewise.
        fresh: makes the module to compare with, where a deep copy is not a module of its own, or not right.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fresh: Callable[[], nn.Module] | None = None

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.module) if self.fresh is None else self.fresh().train(self.module.training)

    @functools.cached_property
    def values(self) -> Values:
        """Every tensor of the call; what is frozen counts as a buffer."""
        parameters = dict(self.module.named_parameters())
        values = {f"params/{n}": p.detach() for n, p in parameters.items() if p.requires_grad}
        values |= {f"buffers/{n}": p.detach() for n, p in parameters.items() if not p.requires_grad}
        values |= {f"buffers/{n}": b.detach() for n, b in self.module.named_buffers()}
        leaves = enumerate(tree_flatten((self.args, dict(self.kwargs)))[0])
        return values | {f"inputs/{i}": leaf.detach() for i, leaf in leaves if isinstance(leaf, Tensor)}

    def names(self, *kinds: str, real: bool | None = None) -> list[str]:
        """Names of these kinds: all, or only those that are floating (``real=True``), or only those that are not."""
        chosen = {n: v for n, v in self.values.items() if n.partition("/")[0] in kinds}
        return [n for n, v in chosen.items() if real in (None, is_real(v))]

    def inputs(self, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`args` and `kwargs` with these tensors in them."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        return tree_unflatten([values.get(f"inputs/{i}", leaf) for i, leaf in enumerate(leaves)], spec)

    @functools.cached_property
    def random(self) -> bool:
        """Whether another seed gives another output."""
        a, b = (Ordinary(self, self.values, seed=seed).tensors for seed in (1, 2))
        return any(x.shape != y.shape or not torch.allclose(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))

    def tasks(self, vary: Iterable[str], count: int = TASKS) -> list[Values]:
        """Values of a few tasks that differ in the names in `vary` only."""
        return [self._task(index, set(vary)) for index in range(1, count + 1)]

    def _task(self, index: int, vary: set[str]) -> Values:
        generator = torch.Generator().manual_seed(index)
        task = {n: _moved(n, v, generator) if n in vary else v for n, v in self.values.items()}
        whole = {n for n in vary if n.startswith("inputs/") and is_whole(self.values[n]) and self.values[n].ndim}
        turned = task | {n: self.values[n].roll(index, 0) for n in whole}
        # Indices, lengths and masks of which the rows change places are legal ones, in most modules: ask this one.
        with contextlib.suppress(IndexError, ValueError, *REFUSALS):
            before, after = (Ordinary(self, each).tensors for each in (task, turned))
            if all(a.isfinite().all() or not b.isfinite().all() for a, b in zip(after, before, strict=True)):
                return turned
        return task


def is_whole(value: Tensor) -> bool:
    """Integers, masks, and floating tensors that stand for them: signs, class numbers."""
    return not is_real(value) or (not value.is_complex() and bool((value == value.round()).all()))


def _moved(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Another value in the same domain: probabilities, variances and logarithms stay what they are."""
    if not is_real(value):
        return value
    noise = torch.rand(value.shape, generator=generator, dtype=value.real.dtype)
    if name.startswith("inputs/"):
        return value if is_whole(value) else value * (1 - 0.1 * noise)
    return value + 0.1 * noise


class Ordinary:
    """A module of its own that holds these values, after one call.

    Args:
        case: what is called.
        values: what it holds and is called with.
        wrt: names that gradients will be asked for.
        seed: of the call's random numbers.
    """

    def __init__(self, case: Case, values: Values, wrt: Iterable[str] = (), seed: int = SEED) -> None:
        self.module, self.leaves = case.copy(), {}
        given = {n: v.detach().clone() for n, v in values.items()}
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for name, value in given.items():
            kind, _, slot = name.partition("/")
            if kind == "inputs":
                continue
            if slot in own and own[slot].shape == value.shape:
                with torch.no_grad():
                    own[slot].copy_(value)
            else:
                path, _, attribute = slot.rpartition(".")
                setattr(self.module.get_submodule(path), attribute, value)
        for name in wrt:
            slot = name.partition("/")[2]
            self.leaves[name] = own[slot] if name.startswith("params/") else given[name].requires_grad_()
        args, kwargs = case.inputs({n: v.clone() for n, v in given.items()})  # a module may write into its input
        torch.manual_seed(seed)
        self.out = self.module(*args, **kwargs)
        self.tensors = tensors_in(self.out)
        held = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self.buffers = {n: held[n].detach() for n in held if f"params/{n}" not in values}
        left = _tensors(args, kwargs)
        self.kept_inputs = all(_same(a, b) for a, b in zip(left, _tensors(*case.inputs(given)), strict=True))


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


# ---------------------------------------------------------------- values of one task, and of several


def seeded(function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(SEED)
    return function(*args)


def chosen(values: Values, names: Iterable[str]) -> Values:
    return {n: values[n] for n in names}


def leaves_of(values: Values, names: Iterable[str]) -> Values:
    return {n: v.clone().requires_grad_() for n, v in chosen(values, names).items()}


def stacked(tasks: list[Values], names: Iterable[str]) -> Values:
    """These names as ``(tasks, ...)``; everything else is the first task's."""
    return {n: torch.stack([t[n] for t in tasks]) if n in set(names) else v for n, v in tasks[0].items()}


def stack(rows: list[Any]) -> Any:
    """Results of several tasks, each tensor as ``(tasks, ...)``."""
    first = rows[0]
    if isinstance(first, dict):
        assert all(row.keys() == first.keys() for row in rows)
        return {key: stack([row[key] for row in rows]) for key in first}
    if isinstance(first, (list, tuple)):
        return [stack(list(column)) for column in zip(*rows, strict=True)]
    return torch.stack([row.detach() for row in rows])


class _WeightNorm(TorchFunctionMode):
    """Weight norm of operations whose derivatives torch has right: the second one of its own kernel is wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, dim = (*args, 0)[:3]
        others = [other for other in range(v.ndim) if other != dim]
        return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


@contextlib.contextmanager
def twice_derived() -> Iterator[None]:
    """Torch with kernels whose second derivative is right."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), _WeightNorm():
        yield
