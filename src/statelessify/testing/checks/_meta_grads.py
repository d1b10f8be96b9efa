"""`check_meta_grads`: the gradient through a whole inner loop, by all that goes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..._loop import Gradient
from ...optim import Optimizer
from ._complaint import Settings
from ._grads import check_settings
from ._inner import TorchOptimizer
from ._meta_check import Adapt, MetaCheck
from ._say import call_of_loop, optimizer_code

__all__ = ["check_meta_grads"]


def check_meta_grads(
    loss: Callable[[Any, Any], Tensor],
    params: Any,
    support: Any,
    query: Any = None,
    *,
    optimizer: Optimizer | TorchOptimizer | None = None,
    steps: int | None = None,
    adapt: Adapt | None = None,
    gradient: Gradient | None = None,
    grads: Callable[[Any, Any, Any], Any] | None = None,
    order: Literal[1, 2] = 1,
    rtol: float | None = None,
    atol: float = 0.0,
    entries: int = 4,
    kinks: Literal["raise", "skip"] = "raise",
    seed: int = 0,
) -> None:
    """Assert that an inner loop arrives where it should, and that the meta-gradient is what differences say.

    The meta-gradient is that of ``loss(adapted, query)`` by the initial parameters, the floating leaves of `support`
    and `query`, the optimizer's hyperparameters that are tensors, and the tensors that need a gradient and are read
    from a closure (a learned loss, a learned rate). Everything is in float64 if the code accepts that.

    Args:
        loss: ``loss(params, batch) -> scalar``.
        params: the initial parameters, any tree of floating tensors.
        support: what the loop is trained on; a tree, or `adapt`'s callable ``batch(step, params)``.
        query: what the adapted parameters are judged by. None: `support`.
        optimizer: an `optim.Optimizer`, a class of torch.optim, or ``lambda params: torch.optim.SGD(params, lr=0.1)``.
            The adapted parameters are compared with a plain loop of it.
        steps: of that loop.
        adapt: ``adapt(params, support)``, an inner loop of your own (with higher, torch.func, by hand), which returns
            adapted parameters. None: `statelessify.adapt` with the optimizer.
        gradient: what the meta-gradient has to be: that of a mode of `statelessify.adapt`. None: the exact one.
        grads: ``grads(params, support, query)``, your own meta-gradient by the parameters, checked in place of
            autograd's.
        order: 2 checks the derivative of the meta-gradient as well.
        rtol: what a derivative may be off, relative to its size. None: 1e-6 in float64, 1e-4 in float32.
        atol: what it may be off besides, per unit of input.
        entries: how many entries of each leaf are checked one by one, beside the whole leaf along random directions.
        kinks: ``"skip"`` passes over entries where the function has a kink.
        seed: of the random directions.

    Raises:
        AssertionError: the loop arrives elsewhere, or a derivative is wrong. It names the leaf, the worst entry, both
            values, and where it can what cuts the gradient. Or two calls differ, or an argument is written into.
        HyperparameterError: arguments that do not fit together.

    Example:
        >>> import torch
        >>> from statelessify import optim
        >>> from statelessify.testing import check_meta_grads
        >>> fit = lambda w, target: ((w - target) ** 4).sum()
        >>> learned = optim.sgd(lr=torch.tensor(0.1), momentum=0.9)
        >>> check_meta_grads(fit, torch.zeros(2), torch.ones(2), optimizer=learned, steps=3)
    """
    check_settings(order, kinks, entries)
    check = MetaCheck(loss, optimizer, steps, adapt, gradient, grads, order)
    what = call_of_loop("check_meta_grads", loss, params, support, query, _shown(locals()))
    settings = Settings(rtol, atol, seed, entries, kinks, what)
    tree = {"params": params, "support": support, **({} if query is None else {"query": query})}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        check.run(tree, settings)


def _shown(given: dict[str, Any]) -> dict[str, Any]:
    optimizer, adapt, gradient = given["optimizer"], given["adapt"], given["gradient"]
    shown = {
        "optimizer": None if optimizer is None else optimizer_code(optimizer),
        "steps": given["steps"],
        "adapt": None if adapt is None else getattr(adapt, "__name__", "adapt"),
        "gradient": gradient,
        "grads": None if given["grads"] is None else "grads",
        "order": None if given["order"] == 1 else given["order"],
        "seed": given["seed"] or None,
    }
    return {name: value for name, value in shown.items() if value is not None}
