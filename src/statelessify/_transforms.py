"""What is known about the transforms around a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
)
from torch._functorch.pyfunctorch import JvpInterpreter, VmapInterpreter, retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

__all__: list[str] = []


def transforming() -> bool:
    """Whether a functorch transform or a forward-mode level is active here, or dynamo traces."""
    return torch.compiler.is_compiling() or in_transform()


def in_transform() -> bool:
    """Whether a functorch transform or a forward-mode level is active here."""
    if forward_ad._current_level >= 0:
        return True
    return peek_interpreter_stack() is not None  # pyright: ignore[reportUnnecessaryComparison]


def level_of_tasks() -> int | None:
    """The level of vmap that is the innermost transform; None where there is none, or dynamo traces."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    top: Any = peek_interpreter_stack()
    return top.level() if top is not None and top.key() == TransformType.Vmap else None


class below(AbstractContextManager[None]):
    """Operations of the level below the innermost transform, on what that holds."""

    def __enter__(self) -> None:
        self._level = pop_dynamic_layer_stack()

    def __exit__(self, *error: Any) -> None:
        push_dynamic_layer_stack(self._level)


def unseen() -> AbstractContextManager[Any]:
    """Where tensors are only looked at: no mode needs to see that, and each look would take time."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction()


def mapping() -> bool:
    """Whether a vmap level is active here, or dynamo traces."""
    if torch.compiler.is_compiling():
        return True
    return any(isinstance(level, VmapInterpreter) for level in retrieve_all_functorch_interpreters())


def depth() -> int:
    """How many functorch transforms are active here."""
    level = peek_interpreter_stack()
    return 0 if level is None else level.level()  # pyright: ignore[reportUnnecessaryComparison]


def forward_mode() -> bool:
    """Whether a forward-mode derivative is taken here."""
    if forward_ad._current_level >= 0:
        return True
    return any(isinstance(level, JvpInterpreter) for level in retrieve_all_functorch_interpreters())


def in_inference() -> bool:
    """Whether inference mode is on, or was left for an inner loop (`OrdinaryTensors`)."""
    if torch.is_inference_mode_enabled():
        return True
    stack = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    return any(isinstance(mode, OrdinaryTensors) for mode in stack)


def levels(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as each level of transforms sees it, the innermost level first."""
    yield tensor
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
        yield tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """What a tensor holds below all transforms."""
    *_, plain = levels(tensor)
    return plain


def per_task_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """A 0-dim one that carries every active vmap level, or None where there is no level.

    A product with it makes a shared tensor per task, exactly, at any nesting of transforms. `tensors` are the
    inputs of the call: while dynamo traces, the levels can be read off them only.
    """
    one: Tensor | None = None
    if torch.compiler.is_compiling():
        for tensor in tensors:
            mark = torch.zeros_like(tensor, dtype=torch.float32).sum() + 1
            one = mark if one is None else one * mark
        return one
    for level in retrieve_all_functorch_interpreters():
        if isinstance(level, VmapInterpreter):
            with torch._C._DisableFuncTorch():  # a plain tensor, not one that the innermost level wraps
                ones = torch.ones(level.batch_size())
            mark = _add_batch_dim(ones, 0, level.level())
            one = mark if one is None else one * mark
    return one


class OrdinaryTensors(TorchFunctionMode):
    """Copies inference tensors, which autograd refuses, where a function meets them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(ordinary, args), **{name: ordinary(value) for name, value in (kwargs or {}).items()})


def ordinary(leaf: Any) -> Any:
    """A copy of an inference tensor, or of a list or tuple that holds some; anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.clone() if unwrapped(leaf).is_inference() else leaf
    if type(leaf) in (list, tuple):
        return type(leaf)(map(ordinary, leaf))
    return leaf
