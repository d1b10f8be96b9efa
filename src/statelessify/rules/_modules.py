"""Modules whose forward branches on values, and tensors that stand where a module has parameters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._transforms import levels, transforming, unseen
from ..errors import ModuleError
from ._registry import rule

__all__: list[str] = []


@rule(
    Tensor.__deepcopy__,
    why="a module may deep-copy its parameters, which torch does for leaves only",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_tensor.py",
    when="always",
)
def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if not isinstance(tensor, nn.Parameter) or (tensor.grad_fn is None and not transforming()):
        return cast("Tensor", tensor.__deepcopy__(memo))
    new = tensor.detach().clone()
    if not transforming():
        new = nn.Parameter(new, tensor.requires_grad)
    memo[id(tensor)] = new
    return new


@rule(
    cast("Any", Tensor.requires_grad).__get__,
    why="inside vmap it is False even where a gradient will be taken, so that what is guarded by it is skipped",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py",
)
def _requires_grad(tensor: Tensor, *kind: Any) -> bool:
    with torch._C.DisableTorchFunction():  # a look: modes that follow tensors would see one at each level
        return any(seen.requires_grad for seen in levels(tensor))


@rule(
    Tensor.requires_grad_,
    why="a tensor that stands in for a parameter has a graph, and torch changes the flag of leaves only",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/csrc/autograd/python_variable.cpp",
    when="always",
)
def _set_requires_grad(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    with unseen():
        leaf = tensor.is_leaf and not transforming()
    if leaf or not isinstance(tensor, nn.Parameter) or tensor.requires_grad == requires_grad:
        return tensor.requires_grad_(requires_grad)
    raise ModuleError(
        f"forward sets `requires_grad` of a parameter of shape {tuple(tensor.shape)}, which a pure function cannot do; "
        "detach what is computed from it, or split the parameters with `partition`"
    )


@rule(
    nn.AdaptiveLogSoftmaxWithLoss,
    why="it gathers the rows of each cluster, whose number depends on values",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/adaptive.py",
)
def _adaptive_log_softmax(self: nn.AdaptiveLogSoftmaxWithLoss, input_: Tensor, target_: Tensor) -> Any:
    """Every class' log-probability, of which one is taken: more work, and the same numbers."""
    if target_.ndim not in (0, 1) or input_.ndim != target_.ndim + 1 or input_.shape[:-1] != target_.shape:
        raise RuntimeError(
            f"a target of shape {tuple(target_.shape)} does not fit an input of {tuple(input_.shape)}: "
            "(batch,) for (batch, features), or () for (features,)"
        )
    rows = input_.reshape(-1, input_.shape[-1])
    head = self.head(rows).log_softmax(1)  # `log_prob` would write into an empty tensor, which has no tasks
    clusters = [cast("Any", tail)(rows).log_softmax(1) for tail in self.tail]
    tails = [tail + head[:, self.shortlist_size + index, None] for index, tail in enumerate(clusters)]
    every = torch.cat([head[:, : self.shortlist_size], *tails], 1)
    output = every.gather(1, target_.reshape(-1, 1)).reshape(target_.shape)
    return nn.modules.adaptive._ASMoutput(output, -output.mean())


@rule(
    torch._C._set_grad_enabled,
    why="forward mode goes on through `torch.no_grad()`, where reverse mode stops",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/grad_mode.py",
)
def _set_grad_enabled(enabled: bool) -> None:
    torch._C._set_grad_enabled(enabled)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        cast("Any", torch._C)._set_fwd_grad_enabled(enabled)
