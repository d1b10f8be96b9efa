"""How a drawn module is made: calls that are code as well, and weights from a seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from hypothesis.errors import InvalidArgument
from torch import Tensor, nn

from ..._words import nearest
from .._paste import paste

__all__ = ["Indices", "seeded"]


class Indices(NamedTuple):
    """An input of integers.

    Attributes:
        shape: without the batch dimension.
        below: how many values there are: 0 up to this, exclusive.
    """

    shape: tuple[int, ...]
    below: int

    def __repr__(self) -> str:
        return f"Indices({self.shape!r}, {self.below!r})"


Takes = Sequence["tuple[int, ...] | Indices"]
"""The inputs of a module: shapes without the batch dimension."""


class Recipe(NamedTuple):
    """What a module says about itself once it is seeded.

    Attributes:
        takes: its inputs.
        dtype: of its floating inputs, if it has no tensor of its own.
        code: an expression that makes it, if it was drawn.
    """

    takes: tuple[tuple[int, ...] | Indices, ...]
    dtype: torch.dtype
    code: str | None = None


class Call(NamedTuple):
    """A call of a class or function, to be made and to be printed.

    Attributes:
        target: what is called.
        args: its arguments, which may be calls again.
        kwargs: its keyword arguments.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def make(self) -> Any:
        """Make the object."""
        args = [arg.make() if isinstance(arg, Call) else arg for arg in self.args]
        return self.target(*args, **self.kwargs)

    def code(self) -> str:
        """Print the call."""
        args = [arg.code() if isinstance(arg, Call) else repr(arg) for arg in self.args]
        args += [f"{name}={paste(value)}" for name, value in self.kwargs.items()]
        home = self.target.__module__
        prefix = "nn.utils.parametrizations." if home.startswith("torch.nn.utils.") else ""
        prefix = prefix or ("nn." if home.startswith("torch.nn.") else "")
        return f"{prefix}{self.target.__name__}({', '.join(args)})"


def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    """A call, without the keyword arguments that say what is so anyway."""
    known = _defaults(target)
    return Call(target, args, {name: value for name, value in kwargs.items() if not _same(value, known.get(name, ...))})


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


@cache
def _defaults(target: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    classes = [cls.__init__ for cls in target.__mro__[::-1]] if inspect.isclass(target) else [target]
    for function in classes:
        found |= {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return found


def seeded(
    module: nn.Module,
    seed: int,
    *,
    takes: Takes,
    dtype: torch.dtype | None = None,
    frozen: Sequence[str] = (),
    evaluating: bool | Sequence[str] = False,
) -> nn.Module:
    """Fill a module's parameters and buffers from a seed, without torch's global generator: what `modules` prints.

    Weights are scaled by their fan-in, scales and variances lie between 0.5 and 1.5.

    Args:
        module: any module; it is changed in place.
        seed: of the numbers.
        takes: its inputs, for `inputs_for`: shapes without the batch dimension, or `Indices`.
        dtype: what its floating-point tensors become. None: they stay.
        frozen: names of the parameters that require no gradient.
        evaluating: whether it is in eval mode, or the names of the submodules that are (``""`` is the module).

    Returns:
        The module.

    Raises:
        InvalidArgument: an input that is no shape, or a name that the module does not have.

    Example:
        >>> model = seeded(nn.Linear(1, 1), 0, takes=[(1,)], frozen=["bias"])
        >>> model.bias.requires_grad
        False
    """
    found = [item if isinstance(cast("Any", item), Indices) else _shape(item) for item in takes]
    if dtype is not None:
        module.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in [*parameters.items(), *module.named_buffers()]:
            tensor.copy_(_values(name, tensor, generator))
        for part in module.modules():
            _settle(part)
    for name in _known(frozen, parameters, "frozen", "parameter"):
        parameters[name].requires_grad_(False)
    if isinstance(evaluating, bool):
        module.train(not evaluating)
    else:
        module.train()
        parts = dict(cast("Iterable[tuple[str, nn.Module]]", module.named_modules(remove_duplicate=False)))
        for name in _known(evaluating, parts, "evaluating", "submodule"):
            parts[name].training = False
    cast("Any", module)._recipe = Recipe(tuple(found), dtype or torch.get_default_dtype())
    return module


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(n, int) and n > 0 for n in cast("list[Any]", value)):
        raise InvalidArgument(
            f"`takes` has the input {value!r}; write a shape without the batch dimension, as in `takes=[(3,)]`, or "
            "`Indices((3,), below=10)` for integers"
        )
    return tuple(cast("list[int]", value))


def _known(names: Iterable[str], known: dict[str, Any], option: str, kind: str) -> Iterable[str]:
    for name in names:
        if name not in known:
            raise InvalidArgument(f"`{option}` names the {kind} `{name}`, which there is not{nearest(name, known)}")
    return names


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values that suit a tensor of this name."""
    if not tensor.is_floating_point():
        return torch.randint(0, 4, tensor.shape, generator=generator)
    last = name.rpartition(".")[2]
    if last in ("running_var", "scale", "original0") or (last == "weight" and tensor.ndim < 2):
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers / math.sqrt(tensor[0].numel()) if tensor.ndim >= 2 else 0.3 * numbers


def _settle(part: nn.Module) -> None:
    """Bring a spectral norm near its fixed point: of random vectors it may be zero."""
    table: Any = getattr(part, "parametrizations", None)
    for steps in cast("dict[str, Any]", table).values() if isinstance(table, nn.ModuleDict) else ():
        for step in [step for step in steps if hasattr(step, "_u")]:
            matrix: Tensor = steps.original.flatten(1)
            for _ in range(2):
                step._v.copy_(nn.functional.normalize(matrix.mT @ step._u, dim=0))
                step._u.copy_(nn.functional.normalize(matrix @ step._v, dim=0))


def recipe_of(module: Any) -> Recipe | None:
    """What a seeded module, or a copy of it, says about itself."""
    found = getattr(module, "_recipe", None) if isinstance(module, nn.Module) else None
    return found if isinstance(found, Recipe) else None


def with_code(module: nn.Module, code: str) -> nn.Module:
    """Note the expression that makes a seeded module; hypothesis prints it, and a copy keeps it."""
    marked: Any = module
    marked._recipe = marked._recipe._replace(code=code)
    marked._repr_pretty_ = Printed(code)
    return module


class Printed(NamedTuple):
    """The hook by which hypothesis prints an object as code.

    Attributes:
        code: what it prints.
    """

    code: str

    def __call__(self, printer: Any, cycle: bool) -> None:
        printer.text(self.code)
