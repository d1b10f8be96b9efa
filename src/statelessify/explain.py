"""`explain`: what a module holds, what stands in the way of transforming it, and what to do about it."""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from ._apply import Apply
from ._graph import is_once_differentiable, nodes
from ._skeleton import check_is_module, find_slots
from ._stateless import stateless
from ._structure import is_uninitialized, named_parts, reachable
from ._tree import tree_leaves
from .errors import DerivativeError, StatelessifyError
from .rules import RULES, Rule
from .rules._registry import Watched, rule_of
from .typing import Buffers, Params

__all__ = ["Explanation", "Finding", "Held", "explain"]

Role = Literal["parameter", "frozen", "buffer", "empty"]
Topic = Literal["stateless", "forward", "parameters", "state", "random", "gradient", "second order", "vmap", "compile"]


class Held(NamedTuple):
    """A tensor of the module. `also` are its further names; `written`: a call leaves another value in it."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    also: tuple[str, ...]
    written: bool


class Finding(NamedTuple):
    """One thing that a call does not allow, or that is good to know: where it is, and what to write instead."""

    topic: Topic
    blocks: bool
    problem: str
    where: str
    remedy: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` has found; ``print`` it, or read its fields."""

    module: str
    held: tuple[Held, ...]
    shared: tuple[tuple[str, ...], ...]
    """Submodules that several paths lead to."""
    rules: tuple[Rule, ...]
    """The rules that this module needs under transforms."""
    findings: tuple[Finding, ...]
    tried: tuple[Topic, ...]
    """What has been tried out; nothing without arguments for a call."""

    def blocked(self, topic: Topic) -> bool:
        """Whether something stands in the way of a topic, such as ``"vmap"``."""
        return any(finding.topic == topic and finding.blocks for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(report: Explanation) -> Iterator[str]:
    yield f"{report.module}: " + ", ".join(
        f"{sum(row.role == role for row in report.held)} {word}"
        for role, word in (("parameter", "parameters"), ("frozen", "frozen"), ("buffer", "buffers"), ("empty", "empty"))
    )
    width = max((len(row.name) for row in report.held), default=0)
    for row in report.held:
        more = [f"also {', '.join(row.also)}"] * bool(row.also) + ["written by a call"] * row.written
        shape = "" if row.role == "empty" else f"{row.dtype} {list(row.shape)}"
        yield f"  {row.name:{width}}  {row.role:9}  {shape}{'; ' * bool(more)}{', '.join(more)}".rstrip()
    for paths in report.shared:
        yield f"  one submodule under the names {', '.join(paths)}"
    if report.rules:
        yield "rules that apply:"
    for rule in report.rules:
        yield f"  {', '.join(rule.names)}: {rule.why} ({rule.upstream})"
    if report.tried:
        yield "  ".join(f"{topic}: {'no' if report.blocked(topic) else 'yes'}" for topic in report.tried)
    for finding in report.findings:
        yield f"{'✗' if finding.blocks else '·'} {finding.topic}: {finding.problem}"
        if finding.where:
            yield f"    at {finding.where}"
        if finding.remedy:
            yield f"    → {finding.remedy}"


def explain(module: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Find out what a module holds, and what blocks its transformation.

    With arguments for a call it tries out: the pure call, gradients, second order, vmap over parameters, and
    `torch.compile` (a few seconds). The module and the random state stay as they are.

    Args:
        module: any module; also one that `stateless` refuses.
        *args, **kwargs: what its forward takes. Without any, only what the module holds is reported.

    Returns:
        An `Explanation`: printable, and data. A finding that `blocks` has a named error behind it, or makes
        ``backend="auto"`` take the loop.

    Raises:
        ModuleError: `module` is not a `torch.nn.Module`.

    Example:
        >>> import torch
        >>> from statelessify import explain
        >>> report = explain(torch.nn.Linear(2, 1), torch.ones(3, 2))
        >>> report.findings, report.blocked("vmap")
        ((), False)
    """
    check_is_module(module)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _explain(module, args, kwargs)


def _explain(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    findings: list[Finding] = []
    lazy = any(is_uninitialized(tensor) for tensor in find_slots(module).tensors.values())
    try:
        apply, params, buffers = stateless(module, example_args=args if lazy and args else None)
    except Exception as error:
        findings.append(_finding("stateless", error))
        return Explanation(type(module).__name__, _held(module, set()), _shared(module), (), tuple(findings), ())
    findings += _untrained(module)
    trial = _Trial(apply, params, buffers, args, kwargs)
    tried = tuple(trial.run()) if args or kwargs else ()
    met = [rule for rule in RULES if trial.watched.met.intersection(rule.targets)]
    of_modules = [rule_of(part) for _, part in named_parts(module)]
    needed = tuple({id(rule): rule for rule in (*met, *of_modules) if rule is not None}.values())
    return Explanation(
        type(module).__name__,
        _held(module, trial.written),
        _shared(module),
        needed,
        (*findings, *trial.findings),
        tried,
    )


# What it holds -----------------------------------------------------------------------------------------------------


def _held(module: nn.Module, written: set[str]) -> tuple[Held, ...]:
    slots = find_slots(module)
    rows: list[Held] = []
    for name, places in {**slots.params, **slots.buffers}.items():
        tensor = slots.tensors[name]
        role: Role = "buffer" if any(p.registered_buffer for p in places) else "frozen"
        shape = () if is_uninitialized(tensor) else tuple(tensor.shape)
        also = tuple(place.path for place in places[1:])
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append(Held(name, "parameter" if name in slots.params else role, shape, dtype, also, name in written))
    return (*rows, *(Held(name, "empty", (), "", (), name in written) for name in slots.empty))


def _shared(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    paths: dict[int, list[str]] = {}
    for path, part in named_parts(module, twice=True):
        paths.setdefault(id(part), []).append(path)
    return tuple(tuple(each) for each in paths.values() if len(each) > 1)


def _untrained(module: nn.Module) -> Iterator[Finding]:
    """What is held past the module's registers: nobody's parameters, so constants."""
    known = {id(part) for _, part in named_parts(module)} | set(map(id, find_slots(module).tensors.values()))
    for item in reachable(module):
        if id(item) in known or not isinstance(item, (nn.Module, Tensor)):
            continue
        if isinstance(item, nn.Module):
            held = find_slots(item)
            known |= {id(part) for _, part in named_parts(item)} | set(map(id, held.tensors.values()))
            if held.params:
                yield Finding(
                    "parameters",
                    False,
                    f"a {type(item).__name__} is held without being registered: its {len(held.params)} parameters are "
                    "constants",
                    "",
                    "keep it in an attribute of its own, or in an nn.ModuleList or nn.ModuleDict",
                )
        elif item.requires_grad and item.is_leaf:
            yield Finding(
                "parameters",
                False,
                f"a tensor of shape {tuple(item.shape)} that requires a gradient is no parameter: it is a constant",
                "",
                "register it: `self.name = nn.Parameter(tensor)`",
            )


# What it allows ----------------------------------------------------------------------------------------------------


class _Trial:
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
            yield "vmap"
            self._works("vmap", self._mapped)
        yield "compile"
        self._works("compile", self._compiled)

    def _works(self, topic: Topic, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            self.findings.append(_finding(topic, error))
            return False
        return True

    def _out(self, params: Params) -> list[Tensor]:
        out, _ = self.apply(params, self.buffers, *self.args, **self.kwargs)
        return [t for t in tree_leaves(out) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]

    def _loss(self, params: Params) -> Tensor:
        """A number that no derivative of a linear module makes zero."""
        return torch.stack([(t.real.sin() + t.real.square()).sum() for t in self._out(params)]).sum()

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
        stacked = {name: torch.stack([p.detach(), p.detach()]).requires_grad_() for name, p in self.params.items()}
        if not self.differentiable:
            vmap(self._out, randomness="different")(stacked)
            return
        values = vmap(self._loss, randomness="different")(stacked)
        torch.autograd.grad(values.sum(), list(stacked.values()), allow_unused=True)
        vmap(grad(self._loss), randomness="different")(stacked)

    def _compiled(self) -> None:
        compiled: Any = torch.compile(self.apply, fullgraph=True, backend="eager")  # pyright: ignore[reportUnknownVariableType]
        compiled(self.params, self.buffers, *self.args, **self.kwargs)


# What went wrong ---------------------------------------------------------------------------------------------------

_REMEDIES: dict[str, str] = {
    "gradient": "give it an output of floating point that is computed from a parameter",
    "second order": "write a rule for the operation (`statelessify.rules.rule`), or use `gradient=FirstOrder()`",
    "vmap": 'leave `backend="auto"`, which runs the tasks in a loop, or write a rule (`statelessify.rules.rule`)',
    "compile": "compile what surrounds the call, or leave this module uncompiled",
    "forward": "see that the module itself runs with these arguments",
}


def _finding(topic: Topic, error: Exception) -> Finding:
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
