"""Differentiable optimizers, made from those of torch.optim; and their hyperparameters as tensors that learn."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from ..._words import listed
from ...errors import FastWeightsError, HyperparameterError, OptimizerError
from ._arithmetic import add as _add
from ._arithmetic import addcdiv as _addcdiv
from ._arithmetic import addcmul as _addcmul
from ._arithmetic import mask_closure as _get_mask_closure
from ._arithmetic import maybe_mask as _maybe_mask
from ._differences import differs
from ._optimizer import DifferentiableOptimizer, Override, check_lengths
from ._rules import (
    DifferentiableAdadelta,
    DifferentiableAdafactor,
    DifferentiableAdagrad,
    DifferentiableAdam,
    DifferentiableAdamax,
    DifferentiableAdamW,
    DifferentiableASGD,
    DifferentiableMuon,
    DifferentiableNAdam,
    DifferentiableRAdam,
    DifferentiableRMSprop,
    DifferentiableRprop,
    DifferentiableSGD,
)
from .utils import _recursive_map, flatten

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdafactor",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableMuon",
    "DifferentiableNAdam",
    "DifferentiableOptimizer",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]

# What the authors of differentiable optimizers import, private as it is.
_FOR_AUTHORS = (_add, _addcdiv, _addcmul, _get_mask_closure, _maybe_mask)
_GroupedGradsType = list[list[Tensor]]
_StateType = list[collections.defaultdict[int, Any]]
_GradClosureType = Callable[[Tensor], Tensor]
_OverrideType = dict[str, list[Any]]
_GradCallbackType = Callable[[list[Tensor]], list[Tensor]]

_opt_mapping: dict[Any, type[DifferentiableOptimizer]] = {
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adafactor: DifferentiableAdafactor,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.Muon: DifferentiableMuon,
    torch.optim.NAdam: DifferentiableNAdam,
    torch.optim.RAdam: DifferentiableRAdam,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
    torch.optim.SGD: DifferentiableSGD,
}


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable optimizer that goes on where `opt` stands.

    Args:
        opt: an optimizer of torch.optim, or of a type that was given to `register_optim`; a subclass is another type.
        reference_params: all parameters of the module, ``module.parameters()``.
        fmodel: the patched module that its steps update.
        device: where the state is moved to.
        override: name -> list of one value, or of one for each group; tensors may require gradients.
        track_higher_grads: with False each update is detached.
        **kwargs: for the constructor, such as `grad_callback`.

    Raises:
        OptimizerError: the type is not known.
        FastWeightsError: a parameter of `opt` is none of `reference_params`.

    Example:
        >>> import torch
        >>> from statelessify.compat import higher
        >>> net = torch.nn.Linear(2, 1)
        >>> fmodel = higher.monkeypatch(net)
        >>> diffopt = higher.get_diff_optim(torch.optim.SGD(net.parameters(), lr=0.1), net.parameters(), fmodel)
        >>> new = diffopt.step(fmodel(torch.ones(2)).sum())
        >>> torch.allclose(new[0], net.weight - 0.1)
        True
    """
    return _differentiable(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: Any = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A differentiable optimizer that begins anew.

    Args:
        opt_type: a type of torch.optim, or one that was given to `register_optim`.
        opt_kwargs: for its constructor.
        params: tensors like those that it will update, or parameter groups of them; only their shapes matter.
        fmodel: the patched module that its steps update; in place of `params`, the source of the shapes.
        device: where the state is moved to.
        override: as for `get_diff_optim`.
        track_higher_grads: with False each update is detached.
        **kwargs: for the constructor, such as `grad_callback`.

    Raises:
        OptimizerError: the type is not known.
        FastWeightsError: neither `params` nor `fmodel` was given.

    Example:
        >>> import torch
        >>> from statelessify.compat import higher
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, params=[w])
        >>> diffopt.step((w**2).sum(), params=[w])[0].item()
        0.800000011920929
    """
    make = _differentiable(opt_type)
    if params is None and fmodel is None:
        raise FastWeightsError("there is nothing to optimize: pass `params=`, or a patched module as `fmodel=`")
    groups, dummies = _dummies(list(fmodel.parameters() if params is None else params))
    return make(
        opt_type(groups, **(opt_kwargs or {})),
        dummies,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def _dummies(params: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """Leaves of the same shapes, in groups where these are, and all of them in one list."""
    if not params or not isinstance(params[0], dict):
        leaves = [_dummy(p) for p in params]
        return leaves, leaves
    groups: list[dict[str, Any]] = []
    for group in cast("list[dict[str, Any]]", params):
        own = group["params"]
        own = [own] if isinstance(own, Tensor) else list(own)
        groups.append({**group, "params": [_dummy(p) for p in own]})
    return groups, [p for group in groups for p in group["params"]]


def _dummy(p: Any) -> Tensor:
    tensor: Any = p if isinstance(p, Tensor) else p[1]  # one of `named_parameters()`
    return torch.zeros_like(tensor, requires_grad=True)


def _differentiable(kind: Any) -> type[DifferentiableOptimizer]:
    if kind not in _opt_mapping:
        known = listed(sorted(each.__name__ for each in _opt_mapping))
        raise OptimizerError(
            f"{getattr(kind, '__name__', kind)} is not known here: write a subclass of `DifferentiableOptimizer` and "
            f"register it with `register_optim`, or use `statelessify.optim.from_torch`; known are {known}"
        )
    return _opt_mapping[kind]


def register_optim(optim_type: Any, diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Use a differentiable optimizer for a type of optimizers, in the whole process.

    Args:
        optim_type: the type of optimizers, in place of what may be known for it.
        diff_optim_type: a subclass of `DifferentiableOptimizer` whose `_update` does what a step of `optim_type` does.

    Example:
        >>> class SignSGD(torch.optim.SGD): ...
        >>> class DifferentiableSignSGD(DifferentiableOptimizer):
        ...     def _update(self, grouped_grads, **kwargs):
        ...         for group, grads in zip(self.param_groups, grouped_grads):
        ...             group["params"] = [p - group["lr"] * g.sign() for p, g in zip(group["params"], grads)]
        >>> register_optim(SignSGD, DifferentiableSignSGD)
    """
    _opt_mapping[optim_type] = diff_optim_type


