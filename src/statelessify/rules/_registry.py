"""What is computed instead of an operation that torch's transforms get wrong, or cannot do."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .._structure import named_parts
from .._transforms import transforming
from ..errors import ModuleError

__all__: list[str] = []

When = Literal["transforms", "gradients", "always"]
Call = TypeVar("Call", bound=Callable[..., Any])


class Rule(NamedTuple):
    """One rule: `call` runs instead of each of `targets`, for the reason that `why` gives.

    `upstream` is where torch speaks of it. `when`: ``"transforms"`` inside vmap, grad, jvp or under torch.compile;
    ``"gradients"`` also in the inner steps of `adapt`, which are differentiated again; ``"always"`` in each call.
    """

    targets: tuple[Any, ...]
    call: Callable[..., Any]
    why: str
    upstream: str
    when: When

    @property
    def names(self) -> tuple[str, ...]:
        """What the rule replaces, as it is written in code."""
        return tuple(_dotted(target) for target in self.targets)


def _dotted(target: Any) -> str:
    place = str(getattr(target, "__module__", None) or "torch")
    if place.startswith(("torch.nn.modules.", "torch._C._nn")):
        place = "torch.nn" if isinstance(target, type) else "torch.nn.functional"
    name = str(getattr(target, "__name__", target))
    attribute: Any = getattr(target, "__self__", None) if name == "__get__" else None
    if attribute is not None:
        return f"torch.Tensor.{attribute.__name__}"
    return f"{'torch.Tensor' if hasattr(target, '__objclass__') else place}.{name}"


RULES: list[Rule] = []
MODULES: dict[type[nn.Module], Rule] = {}
FUNCTIONS: dict[When, dict[Any, Callable[..., Any]]] = {"transforms": {}, "gradients": {}, "always": {}}
"""What to call instead of a function, by the occasion; what holds always holds on each."""


def rule(*targets: Any, why: str, upstream: str = "", when: When = "transforms") -> Callable[[Call], Call]:
    """Register what is to run instead of some functions, or instead of the forward of some modules.

    Each call of `apply`, and each function that `adapt`, `adapt_tasks` and `over_tasks` run, heeds it; nothing outside
    them does. Use it for a module of your own that torch.vmap cannot batch, such as data-dependent routing.

    Args:
        *targets: functions that torch lets one override (`torch.overrides.get_overridable_functions` lists them), or
            subclasses of `torch.nn.Module`. A rule of a class holds for subclasses that inherit its forward. A later
            rule replaces an earlier one.
        why: what goes wrong without the rule, in one sentence; `explain` prints it.
        upstream: a link to where that is discussed, or to the source that shows it.
        when: ``"transforms"``, ``"gradients"`` (also in the inner steps of `adapt`) or ``"always"``.

    Returns:
        A decorator. What it decorates takes the arguments of its targets; for a module, the module first. Inside,
        calls of the targets are torch's own.

    Raises:
        ModuleError: a target is neither callable nor a module class.

    Example:
        >>> import torch
        >>> from statelessify import stateless
        >>> from statelessify.rules import rule
        >>> class Positive(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x if bool((x > 0).all()) else -x
        >>> @rule(Positive, why="it branches on a value")
        ... def _(self, x):
        ...     return torch.where((x > 0).all(), x, -x)
        >>> apply, params, buffers = stateless(Positive())
        >>> torch.vmap(lambda x: apply(params, buffers, x)[0])(torch.tensor([[1.0], [-2.0]])).flatten()
        tensor([1., 2.])
    """
    for target in targets:
        kind = isinstance(target, type) and issubclass(target, nn.Module)
        if not kind and (isinstance(target, (type, nn.Module)) or not callable(target)):
            raise ModuleError(f"a rule replaces functions or subclasses of torch.nn.Module, not {target!r}")
    if when not in _OCCASIONS:
        raise ModuleError(f"`when={when!r}` is not one of {tuple(_OCCASIONS)}")

    def register(call: Call) -> Call:
        made = Rule(targets, call, why, upstream, when)
        RULES.append(made)
        for target in targets:
            if isinstance(target, type):
                MODULES[target] = made
            else:
                for occasion, calls in FUNCTIONS.items():
                    calls.pop(target, None)
                    if occasion in _OCCASIONS[when]:
                        calls[target] = call
        return call

    return register


def quicker(*targets: Any) -> Callable[[Call], Call]:
    """Register what computes the same as some functions inside transforms, in less time: nothing to be told of."""

    def register(call: Call) -> Call:
        FUNCTIONS["transforms"].update(dict.fromkeys(targets, call))
        return call

    return register


_OCCASIONS: Mapping[When, tuple[When, ...]] = {
    "transforms": ("transforms",),
    "gradients": ("transforms", "gradients"),
    "always": ("transforms", "gradients", "always"),
}
"""The occasions on which a rule holds, those with the most rules first."""


# Functions ---------------------------------------------------------------------------------------------------------


class Rules(TorchFunctionMode):
    """Runs the rules of one occasion instead of the functions that they replace."""

    def __init__(self, when: When) -> None:
        super().__init__()
        self.when: When = when

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call: Any = FUNCTIONS[self.when].get(func, func)
        return call(*args, **kwargs) if kwargs else call(*args)


class Watched(Rules):
    """The rules that hold always, for calls that do without the mode once one of them has met no such function."""

    def __init__(self, noted: When = "always") -> None:
        super().__init__("always")
        self.noted: When = noted
        self.entered = False
        self.met: set[Any] = set()  # functions with a rule on the noted occasion

    def where_needed(self) -> AbstractContextManager[Any]:
        """The mode; nothing where it is not needed, or where another already does its work."""
        if active_rules() is not None or (self.entered and not self.met):
            return nullcontext()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.entered = self.entered or kind is None  # a call that raised may not have come that far
        super().__exit__(kind, *error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FUNCTIONS[self.noted]:
            self.met.add(func)
        return super().__torch_function__(func, types, args, kwargs)


class Raised(AbstractContextManager[None]):
    """A mode that is active, for an occasion with more rules: two modes would see each function twice."""

    def __init__(self, mode: Rules, when: When) -> None:
        self._mode = mode
        self._when: When = when
        self._before: When = mode.when

    def __enter__(self) -> None:
        self._mode.when = self._when

    def __exit__(self, *error: Any) -> None:
        self._mode.when = self._before


def rules(when: When) -> AbstractContextManager[Any]:
    """The mode for an occasion, unless it is active already."""
    if torch.compiler.is_compiling():
        return Rules(when)
    active = _active()
    if any(mode.when in _OCCASIONS[when] for mode in active):
        return _NOTHING
    if active and type(active[-1]) is Rules:  # it belongs to this thread alone; others may be shared
        return Raised(active[-1], when)
    return Rules(when)


_NOTHING: AbstractContextManager[Any] = nullcontext()


def _active() -> list[Rules]:
    count = torch._C._len_torch_function_stack()
    if not count:
        return []
    stack = (torch._C._get_function_stack_at(index) for index in range(count))
    return [mode for mode in stack if isinstance(mode, Rules)]


class Hidden(AbstractContextManager[None]):
    """The innermost mode is not there, for calls that are known to meet none of its functions."""

    def __enter__(self) -> None:
        self._mode = torch._C._pop_torch_function_stack()

    def __exit__(self, *error: Any) -> None:
        torch._C._push_on_torch_function_stack(self._mode)


def innermost_rules() -> When | None:
    """The occasion of the innermost of all modes, if it is one of rules that belongs to this thread alone."""
    count = torch._C._len_torch_function_stack()
    mode: Any = torch._C._get_function_stack_at(count - 1) if count else None
    return mode.when if type(mode) is Rules else None


def active_rules() -> When | None:
    """The occasion whose rules hold here, the most of them where several do."""
    active = [mode.when for mode in _active()]
    return next((when for when in _OCCASIONS["always"] if when in active), None)


def rules_here() -> AbstractContextManager[Any]:
    """The mode where a transform is active; nothing in plain eager code, which stays free of its cost."""
    return rules("transforms") if transforming() else nullcontext()


def rules_of_call() -> AbstractContextManager[Any]:
    """The mode for a call of a module: that of transforms inside one, else that of what holds always."""
    return rules(occasion_of_call())


def occasion_of_call() -> When:
    return "transforms" if transforming() else "always"


# Modules -----------------------------------------------------------------------------------------------------------


def rule_of(part: nn.Module) -> Rule | None:
    """The rule that holds for a module: that of the class which its forward comes from."""
    return None if "forward" in part.__dict__ else rule_of_class(type(part))


def rule_of_class(kind: type[nn.Module]) -> Rule | None:
    """The rule that holds for the modules of a class."""
    for cls in kind.__mro__:
        if "forward" in cls.__dict__:
            return MODULES.get(cast("Any", cls))
    return None


def install(module: nn.Module) -> nn.Module:
    """Give each part of a private copy the forward of its rule."""
    for _, part in named_parts(module):
        if rule_of(part) is not None:
            part.__dict__["forward"] = types.MethodType(forward, part)
    return module


def holds(when: When) -> bool:
    """Whether this is the occasion of a module's rule."""
    return when == "always" or transforming() or (when == "gradients" and active_rules() == "gradients")


def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What runs as the forward of a module with a rule: the rule where it holds."""
    found = rule_of_class(type(part))
    if found is not None and holds(found.when):
        return found.call(part, *args, **kwargs)
    return cast("Any", type(part)).forward(part, *args, **kwargs)
