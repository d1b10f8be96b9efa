"""Trees of tensors. The only file that knows optree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any, cast

import optree
import optree.registry
import torch
from torch import Tensor

from . import _traced_tree
from ._traced_tree import TracedSpec
from ._words import listed, nearest
from .errors import DtypeError, PolicyError, ShapeError, TaskError, TreeError
from .typing import Policy, Tree

__all__ = ["tree_copy", "tree_stack", "tree_unstack"]

TreeSpec = optree.PyTreeSpec | TracedSpec
_GLOBAL: str = vars(optree.registry)["__GLOBAL_NAMESPACE"]  # of dicts and lists; it has no public name
IsLeaf = Callable[[Any], bool] | None


def register_mapping(cls: type, context: Callable[[Any], Any], make: Callable[[dict[str, Any], Any], Any]) -> None:
    """Make a subclass of dict a container; ``make(values, context(old))`` builds it again."""

    def split(values: Any) -> tuple[tuple[Any, ...], Any, tuple[str, ...]]:
        keys = tuple(values)
        return tuple(values.values()), (context(values), keys), keys

    def joined(metadata: Any, children: Iterable[Any]) -> Any:
        about, keys = metadata
        return make(dict(zip(keys, children, strict=True)), about)

    optree.register_pytree_node(cls, split, joined, path_entry_type=optree.MappingEntry, namespace=_GLOBAL)


def tree_flatten(tree: Tree, is_leaf: IsLeaf = None) -> tuple[list[Any], TreeSpec]:
    if torch.compiler.is_compiling():
        return _traced_tree.flatten(tree, is_leaf)
    leaves, spec = optree.tree_flatten(tree, is_leaf)
    return leaves, spec


def tree_unflatten(spec: TreeSpec, leaves: Iterable[Any]) -> Tree:
    if isinstance(spec, TracedSpec):
        return _traced_tree.unflatten(spec, leaves)
    return optree.tree_unflatten(spec, leaves)


def tuple_spec(specs: Sequence[TreeSpec]) -> TreeSpec:
    """The structure of a tuple of trees with these structures."""
    traced = [spec for spec in specs if isinstance(spec, TracedSpec)]
    if not traced:
        return optree.treespec_tuple(cast("Any", specs))
    trees = tuple(_traced_tree.unflatten(spec, [0] * spec.empty.count(False)) for spec in traced)
    return _traced_tree.flatten(trees)[1]


def tree_leaves(tree: Tree, is_leaf: IsLeaf = None) -> list[Any]:
    return tree_flatten(tree, is_leaf)[0]


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: IsLeaf = None) -> Tree:
    if torch.compiler.is_compiling():
        return _traced_tree.tree_map(fn, tree, *rest, is_leaf=is_leaf)
    return optree.tree_map(fn, tree, *rest, is_leaf=is_leaf)


def tree_detach(tree: Tree) -> Tree:
    """The tree with its tensors cut off from their graph."""
    return tree_map(_detached, tree)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def flatten_up_to(spec: TreeSpec, tree: Tree) -> list[Any]:
    """What stands in `tree` where `spec` has its leaves (None too)."""
    return list(spec.flatten_up_to(tree))


def tree_names(tree: Tree, is_leaf: IsLeaf = None) -> list[str]:
    """The dotted name of each leaf, in the order of `tree_flatten`: ``{"a": {"b": x}}`` has ``["a.b"]``."""
    if torch.compiler.is_compiling():
        return _traced_tree.names(tree, is_leaf)
    return [".".join(map(str, path)) for path in optree.tree_paths(tree, is_leaf)]


class _Box:
    """A leaf around one entry of a prefix: None is a leaf there (a shared argument), nothing in a tree of tensors."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def broadcast_prefix(prefix: Tree, tree: Tree) -> list[Any]:
    """The leaves of `prefix` (None is one), each repeated for every leaf of `tree` below it."""
    if torch.compiler.is_compiling():
        return _traced_tree.broadcast_prefix(prefix, tree)
    found: list[Any] = []

    def at(box: _Box, subtree: Any) -> None:
        found.extend([box.value] * len(tree_leaves(subtree)))

    optree.tree_map_(at, optree.tree_map(_Box, prefix, none_is_leaf=True), tree)
    return found


