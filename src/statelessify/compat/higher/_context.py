"""`innerloop_ctx`: a patched module and the differentiable optimizer that updates it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ._optimizer import GradCallback, Override
from .optim import get_diff_optim
from .patch import patched

__all__ = ["innerloop_ctx"]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
    grad_callback: GradCallback | None = None,
) -> Generator[Any]:
    """A patched copy of a module, and its optimizer as a differentiable one, as `higher.innerloop_ctx`.

    Args:
        model: the module, which is never changed.
        opt: the optimizer of its parameters, or of some of them, which is never changed; the copy begins where it
            stands.
        device: where weights, buffers and state are moved to.
        copy_initial_weights: with False gradients reach the module's parameters (MAML).
        override: name of a hyperparameter -> list of one value, or of one for each group, in place of the optimizer's;
            tensors may require gradients.
        track_higher_grads: with False each update is detached, and memory does not grow with steps. That is for test
            time, and not first-order MAML: see `statelessify.FirstOrder`.
        grad_callback: applied to the tuple of gradients in each step (higher takes it in `step` only).

    Yields:
        ``(fmodel, diffopt)``, which stay usable afterwards.

    Raises:
        ModuleError: not a module, or one without a pure form.
        OptimizerError: an optimizer of a type that is not known.

    Example:
        >>> import torch
        >>> from statelessify.compat import higher
        >>> net = torch.nn.Linear(1, 1)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        ...     new = diffopt.step((fmodel(torch.ones(1)) ** 2).sum())
        ...     (fmodel(torch.ones(1)) ** 2).sum().backward()
        >>> net.weight.grad.shape
        torch.Size([1, 1])
    """
    fmodel, reference = patched(model, device, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(opt, reference, fmodel, device, override, track_higher_grads, grad_callback=grad_callback)
    yield fmodel, diffopt
