"""One call of compiled code: what of it the guards of dynamo look at, and what goes straight to the graphs."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _traced_tree
from ._compiled_graphs import Graphs, as_backend, calls
from ._task_trees import Tasks
from ._tree import TreeSpec, tree_flatten, tree_unflatten
from .errors import CompileError, StatelessifyError

__all__: list[str] = []


class Code:
    """What has been compiled for one loss, by the structure of the inputs."""

    def __init__(self, name: str, backend: str | Callable[..., Any]) -> None:
        self.name, self.backend = name, backend
        self._made: dict[Any, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}

    def entry(self, key: Any) -> Callable[..., Any]:
        if key not in self._made:
            # Dynamo keeps what it makes of a function with the function's code: each entry needs its own.
            fresh = types.FunctionType(_traced.__code__.replace(), _traced.__globals__, "_traced")
            backend: Any = as_backend(self.backend)
            self._made[key] = torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend)
        return self._made[key]


class _Layout(NamedTuple):
    """What is known of a part beside its leaves: its structure, and for `Tasks` which leaves are mapped."""

    spec: TreeSpec
    mapped: tuple[bool, ...] | None
    size: int

    def part(self, leaves: list[Any]) -> Any:
        if self.mapped is None:
            return tree_unflatten(self.spec, leaves)
        return Tasks(leaves, list(self.mapped), self.spec)


class _Fixed(NamedTuple):
    """A leaf that is no tensor, or a tensor that the function closes over."""

    value: Any


class _Recipe(NamedTuple):
    """What compiled code does; it does so again if nothing that its guards look at has changed.

    `inputs` are those of the graphs: indices into the leaves, and tensors that the function closes over. A result's
    leaf is an index into leaves and outputs.
    """

    graphs: Graphs | None
    recording: bool
    layouts: list[_Layout]
    leaves: list[Any]
    inputs: list[int | Tensor]
    results: list[tuple[_Layout, list[int | _Fixed]]]

    def run(self, leaves: list[Any]) -> tuple[Any, ...]:
        outputs: Sequence[Tensor] = ()
        if self.graphs is not None:
            outputs = self.graphs.run([leaves[at] if isinstance(at, int) else at for at in self.inputs])
        pool = (*leaves, *outputs)
        return tuple(
            layout.part([pool[at] if isinstance(at, int) else at.value for at in places])
            for layout, places in self.results
        )


class Run:
    """A function of some parts, trees or `Tasks`, that returns a tuple of such, compiled.

    Dynamo's guards, which look at all that the function reads, take a third of a step of a small network. They run in
    the first call of a loop, and in each one where code of the user's runs in between (`meanwhile`); the others go
    straight to the graphs. `carried` is how many parts return as results that depend on everything.
    """

    def __init__(self, code: Code, fn: Callable[..., Any], meanwhile: bool = False, carried: int = 0) -> None:
        self._code, self._fn, self._meanwhile, self._carried = code, fn, meanwhile, carried
        self._recipe: _Recipe | None = None

    def __call__(self, *parts: Any) -> tuple[Any, ...]:
        leaves, layouts = _split(parts)
        leaves = self._prepared(leaves, layouts)
        recipe, made = self._recipe, False
        if recipe is None or not _alike(recipe, leaves, layouts):
            recipe, made = self._guarded(leaves, layouts)
            self._recipe = None if self._meanwhile else recipe
        if made:
            self._check(recipe, leaves, layouts)
        return recipe.run(leaves)

    def _prepared(self, leaves: list[Any], layouts: list[_Layout]) -> list[Any]:
        """The leaves with the strides, and those that are carried with the gradients, of later steps' leaves."""
        real = [isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves]
        leaves = [_contiguous(leaf) if each else leaf for leaf, each in zip(leaves, real, strict=True)]
        carried = sum(layout.size for layout in layouts[: self._carried])
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf, each in zip(leaves, real, strict=True) if each):
            for index in range(carried):
                if real[index] and leaves[index].ndim and not leaves[index].requires_grad:
                    leaves[index] = leaves[index].detach().requires_grad_()
        return leaves

    def _guarded(self, leaves: list[Any], layouts: list[_Layout]) -> tuple[_Recipe, bool]:
        """What compiled code does with these leaves, and whether that has been compiled just now."""
        # Objects of their own, which dynamo cannot take for a tensor that the function closes over.
        leaves = [_alias(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        parts = _parts(leaves, layouts)
        key = (self._fn.__code__, torch.is_grad_enabled(), tuple(layouts))
        calls.clear()
        try:
            found = self._code.entry(key)(self._fn, *_for_dynamo(parts))
            results = [_from_dynamo(tree, mapped) for tree, mapped in found]
            return _recipe(calls.last, leaves, layouts, results), calls.made
        except Exception as error:
            self._explain(error, parts, calls.refused)
            raise
        finally:
            calls.clear()

    def _explain(self, error: Exception, parts: list[Any], refused: StatelessifyError | None) -> None:
        """Raise what is wrong with the function, if that is known, and else that it cannot be compiled."""
        exceptions = _dynamo().exc
        kinds = (exceptions.TorchDynamoException, exceptions.FailOnRecompileLimitHit, RuntimeError)
        if isinstance(error, StatelessifyError) or not isinstance(error, kinds):
            return
        if refused is not None:
            raise refused from None
        self._fn(*parts)  # its own errors say more than those of the compiler
        name = self._code.name
        if isinstance(error, exceptions.FailOnRecompileLimitHit):
            raise CompileError(
                f"the steps of `{name}` were compiled {_dynamo().config.recompile_limit} times, each time for another "
                "number or shape; pass numbers that change (a learning rate, a coefficient) as 0-dim tensors, keep the "
                "shapes of batches, or leave the loss uncompiled"
            ) from error
        raise CompileError(
            f"torch cannot compile a step of `{name}` ({_reason(error)}); use `torch.where` where it branches on a "
            "value, or leave the loss uncompiled"
        ) from error

    def _check(self, recipe: _Recipe, leaves: list[Any], layouts: list[_Layout]) -> None:
        """Compare what has just been compiled with what was not, in values and first derivatives."""
        inputs, copies = ([_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves] for _ in range(2))
        results, expected = recipe.run(inputs), self._fn(*_parts(copies, layouts))
        for what, ours, theirs in (
            ("values", _real(results), _real(expected)),
            ("derivatives", _derivatives(results, inputs), _derivatives(expected, copies)),
        ):
            distance = sum(
                float((a - b).detach().abs().double().square().sum()) for a, b in zip(ours, theirs, strict=True)
            )
            size = sum(float(b.detach().abs().double().square().sum()) for b in theirs)
            exact = all(b.dtype in (torch.float64, torch.complex128) for b in theirs)
            if not distance**0.5 <= (1e-7 if exact else 2e-2) * size**0.5 + 1e-30 and size == size:
                raise CompileError(
                    f"the compiled step of `{self._code.name}` has other {what} than "
                    f"the plain one (they differ by {distance**0.5:.1e}, of {size**0.5:.1e}); leave the loss uncompiled"
                )


def _dynamo() -> Any:
    import torch._dynamo  # only here: it takes a second

    return torch._dynamo


def _reason(error: Exception) -> str:
    """What a compiler has to say, in one line."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {' '.join(str(inner).split())[:200]}"


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
    return [layout.part([next(remaining) for _ in range(layout.size)]) for layout in layouts]


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


def _contiguous(tensor: Tensor) -> Tensor:
    """A tensor with the one stride that contiguous ones of its shape have; torch leaves those of size 1 open."""
    tensor = tensor.contiguous()
    if 1 not in tensor.shape:
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return tensor.flatten().view(tensor.shape)
        expected *= size
    return tensor


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


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
    last: tuple[Graphs, Sequence[Tensor]] | None, leaves: list[Any], layouts: list[_Layout], results: list[Any]
) -> _Recipe:
    graphs, inputs, outputs = (None, (), ()) if last is None else (*last, last[0].stand_ins)
    places = {id(leaf): index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    given = [places.get(id(tensor), tensor) for tensor in inputs]
    places.update((id(output), len(leaves) + index) for index, output in enumerate(outputs))
    found: list[tuple[_Layout, list[int | _Fixed]]] = []
    for part in results:
        own, (layout,) = _split((part,))
        tensors = [isinstance(leaf, Tensor) and id(leaf) in places for leaf in own]
        found.append((layout, [places[id(e)] if known else _Fixed(e) for e, known in zip(own, tensors, strict=True)]))
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
    return list(
        torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    )
