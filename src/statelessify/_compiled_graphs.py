"""What a compiled step runs: two graphs, one of its values and one of their derivative, joined in autograd.

The second graph computes the step again from its inputs, so that a loop keeps the inputs of its steps and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import CompileError, DerivativeError, MutationError, RandomnessError, StatelessifyError
from .rules._registry import rules

__all__: list[str] = []

Call = Callable[..., Any]
"""A graph, as a function of tensors that returns a sequence of tensors."""


class Calls(threading.local):
    """What the last call of compiled code in this thread has run.

    Attributes:
        last: the graphs and their inputs; None where there was nothing to compute.
        refused: why there are no graphs.
        made: whether they were made in this call.
    """

    last: tuple[Graphs, Sequence[Tensor]] | None = None
    refused: StatelessifyError | None = None
    made: bool = False

    def clear(self) -> None:
        self.last, self.refused, self.made = None, None, False


calls = Calls()


class Graphs:
    """The two graphs of a step, as functions of all tensors that it reads: its own inputs, and what it closes over."""

    def __init__(self, traced: fx.GraphModule, inputs: Sequence[Tensor], backend: str | Call) -> None:
        self.needs = [tensor.requires_grad for tensor in inputs]
        self._mode = torch.is_grad_enabled()  # that of the code which was traced
        self._traced = traced
        inner: Any = _backend(backend)
        plain = [tensor.detach() for tensor in inputs]
        values = self._graph(self._values, plain)
        _refuse_random(values)
        with torch.no_grad(), tracing(TracingContext(None)):
            self.values: Call = inner(values, plain)
            self.derivative: Call | None = None
            if self._mode and any(self.needs) and any(self.differentiable):
                cotangents = [
                    torch.empty(shape, dtype=dtype, device=device)
                    for (shape, dtype, device), has in zip(self._outputs, self.differentiable, strict=True)
                    if has
                ]
                graph = self._graph(self._derivative, [*plain, *cotangents])
                self.derivative = inner(graph, [*plain, *cotangents])
        self.stand_ins = [torch.empty(0) for _ in self.differentiable]
        del self._traced

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Compute nothing: note what to compute, and return tensors that stand for the outputs."""
        calls.last = (self, inputs)
        return self.stand_ins

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.derivative is not None and torch.is_grad_enabled():
            return cast("Any", _Step).apply(self, *inputs)
        return self.values(*inputs)

    def _graph(self, fn: Call, inputs: Sequence[Tensor]) -> fx.GraphModule:
        mode: Any = detect_fake_mode() or torch._subclasses.FakeTensorMode()
        before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True  # constants of the traced code
        try:
            with mode, torch.no_grad():
                return make_fx(fn)(*[mode.from_tensor(tensor, static_shapes=True) for tensor in inputs])
        finally:
            mode.allow_non_fake_inputs = before

    def _run_traced(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs, those that need a gradient as leaves of the graph, and the outputs."""
        leaves = [t.detach().requires_grad_() if need else t for t, need in zip(inputs, self.needs, strict=True)]
        versions = [leaf._version for leaf in leaves]
        # Some functions stand in the graph as they are: dynamo shows `torch._weight_norm` to no mode, and does not
        # look into `multi_head_attention_forward`.
        with torch.set_grad_enabled(self._mode), rules("transforms"):
            outputs = list(self._traced(*leaves))
        if versions != [leaf._version for leaf in leaves]:
            raise MutationError(
                "the step writes in place into a tensor that it was given or closes over, which compiled code would "
                "do again in backward; compute a new one, `x + y` for `x.add_(y)`"
            )
        return leaves, outputs

    def _values(self, *inputs: Tensor) -> list[Tensor]:
        leaves, outputs = self._run_traced(inputs)
        storages = {leaf.untyped_storage()._cdata for leaf in leaves}
        self.differentiable = [output.requires_grad for output in outputs]
        found = [output.detach().contiguous() for output in outputs]
        found = [output.clone() if output.untyped_storage()._cdata in storages else output for output in found]
        self._outputs = [(output.shape, output.dtype, output.device) for output in found]
        return found

    def _derivative(self, *inputs: Tensor) -> list[Tensor]:
        count = len(self.needs)
        leaves, outputs = self._run_traced(inputs[:count])
        found: Any = cast("Any", torch.autograd.grad)(
            [output for output, has in zip(outputs, self.differentiable, strict=True) if has],
            [leaf for leaf, need in zip(leaves, self.needs, strict=True) if need],
            inputs[count:],
            allow_unused=True,
        )
        self.reached = [grad is not None for grad in found]
        return [grad.contiguous() for grad in found if grad is not None]

    def gradients(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient for each input, None where there is none."""
        assert self.derivative is not None
        given = [c.contiguous() for c, has in zip(cotangents, self.differentiable, strict=True) if has]
        found = iter(self.derivative(*inputs, *given))
        wanted = iter([next(found) if reached else None for reached in self.reached])
        return [next(wanted) if need else None for need in self.needs]


def _backend(backend: str | Call) -> Any:
    if not isinstance(backend, str):
        return backend
    from torch._dynamo import lookup_backend  # only here: it takes a second to import

    return lookup_backend(backend)


def _refuse_random(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise RandomnessError(
                f"the step draws random numbers (`{node.target}`), and a compiled step is computed again in backward, "
                "with others; draw them outside and pass them in the batch, switch the dropout off (`apply.eval()`), "
                "or leave the loss uncompiled"
            )


def _refuse_side_effects() -> None:
    """Refuse code that changes an object of Python's; a skeleton puts itself back (`Skeleton.forward`)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output: Any = InstructionTranslator.current_tx().output
    names: list[str] = output.get_replayed_side_effect_source_refs()
    changed = [name for name in names if "._skeletons.traced." not in name and name != "<unknown source>"]
    if changed:
        raise CompileError(
            f"the step changes an object outside it, which compiled code would not do in each step: {changed}; return "
            "the value through `carry=`, or leave the loss uncompiled"
        )


class _Step(torch.autograd.Function):
    """One step in autograd; it keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        ctx.save_for_backward(*inputs)
        outputs = tuple(graphs.values(*inputs))
        ctx.mark_non_differentiable(
            *[output for output, has in zip(outputs, graphs.differentiable, strict=True) if not has]
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        with torch.no_grad():
            found = ctx.graphs.gradients(inputs, cotangents)
        if not torch.is_grad_enabled():
            return (None, *found)
        once = iter(cast("Any", _Once).apply(*[grad for grad in found if grad is not None], *inputs, *cotangents))
        return (None, *[None if grad is None else next(once) for grad in found])


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again, and says so."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise DerivativeError(
            "a compiled step has a first derivative only, and this is the second one of what came after it; pass the "
            "loss that is not compiled (`loss.fn`) where the meta-gradient itself is differentiated"
        )


def as_backend(backend: str | Call) -> Call:
    """A backend for `torch.compile` that makes `Graphs` of what dynamo has traced."""

    def make(traced: fx.GraphModule, inputs: Sequence[Any]) -> Graphs:
        calls.made = True
        try:
            if not all(isinstance(value, Tensor) for value in inputs):
                raise CompileError("the step reads a number of which torch makes a symbol; pass it as a tensor")
            _refuse_side_effects()
            return Graphs(traced, inputs, backend)
        except StatelessifyError as error:
            calls.refused = error
            raise

    return make