def first_difference(spec: TreeSpec, other: TreeSpec) -> str:
    """Words for how two structures differ, by the names that only one of them has."""
    if isinstance(spec, TracedSpec) or isinstance(other, TracedSpec):
        return f"{spec} and {other}"
    ours = [".".join(map(str, path)) for path in spec.paths()]
    theirs = [".".join(map(str, path)) for path in other.paths()]
    only_ours = [name for name in ours if name not in set(theirs)]
    only_theirs = [name for name in theirs if name not in set(ours)]
    if only_ours or only_theirs:
        return f"only the first has {listed(only_ours)}, only the second has {listed(only_theirs)}"
    return f"the containers differ: {spec} and {other}"


# Copies ------------------------------------------------------------------------------------------------------------


def _target_dtype(leaf: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.dtype
    if leaf.is_complex() and not dtype.is_complex:
        return dtype.to_complex()
    return dtype


def tree_copy(
    tree: Tree,
    policy: Policy,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tree:
    """Copy a tree of tensors, and move it in the same pass.

    Args:
        tree: any tree; leaves that are not tensors pass through.
        policy: ``"alias"``: the same objects. ``"clone"``: own storage, connected to the source's graph.
            ``"detach"``: new leaves in own storage, with the ``requires_grad`` of their source.
        device: where the copies live; None keeps each leaf's device.
        dtype: the dtype of floating-point leaves (complex ones get its complex partner); integer leaves stay.

    Returns:
        A tree of the same structure. A tensor that stands in two places is copied once. Copies are plain
        tensors, never `torch.nn.Parameter`.

    Raises:
        PolicyError: the policy is unknown, or it is ``"alias"`` and a leaf would have to be copied.
        DtypeError: the dtype is not one of floating-point or complex numbers.

    Example:
        >>> from statelessify import tree_copy
        >>> tree_copy({"w": torch.ones(2)}, "detach", dtype=torch.float64)["w"].dtype
        torch.float64
    """
    if policy not in ("alias", "clone", "detach"):
        raise PolicyError(
            f"`policy={policy!r}` is not a copy policy{nearest(str(policy), ('alias', 'clone', 'detach'))}; "
            'write "alias", "clone" or "detach"'
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DtypeError(f"`dtype={dtype!r}` is not a floating-point or complex dtype; write `dtype=torch.float64`")
    target = None if device is None else torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    done: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in done:
            done[id(leaf)] = copied(leaf, policy, target, dtype)
        return done[id(leaf)]

    return tree_map(copy, tree)


def copied(leaf: Tensor, policy: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor under a copy policy."""
    where, what = device or leaf.device, _target_dtype(leaf, dtype)
    moves = (device is not None or dtype is not None) and (where != leaf.device or what != leaf.dtype)
    if policy == "alias":
        if moves:
            raise PolicyError(
                f'`"alias"` keeps the very same tensors, so it cannot move a {leaf.dtype} tensor on '
                f'{leaf.device} to {what} on {where}; write "clone" (same graph) or "detach" (new leaves), '
                "or move the module first"
            )
        return leaf
    source = leaf.detach() if policy == "detach" else leaf
    new = source.to(where, what) if moves else source.clone()
    if policy == "detach" and leaf.requires_grad:
        new.requires_grad_()
    return new


# Stacks ------------------------------------------------------------------------------------------------------------


def tree_stack(trees: Iterable[Tree]) -> Tree:
    """Stack trees of one structure along a new first dimension: ``[(...), ...] -> (len(trees), ...)``.

    Raises:
        TaskError: there is nothing to stack.
        TreeError: the structures differ, or leaves that are not tensors do.
        ShapeError: tensors under one name differ in shape.

    Example:
        >>> from statelessify import tree_stack
        >>> tree_stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
        torch.Size([2, 3])
    """
    trees = list(trees)
    if not trees:
        raise TaskError("`tree_stack` was given no trees; it needs at least one")
    first, spec = tree_flatten(trees[0])
    columns: list[list[Any]] = [[leaf] for leaf in first]
    for index, tree in enumerate(trees[1:], start=1):
        leaves, other = tree_flatten(tree)
        if other != spec:
            raise TreeError(f"tree 0 and tree {index} have different structures: {first_difference(spec, other)}")
        for column, leaf in zip(columns, leaves, strict=True):
            column.append(leaf)
    names = tree_names(trees[0])
    return tree_unflatten(spec, [stack_leaves(name, column) for name, column in zip(names, columns, strict=True)])


def stack_leaves(name: str, leaves: Sequence[Any]) -> Any:
    """One leaf of `tree_stack`: tensors are stacked, anything else must agree."""
    if isinstance(leaves[0], Tensor):
        shapes = {tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves}
        if len(shapes) > 1:
            raise ShapeError(f"leaf `{name}` has different shapes in different trees: {sorted(map(str, shapes))}")
        return torch.stack(tuple(leaves))
    for leaf in leaves[1:]:
        if not same_static(leaf, leaves[0]):
            raise TreeError(
                f"leaf `{name}` is not a tensor and differs between trees: {leaves[0]!r} and {leaf!r}; "
                "make it a tensor, or the same everywhere"
            )
    return leaves[0]


def same_static(a: Any, b: Any) -> bool:
    """Whether two leaves that are not tensors are one value."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):  # a lambda that each task has made anew
        cells = zip(a.__closure__ or (), b.__closure__ or (), strict=False)
        return a.__code__ is b.__code__ and all(same_static(x.cell_contents, y.cell_contents) for x, y in cells)
    try:
        return type(a) is type(b) and bool(a == b or (a != a and b != b))
    except (TypeError, ValueError, RuntimeError):  # values without a truth value are not comparable
        return False


def tree_unstack(tree: Tree) -> list[Tree]:
    """The inverse of `tree_stack`: a list of trees, one per entry of the leaves' common first dimension.

    Raises:
        TaskError: there is no tensor, or the first dimensions differ.

    Example:
        >>> from statelessify import tree_unstack
        >>> [t["w"].item() for t in tree_unstack({"w": torch.tensor([1.0, 2.0])})]
        [1.0, 2.0]
    """
    leaves, spec = tree_flatten(tree)
    sizes = {
        name: leaf.shape[0] if leaf.ndim else None
        for name, leaf in zip(tree_names(tree), leaves, strict=True)
        if isinstance(leaf, Tensor)
    }
    if not sizes:
        raise TaskError("`tree_unstack` was given a tree without tensors; there is no dimension to unstack")
    if len(set(sizes.values())) > 1 or None in sizes.values():
        raise TaskError(f"the leaves have no common first dimension: {sizes}; stack them with `tree_stack` first")
    count = cast("int", next(iter(sizes.values())))
    columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else [leaf] * count for leaf in leaves]
    return [tree_unflatten(spec, [column[index] for column in columns]) for index in range(count)]


def require_floating(tree: Tree, what: str) -> None:
    """Refuse a tree with a leaf that cannot have a gradient."""
    leaves = tree_leaves(tree)
    if all(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves):
        return
    for name, leaf in zip(tree_names(tree), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise DtypeError(f"{what} `{name}` is {type(leaf).__name__}, not a tensor; `{what}` is a tree of tensors")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise DtypeError(
                f"{what} `{name}` is an integer tensor ({leaf.dtype}), which has no gradient; "
                "cast it to a floating dtype, or pass it in the batch or the buffers"
            )
