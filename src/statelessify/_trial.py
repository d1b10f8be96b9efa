"""Calls of a pure function in every way that it is meant for, and what stood in their way."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from ._apply import Apply
from ._graph import is_once_differentiable, nodes
from ._tree import tree_flatten, tree_leaves, tree_unflatten
from .errors import DerivativeError, StatelessifyError
from .rules._registry import Watched
from .typing import Buffers, Params

__all__: list[str] = []

Topic = Literal["stateless", "forward", "parameters", "state", "random", "gradient", "second order", "vmap", "compile"]


class Finding(NamedTuple):
    """One thing that a call does not allow, or that is good to know: where it is, and what to write instead."""

    topic: Topic
    blocks: bool
    problem: str
    where: str
    remedy: str


class Trial:
    """Calls of the pure function in every way, each of which may leave findings."""

    def __init__(
        self, apply: Apply, params: Params, buffers: Buffers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.apply, self.params, self.buffers, self.args, self.kwargs = apply, params, buffers, args, kwargs
        self.watched = apply._watched = Watched("transforms")
        self.findings: list[Finding] = []
        self.written: set[str] = set()
        self.differentiable = False

    def run(self) -> Iterator[Topic]:
        """Try one thing after the other, as long as each makes sense after the last."""
        yield "forward"
        if not self._works("forward", self._forward):
            return
        if self.params:
            yield "gradient"
            self.differentiable = self._works("gradient", self._first_order)
            if self.differentiable:
                yield "second order"
                self._works("second order", self._second_order)
        if self.params or _real((self.args, self.kwargs)):
            yield "vmap"
            self._works("vmap", self._mapped)
        yield "compile"
        self._works("compile", self._compiled)

    def _works(self, topic: Topic, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self.findings.append(finding_of(topic, error))
            return False
        return True

    def _loss(self, params: Params) -> Tensor:
        return _total(_real(self.apply(params, self.buffers, *self.args, **self.kwargs)[0]))

    def _note(self, topic: Topic, problem: str, remedy: str) -> None:
        self.findings.append(Finding(topic, False, problem, "", remedy))

    def _forward(self) -> None:
        before = torch.get_rng_state()
        _, new_buffers = self.apply(self.params, self.buffers, *self.args, **self.kwargs)
        self.written = {name for name, tensor in new_buffers.items() if tensor is not self.buffers.get(name)}
        if not torch.equal(before, torch.get_rng_state()):
            self._note("random", "a call draws random numbers", 'over tasks choose `randomness="different"` or "same"')
        if not self.apply._skeletons.has_idle():
            self._note(
                "state",
                "a call changes Python state, or cannot be known not to: each call runs on a fresh copy, which takes "
                "time; what it changes is not kept",
                "keep what has to last in a registered buffer: it is returned in `new_buffers`",
            )

    def _first_order(self) -> None:
        loss = self._loss(self.params)
        if not loss.requires_grad:
            raise RuntimeError("no output depends on a parameter in a differentiable way")
        torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)

    def _second_order(self) -> None:
        params = list(self.params.values())
        loss = self._loss(self.params)
        for node in nodes([loss], params):
            if is_once_differentiable(node):
                raise DerivativeError(
                    f"{type(node).__name__} has a backward that is marked as `@once_differentiable`: torch takes its "
                    "second derivative for zero; write backward with differentiable operations, without the mark"
                )
        first = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        total = torch.stack([g.real.square().sum() for g in first]).sum()
        if total.requires_grad:
            torch.autograd.grad(total, params, allow_unused=True)

    def _mapped(self) -> None:
        """Parameters and floating inputs for two tasks: what depends on a value shows in either."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        mapped = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        inputs = [_twice(leaf) for leaf, own in zip(leaves, mapped, strict=True) if own]
        params = {name: _twice(tensor).requires_grad_() for name, tensor in self.params.items()}

        def out(params: Params, *inputs: Tensor) -> list[Tensor]:
            own = iter(inputs)
            args, kwargs = tree_unflatten(
                spec, [next(own) if is_own else leaf for leaf, is_own in zip(leaves, mapped, strict=True)]
            )
            return _real(self.apply(params, self.buffers, *args, **kwargs)[0])

        def loss(params: Params, *inputs: Tensor) -> Tensor:
            return _total(out(params, *inputs))

        if not self.differentiable:
            vmap(out, randomness="different")(params, *inputs)
            return
        values = vmap(loss, randomness="different")(params, *inputs)
        torch.autograd.grad(values.sum(), list(params.values()), allow_unused=True)
        vmap(grad(loss), randomness="different")(params, *inputs)

    def _compiled(self) -> None:
        compiled: Any = torch.compile(self.apply, fullgraph=True, backend="eager")  # pyright: ignore[reportUnknownVariableType]
        compiled(self.params, self.buffers, *self.args, **self.kwargs)


def _real(out: Any) -> list[Tensor]:
    """The tensors of an output that have a gradient, or could."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _total(tensors: list[Tensor]) -> Tensor:
    """A number that no derivative of a linear module makes zero."""
    return torch.stack([(t.real.sin() + t.real.square()).sum() for t in tensors]).sum()


def _twice(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach(), tensor.detach()])


# What went wrong ---------------------------------------------------------------------------------------------------

_REMEDIES: dict[str, str] = {
    "gradient": "give it an output of floating point that is computed from a parameter",
    "second order": "write a rule for the operation (`statelessify.rules.rule`), or use `gradient=FirstOrder()`",
    "vmap": 'leave `backend="auto"`, which runs the tasks in a loop, or write a rule (`statelessify.rules.rule`)',
    "compile": "compile what surrounds the call, or leave this module uncompiled",
    "forward": "see that the module itself runs with these arguments",
}


def finding_of(topic: Topic, error: Exception) -> Finding:
    ours = isinstance(error, StatelessifyError)
    text = str(error).strip()
    problem = text if ours else text.split("\n")[0][:200] or type(error).__name__
    return Finding(topic, True, f"{type(error).__name__}: {problem}", _place(error), "" if ours else _REMEDIES[topic])


def _place(error: BaseException) -> str:
    """The innermost line of the user's code that the error has come through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".")[0] not in ("torch", "statelessify", "optree"):
            code = linecache.getline(frame.f_code.co_filename, line, frame.f_globals).strip()
            return f"{frame.f_code.co_qualname}, line {line}: {code}"
    return ""