# Hyperparameters that learn ----------------------------------------------------------------------------------------


_NOT_LEARNED = ("params", "param_names", "ns_steps")  # the last is a number of iterations


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: torch.device | str | None = None) -> Override:
    """The numbers in the groups of an optimizer as tensors that require gradients, in the form of `override`.

    Args:
        opt: the optimizer, which stays as it is.
        device: where the tensors are made.

    Returns:
        name -> list with one entry for each group: a 0-dim tensor, or a container of them where the hyperparameter is
        one. Switches, None and what is a tensor already are left out.

    Example:
        >>> opt = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> get_trainable_opt_params(opt)["lr"]
        [tensor(0.5000, requires_grad=True)]
    """

    def learned(number: float) -> Tensor:
        return torch.tensor(float(number), device=device, requires_grad=True)

    override: collections.defaultdict[str, list[Any]] = collections.defaultdict(list)
    for group in opt.param_groups:
        for name, value in group.items():
            leaves = flatten(value)
            if name in _NOT_LEARNED or not all(isinstance(leaf, (int, float)) for leaf in leaves):
                continue
            if any(isinstance(leaf, bool) for leaf in leaves):
                differs("bools")
                continue
            override[name].append(_recursive_map(value, learned))
    return cast("Override", override)


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Write learned hyperparameters back into the groups of an optimizer.

    Args:
        opt: the optimizer, whose groups are changed.
        override: name -> list of one value for all groups, or of one for each; as `get_trainable_opt_params` gives.

    Raises:
        HyperparameterError: a list of another length, or a value whose structure is not the group's; nothing has been
            written.

    Example:
        >>> opt = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.25)]})
        >>> opt.param_groups[0]["lr"]
        0.25
    """
    groups = opt.param_groups
    check_lengths(override, len(groups))
    new = [
        (group, name, values[0] if len(values) == 1 else values[index])
        for name, values in override.items()
        for index, group in enumerate(groups)
    ]
    copies: list[tuple[Tensor, Tensor]] = []
    found = [_written(value, group.get(name), name, copies) for group, name, value in new]
    for (group, name, _), value in zip(new, found, strict=True):
        group[name] = value
    for old, value in copies:
        old.data = value


def _written(value: Any, old: Any, name: str, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """What stands for `value` where `old` stands. A tensor stays the same one; what it gets is put into `copies`."""
    if isinstance(value, Tensor) and isinstance(old, Tensor):
        copies.append((old, value.detach().to(old.device, copy=True)))
        return old
    if isinstance(value, Tensor) and isinstance(old, (bool, int, float)):
        number = value.item()
        if type(old) is int and number != int(number):
            differs("whole")
            return number
        return type(old)(number)
    kind = cast("Any", type(old))
    if isinstance(value, dict) and isinstance(old, dict) and value.keys() == old.keys():
        given, before = cast("dict[Any, Any]", value), cast("dict[Any, Any]", old)
        return kind({key: _written(given[key], item, name, copies) for key, item in before.items()})
    both_sets = isinstance(value, set) and isinstance(old, set)
    if (both_sets or (isinstance(value, (list, tuple)) and isinstance(old, (list, tuple)))) and _as_many(value, old):
        pairs = zip(cast("Any", value), cast("Any", old), strict=True)
        items = [_written(*pair, name, copies) for pair in pairs]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    raise HyperparameterError(
        f"in `override[{name!r}]`, {value!r} cannot stand where the optimizer has {old!r}: give a tensor for a number, "
        "and a container of the same form for a container"
    )


def _as_many(value: Any, old: Any) -> bool:
    return len(value) == len(old)
