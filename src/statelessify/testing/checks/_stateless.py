"""`check_stateless`: a module as a pure function does what the module itself does, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import nn

from ..._skeleton import check_is_module, find_slots
from ..._stateless import stateless
from ..._structure import named_parts
from ..._words import listed, nearest
from ...errors import NamesError
from ...typing import Buffers, Params
from .._unmutated import Watch
from ._probe import accepted, call_of, code_of
from ._pure import Apply, Case, detached_copies
from ._twins import call, copy_of, scaled, works

__all__ = ["check_stateless"]


def check_stateless(
    module: nn.Module,
    *args: Any,
    apply: Apply | None = None,
    params: Params | None = None,
    buffers: Buffers | None = None,
    kwargs: Mapping[str, Any] | None = None,
    threads: int = 4,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that a module's pure form gives what the module gives, and leaves everything else as it is.

    With ordinary copies of the module are compared, for its own values and for others, in training and in evaluation:
    outputs, gradients by parameters and floating inputs (those of tied weights are sums), new buffers, and a second
    call from these. Also that no call writes into what it is given or into the module, that nothing is recorded
    under `torch.no_grad`, that calls from several threads do not disturb each other, and that the function pickles
    if the module does. Random numbers come from the same seed.

    Args:
        module: any module; it is left as it is.
        *args: what it is called with.
        apply: the function under test, ``apply(params, buffers, *args, **kwargs) -> (out, new_buffers)`` with two dicts
            of tensors by name. None: that of `stateless`. One of your own is tested in the module's mode alone.
        params: the parameters that it is called with. None: every trainable parameter once, by its first name.
        buffers: likewise. None: every other tensor of the module.
        kwargs: keyword arguments of the call.
        threads: how many threads call it at once; 1 leaves this out.
        rtol: relative tolerance, as for `assert_trees_close`.
        atol: absolute tolerance.

    Raises:
        AssertionError: they differ, or something was written into. It names the leaf, its worst entry, both values,
            and the call.
        StatelessifyError: what `stateless` and `apply` refuse.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> check_stateless(nn.Linear(3, 2), torch.ones(4, 3))
        >>> model = nn.BatchNorm1d(1)
        >>> def mine(params, buffers, x):  # the statistics move in place
        ...     return torch.func.functional_call(model, (params, dict(buffers)), x), buffers
        >>> check_stateless(model, torch.tensor([[1.0], [3.0]]), apply=mine)
        Traceback (most recent call last):
        ...
        AssertionError: `mine` wrote into `buffers`, which it was given:
          leaf `buffers.num_batches_tracked`: 1 of 1 entries differ
          worst after 1, before 0 (difference 1, allowed 0)
          2 more of 3 leaves differ: `buffers.running_mean`, `buffers.running_var`
          in its own mode, with the module's own values, first call
          to reproduce: check_stateless(BatchNorm1d, torch.tensor([[1.0], [3.0]], dtype=torch.float32), apply=mine)
    """
    check_is_module(module)
    subject = stateless(module).apply if apply is None else apply
    options = {} if apply is None else {"apply": code_of(apply)}
    options |= {"kwargs": kwargs} if kwargs else {}
    note = call_of("check_stateless", module, args, **options)
    case = Case(module, args, dict(kwargs or {}), [], find_slots(module), Watch(module), (rtol, atol), note)
    own = own_values(case, params, buffers)
    modes = {"its own mode": (subject, module)}
    if apply is None:
        check_names(case, list(own[1]))
        for name, training in (("training", True), ("evaluation", False)):
            modes[name] = cast("Any", subject).train(training), copy_of(module).train(training)
        if all(part.training == module.training for _, part in named_parts(module)):
            modes["training" if module.training else "evaluation"] = modes.pop("its own mode")
    for mode, (function, original) in modes.items():
        if original is not module and not works(original, case.args, case.kwargs):
            continue
        here = case._replace(module=original, wanted=accepted(partial(call, original), (case.args, case.kwargs)))
        here.check(function, *own, f"in {mode}, with the module's own values")
        here.check(function, scaled(own[0]), scaled(own[1]), f"in {mode}, with other values")
        here.check_silent(function, *own, f"in {mode}, under `torch.no_grad`")
        here.check_threads(function, *own, threads, f"in {mode}")
        here.check_pickled(function, *own, f"in {mode}, unpickled")


def own_values(case: Case, params: Params | None, buffers: Buffers | None) -> tuple[Params, Buffers]:
    """Copies of the tensors that the function is called with: those that were given, or the module's."""
    tensors = case.slots.tensors
    given = {name: tensors[name] for name in case.slots.params if name not in (buffers or {})}
    others = {name: tensors[name] for name in case.slots.buffers if name not in (params or {})}
    given, others = given if params is None else params, others if buffers is None else buffers
    places = {**case.slots.params, **case.slots.buffers}
    first = {place.path: name for name, found in places.items() for place in found}
    for name in {**given, **others}:
        if name not in first and name not in case.slots.empty:
            raise NamesError(f"`{name}` is no tensor of {code_of(case.module)}{nearest(name, places)}")
        if first.get(name, name) != name:
            raise AssertionError(f"`{name}` is tied to `{first[name]}`, and so is no tensor of its own\n  {case.note}")
    return detached_copies(given), detached_copies(others)


def check_names(case: Case, others: list[str]) -> None:
    """What `stateless` returns are the trainable tensors once, and all others once."""
    found = stateless(case.module)
    wanted = [name for name, parameter in case.module.named_parameters() if parameter.requires_grad]
    for what, ours, theirs in (("params", found.params, wanted), ("buffers", found.buffers, others)):
        if list(ours) != theirs:
            raise AssertionError(f"`{what}` has {listed(ours)}, and should have {listed(theirs)}\n  {case.note}")
