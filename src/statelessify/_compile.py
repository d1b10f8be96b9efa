"""`compiled`: a loss whose inner steps are compiled once and called in the loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from ._compiled_calls import Code, Run
from ._transforms import in_inference, transforming
from .errors import CompileError
from .typing import ChunkSize

__all__ = ["compiled"]


class Compiled:
    """A loss, of which `adapt`, `adapt_tasks` and `over_tasks` compile what they do with it; made by `compiled`.

    Attributes:
        fn: the loss itself. A plain call is one of it.
    """

    def __init__(self, fn: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        update_wrapper(self, fn, updated=())
        self.fn = fn
        self.code = Code(getattr(fn, "__name__", type(fn).__name__), backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"compiled({self.fn!r}, backend={self.code.backend!r})"


def compiled(loss: Callable[..., Any], *, backend: str | Callable[..., Any] = "inductor") -> Compiled:
    """A loss whose inner steps are compiled: pass it on instead of `loss`, and keep it, for it holds what was made.

    `adapt` and `adapt_tasks` then compile one step, with its optimizer, and call it in their loop, so that compiling
    takes as long for 20 steps as for 2; `over_tasks` compiles the whole call. A step is computed again in backward
    from its inputs, which are all that is kept of it. Each step that has been compiled is compared once with the
    plain one, in values and derivatives. Inside a transform of torch, and in inference mode, the plain loss runs.

    Args:
        loss: what `adapt` takes, or any function for `over_tasks`. Make the result once, outside the training loop,
            or as a decorator.
        backend: as for `torch.compile`.

    Returns:
        A callable that is `loss` in every other place; its ``fn`` is `loss`.

    Raises:
        CompileError: where it is used, if torch cannot trace a step (it branches on a value), if the step changes an
            object of Python's, or if its compiled numbers are others; also if it was compiled too often, since a
            number changes that should be a tensor.
        RandomnessError: the step draws random numbers.
        MutationError: the step writes into a tensor that it was given.
        DerivativeError: a second derivative is taken of what was compiled.

    Example:
        >>> import torch
        >>> from statelessify import adapt, compiled, optim
        >>> fit = compiled(lambda params, target: ((params["w"] - target) ** 2).sum(), backend="aot_eager")
        >>> start = {"w": torch.zeros(2, requires_grad=True)}
        >>> adapt(fit, start, torch.ones(2), optimizer=optim.sgd(lr=0.25), steps=2).losses.tolist()
        [2.0, 0.5]
    """
    if not callable(loss):
        raise CompileError(f"`compiled` takes a loss, not {type(loss).__name__}; write `compiled(loss, backend=...)`")
    return Compiled(loss.fn if isinstance(loss, Compiled) else loss, backend)


def plain(loss: Any) -> Any:
    """The loss itself, of which compiled code is traced."""
    return loss.fn if isinstance(loss, Compiled) else loss


def refuse_measuring(loss: Any, chunk_size: ChunkSize) -> None:
    """An error where a compiled step would have to measure the memory that it takes."""
    if isinstance(loss, Compiled) and chunk_size == "auto":
        raise CompileError(
            f'`chunk_size="auto"` measures what a chunk takes while it runs, which the compiled `{loss.code.name}` '
            "cannot do; write a number of tasks, or leave the loss uncompiled"
        )


def can_compile() -> bool:
    """Whether to compile here; inside a transform, in inference mode and where dynamo traces, the loss itself runs."""
    return not transforming() and not in_inference()


def compiled_step(loss: Any, step: Callable[..., Any], batch: Any) -> Callable[..., Any] | None:
    """The step of a loop, compiled, if its loss asks for that; `batch` is what the user gave for it."""
    if not isinstance(loss, Compiled) or not can_compile():
        return None
    return _Step(loss.code, step, callable(batch))


def compiled_call(fn: Any, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``call(tasks) -> tasks``, compiled if `fn` asks for that."""
    if not isinstance(fn, Compiled) or not can_compile():
        return call

    def parts(tasks: Any) -> tuple[Any]:
        return (call(tasks),)

    run = Run(fn.code, parts)
    return lambda tasks: run(tasks)[0]


class _Step:
    """``step(state, batch, differentiable)``, compiled; a state is a tuple of trees, or of `Tasks`."""

    def __init__(self, code: Code, step: Callable[..., Any], meanwhile: bool) -> None:
        self._code, self._step, self._meanwhile = code, step, meanwhile
        self._runs: dict[bool, Run] = {}

    def __call__(self, state: Any, batch: Any, differentiable: bool) -> Any:
        if not can_compile():
            return self._step(state, batch, differentiable)
        make: Callable[[Any], Any] = getattr(state, "_make", tuple)
        if differentiable not in self._runs:
            step = self._step

            def call(*parts: Any) -> Any:
                state, value = step(make(parts[:-1]), parts[-1], differentiable)
                return (*state, value)

            self._runs[differentiable] = Run(self._code, call, self._meanwhile, carried=2)
        *new, value = self._runs[differentiable](*state, batch)
        return make(new), value
