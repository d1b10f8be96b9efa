"""`explain`: what a module holds, what stands in the way of transforming it, and what to do about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ._skeleton import check_is_module, find_slots
from ._stateless import stateless
from ._structure import is_uninitialized, named_parts, reachable
from ._trial import Finding, Topic, Trial, finding_of
from .rules import RULES, Rule
from .rules._registry import rule_of

__all__ = ["Explanation", "Finding", "Held", "explain"]

Role = Literal["parameter", "frozen", "buffer", "empty"]


class Held(NamedTuple):
    """A tensor of the module. `also` are its further names; `written`: a call leaves another value in it."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: str
    also: tuple[str, ...]
    written: bool


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
        findings.append(finding_of("stateless", error))
        return Explanation(type(module).__name__, _held(module, set()), _shared(module), (), tuple(findings), ())
    findings += _untrained(module)
    trial = Trial(apply, params, buffers, args, kwargs)
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
