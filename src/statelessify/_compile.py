"""`compiled`: one inner step, compiled once and called in the loop."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _traced_tree
from ._compiled_graphs import Graphs, as_backend, calls
from ._task_trees import Tasks
from ._transforms import transforming
from ._tree import TreeSpec, tree_flatten, tree_unflatten
from .errors import CompileError, StatelessifyError

__all__ = ["compiled"]


class Compiled:
    """A loss of which `adapt`, `adapt_tasks` and `over_tasks` compile what they do with it; made by `compiled`.

    Attributes:
        fn: the loss itself. A plain call is one of it.
        backend: what compiles.
    """

    def __init__(self, fn: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        update_wrapper(self, fn, updated=())
        self.fn, self.backend = fn, backend
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"compiled({self.fn!r}, backend={self.backend!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}

    def entry(self, key: Any) -> Callable[..., Any]:
        """A compiled `_traced` for one structure of its inputs."""
        if key not in self._made:
            # Dynamo keeps what it makes of a function with the function's code: each entry needs its own.
            fresh = types.FunctionType(_traced.__code__.replace(), _traced.__globals__, "_traced")
            backend: Any = as_backend(self.backend)
            self._made[key] = torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend)
        return self._made[key]


def compiled(loss: Callable[..., Any], *, backend: str | Callable[..., Any] = "inductor") -> Compiled:
    """A loss whose inner steps are compiled: pass it to `adapt`, `adapt_tasks` and `over_tasks` instead of `loss`."""
    if isinstance(loss, Compiled):
        loss = loss.fn
    return Compiled(loss, backend)


def plain(loss: Any) -> Any:
    """The loss itself, of which compiled code is traced."""
    return loss.fn if isinstance(loss, Compiled) else loss


def can_compile() -> bool:
    """Whether this is plain eager code; inside a transform, or where dynamo traces, the loss itself is called."""
    return not transforming() and not torch.is_inference_mode_enabled()


def compiled_step(loss: Any, step: Callable[..., Any], batch: Any) -> Callable[..., Any]:
    """The step of a loop, compiled if its loss asks for that; `batch` is what the user gave for it."""
    if not isinstance(loss, Compiled) or not can_compile():
        return step
    return _Step(loss, step, callable(batch))


class _Step:
    """``step(state, batch, differentiable)``, compiled; a state is a tuple of trees, or of `Tasks`."""

    def __init__(self, loss: Compiled, step: Callable[..., Any], meanwhile: bool) -> None:
        self._loss, self._step, self._meanwhile = loss, step, meanwhile
        self._runs: dict[bool, Run] = {}

    def __call__(self, state: Any, batch: Any, differentiable: bool) -> Any:
        if not can_compile():
            return self._step(state, batch, differentiable)
        make = getattr(type(state), "_make", tuple)
        if differentiable not in self._runs:
            step = self._step

            def call(*parts: Any) -> Any:
                state, value = step(make(parts[:-1]), parts[-1], differentiable)
                return (*state, value)

            self._runs[differentiable] = Run(self._loss, call, self._meanwhile, carried=2)
        *new, value = self._runs[differentiable](*state, batch)
        return make(new), value


# One call ----------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """What is known of a part beside its leaves: its structure, and for `Tasks` which leaves are mapped."""

    spec: TreeSpec
    mapped: tuple[bool, ...] | None
    count: int

    def part(self, leaves: list[Any]) -> Any:
        if self.mapped is None:
            return tree_unflatten(self.spec, leaves)
        return Tasks(leaves, list(self.mapped), self.spec)


class _Fixed(NamedTuple):
    """A leaf that is no tensor."""

    value: Any


class _Recipe(NamedTuple):
    """What a call of compiled code did; the next one does the same if nothing that it read has changed in kind.

    `inputs` are those of the graphs: indices into the leaves, and tensors that the function closes over. A result's
    leaf is an index into leaves and outputs.
    """

    graphs: Graphs
    recording: bool
    layouts: list[_Layout]
    leaves: list[Any]
    inputs: list[int | Tensor]
    results: list[tuple[_Layout, list[int | _Fixed]]]


class Run:
    """A function of some parts, trees or `Tasks`, that returns a tuple of such, compiled.

    Dynamo's guards, which look at all that the function reads, take a third of a step of a small network. They run in
    the first call of a loop, and in each one where code of the user's runs in between (`meanwhile`); the others go
    straight to the graphs. `carried` is how many parts return as results that depend on everything.
    """

    def __init__(self, loss: Compiled, fn: Callable[..., Any], meanwhile: bool = False, carried: int = 0) -> None:
        self._loss, self._fn, self._meanwhile, self._carried = loss, fn, meanwhile, carried
        self._recipe: _Recipe | None = None

    def __call__(self, *parts: Any) -> tuple[Any, ...]:
        leaves, layouts = _split(parts)
        leaves = self._prepared(leaves, layouts)
        recipe = self._recipe
        if recipe is None or not _alike(recipe, leaves, layouts):
            return self._guarded(leaves, layouts)
        outputs = recipe.graphs.run([leaves[at] if isinstance(at, int) else at for at in recipe.inputs])
        pool = (*leaves, *outputs)
        return tuple(
            layout.part([pool[at] if isinstance(at, int) else at.value for at in places])
            for layout, places in recipe.results
        )

    def _prepared(self, leaves: list[Any], layouts: list[_Layout]) -> list[Any]:
        """The leaves with the strides, and those that are carried with the gradients, of later steps' leaves."""
        real = [isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves]
        leaves = [leaf.contiguous() if each else leaf for leaf, each in zip(leaves, real, strict=True)]
        carried = sum(layout.count for layout in layouts[: self._carried])
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf, each in zip(leaves, real, strict=True) if each):
            for index in range(carried):
                if real[index] and leaves[index].ndim and not leaves[index].requires_grad:
                    leaves[index] = leaves[index].detach().requires_grad_()
        return leaves

    def _guarded(self, leaves: list[Any], layouts: list[_Layout]) -> tuple[Any, ...]:
        # Objects of their own, which dynamo cannot take for a tensor that the function closes over.
        leaves = [_alias(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        parts = _parts(leaves, layouts)
        key = (self._fn.__code__, torch.is_grad_enabled(), tuple(layouts))
        calls.clear()
        try:
            found = self._loss.entry(key)(self._fn, *_for_dynamo(parts))
            last, made = calls.last, calls.made
        except Exception as error:
            self._explain(error, parts, calls.refused)
            raise
        finally:
            calls.clear()
        results = [_from_dynamo(tree, mapped) for tree, mapped in found]
        if made:
            self._check(leaves, layouts, results)
        self._recipe = None if last is None or self._meanwhile else _recipe(*last, leaves, layouts, results)
        return tuple(results)

    def _explain(self, error: Exception, parts: list[Any], refused: StatelessifyError | None) -> None:
        """Raise what is wrong with the function, if that is known, and else that it cannot be compiled."""
        exceptions = _dynamo().exc
        kinds = (exceptions.TorchDynamoException, exceptions.FailOnRecompileLimitHit, RuntimeError)
        if isinstance(error, StatelessifyError) or not isinstance(error, kinds):
            return
        if refused is not None:
            raise refused from None
        self._fn(*parts)  # its own errors say more than those of the compiler
        name = getattr(self._loss.fn, "__name__", repr(self._loss.fn))
        if isinstance(error, exceptions.FailOnRecompileLimitHit):
            raise CompileError(
                f"the steps of `{name}` were compiled {_dynamo().config.recompile_limit} times, each time for another "
                "number or shape; pass numbers that change (a learning rate, a coefficient) as 0-dim tensors, keep the "
                "shapes of batches, or leave the loss uncompiled"
            ) from error
        raise CompileError(
            f"torch cannot compile a step of `{name}`: {_reason(error)}; use `torch.where` where it branches on a "
            "value, or leave the loss uncompiled"
        ) from error

    def _check(self, leaves: list[Any], layouts: list[_Layout], results: list[Any]) -> None:
        """Compare a call that has just been compiled with one that is not, in values and first derivatives."""
        copies = [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        expected = list(self._fn(*_parts(copies, layouts)))
        for what, ours, theirs in (
            ("values", _real(results), _real(expected)),
            ("derivatives", _derivatives(results, leaves), _derivatives(expected, copies)),
        ):
            distance = sum(
                float((a - b).detach().abs().double().square().sum()) for a, b in zip(ours, theirs, strict=True)
            )
            size = sum(float(b.detach().abs().double().square().sum()) for b in theirs)
            exact = all(b.dtype in (torch.float64, torch.complex128) for b in theirs)
            if not distance**0.5 <= (1e-7 if exact else 2e-2) * size**0.5 + 1e-30 and size == size:
                raise CompileError(
                    f"the compiled step of `{getattr(self._loss.fn, '__name__', self._loss.fn)}` has other {what} than "
                    f"the plain one (they differ by {distance**0.5:.1e}, of {size**0.5:.1e}); leave the loss uncompiled"
                )


def _dynamo() -> Any:
    import torch._dynamo  # only here: it takes a second

    return torch._dynamo


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _split(parts: Sequence[Any]) -> tuple[list[Any], list[_Layout]]:
    leaves: list[Any] = []
    layouts: list[_Layout] = []
    for part in parts:
        if isinstance(part, Tasks):
            own, layout = part.leaves, _Layout(part.spec, tuple(part.mapped), len(part.leaves))
        else:
            own, spec = tree_flatten(part)
            layout = _Layout(spec, None, len(own))
        leaves += own
        layouts.append(layout)
    return leaves, layouts


def _parts(leaves: list[Any], layouts: list[_Layout]) -> list[Any]:
    remaining = iter(leaves)
    return [layout.part([next(remaining) for _ in range(layout.count)]) for layout in layouts]


def _alike(recipe: _Recipe, leaves: list[Any], layouts: list[_Layout]) -> bool:
    """Whether guards that held for the recipe's inputs hold for these, if nothing else has changed."""
    if recipe.recording != torch.is_grad_enabled() or recipe.layouts != layouts:
        return False
    return all(map(_same_kind, leaves, recipe.leaves))


def _same_kind(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor):
        return (
            isinstance(other, Tensor)
            and leaf.shape == other.shape
            and leaf.requires_grad == other.requires_grad
            and leaf.dtype == other.dtype
            and leaf.device == other.device
            and leaf.stride() == other.stride()
        )
    return leaf is other or (type(leaf) is type(other) and type(leaf) in (bool, int, float, str) and leaf == other)


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _for_dynamo(parts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Trees, and for each the marks of its leaves in the order of torch's own pytree, which dynamo follows."""
    trees: list[Any] = []
    marks: list[Any] = []
    for part in parts:
        trees.append(part.tree if isinstance(part, Tasks) else part)
        flags = None
        if isinstance(part, Tasks):
            known = {id(leaf): m for leaf, m in zip(part.leaves, part.mapped, strict=True) if isinstance(leaf, Tensor)}
            flags = [known.get(id(leaf), False) for leaf in _traced_tree.flatten(trees[-1])[0]]
        marks.append(flags)
    return trees, marks


def _from_dynamo(tree: Any, marks: list[bool] | None) -> Any:
    if marks is None:
        return tree
    known = {id(leaf): m for leaf, m in zip(_traced_tree.flatten(tree)[0], marks, strict=True)}
    leaves, spec = tree_flatten(tree)
    return Tasks(leaves, [isinstance(leaf, Tensor) and known[id(leaf)] for leaf in leaves], spec)


def _traced(fn: Callable[..., Any], trees: list[Any], marks: list[Any]) -> list[Any]:
    """What dynamo traces."""
    parts: list[Any] = []
    for tree, mapped in zip(trees, marks, strict=True):
        if mapped is None:
            parts.append(tree)
        else:
            leaves, spec = tree_flatten(tree)
            parts.append(Tasks(leaves, list(mapped), spec))
    return [(part.tree, list(part.mapped)) if isinstance(part, Tasks) else (part, None) for part in fn(*parts)]


def _recipe(
    graphs: Graphs,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    leaves: list[Any],
    layouts: list[_Layout],
    results: list[Any],
) -> _Recipe | None:
    places = {id(leaf): index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    given = [places.get(id(tensor), tensor) for tensor in inputs]
    places.update((id(output), len(leaves) + index) for index, output in enumerate(outputs))
    found: list[tuple[_Layout, list[int | _Fixed]]] = []
    for part in results:
        own, (layout,) = _split((part,))
        if any(isinstance(leaf, Tensor) and id(leaf) not in places for leaf in own):
            return None  # it returns a tensor that it closes over
        found.append((layout, [places[id(leaf)] if isinstance(leaf, Tensor) else _Fixed(leaf) for leaf in own]))
    return _Recipe(graphs, torch.is_grad_enabled(), layouts, leaves, given, found)


def _real(parts: Sequence[Any]) -> list[Tensor]:
    leaves, _ = _split(parts)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]


def _derivatives(results: Sequence[Any], leaves: Sequence[Any]) -> list[Tensor]:
    """Of a weighted sum of the results, by the leaves."""
    outputs = [tensor for tensor in _real(results) if tensor.requires_grad]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs or not inputs:
        return []
    weights = [torch.linspace(0.5, 1.5, t.numel()).to(t).reshape(t.shape) for t in outputs]
    found = torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, found, strict=True)]
