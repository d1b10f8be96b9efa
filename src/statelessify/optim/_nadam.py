"""NAdam."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._arithmetic import addcdiv, addcmul, decayed, lerp, like, number, power, root, scaled, where, with_decay
from ._hyperparameters import BETAS, refuse_unknown
from ._optimizer import Optimizer
from ._rule import Coefficients, Rule, Slots, Values

__all__ = ["nadam"]


def nadam(
    lr: Any = 2e-3,
    betas: Any = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0,
    momentum_decay: Any = 4e-3,
    decoupled_weight_decay: Any = False,
    *,
    maximize: Any = False,
    **unknown: Any,
) -> Optimizer:
    """NAdam, Adam with Nesterov momentum, with the names, defaults and meanings of `torch.optim.NAdam`.

    With ``g = grad + weight_decay * p`` (``-grad`` if `maximize`), at step ``t = 1, 2, ...``::

        mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        n = (1 - mu_t) * g / (1 - mu_1 ... mu_t) + mu_{t+1} * m / (1 - mu_1 ... mu_{t+1})
        p = p - lr * n / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        lr, eps, weight_decay, momentum_decay: hyperparameters (`statelessify.optim` lists what each may be).
        betas: a pair of these.
        decoupled_weight_decay: decay as in `adamw`.
        maximize: go up instead of down.

    Raises:
        HyperparameterError: a number out of its range.
        HyperparameterNameError: a hyperparameter that does not exist.

    Source: Dozat, Incorporating Nesterov momentum into Adam (ICLR workshop 2016).

    Example:
        >>> from statelessify import optim
        >>> optimizer = optim.nadam(lr=0.01, momentum_decay=torch.tensor(4e-3, requires_grad=True))
    """
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
    switches = {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize}
    refuse_unknown("nadam", unknown, [*numbers, *switches])
    slots, scalars = ("exp_avg", "exp_avg_sq"), ("mu_product",)
    return Rule("nadam", _prepare, _update, numbers, switches, {"betas": BETAS}, slots, scalars).optimizer()


def _prepare(values: Values, t: Any, scalars: Slots) -> Coefficients:
    (beta1, beta2), lr = values["betas"], values["lr"]

    def momentum(t: Any) -> Any:
        return beta1 * (1.0 - 0.5 * power(0.96, t * values["momentum_decay"]))

    mu, following = momentum(t), momentum(t + 1)
    stored = where(t == 1, 1.0, scalars["mu_product"]) * mu
    stored = (
        like(stored, scalars["mu_product"]) if isinstance(stored, Tensor) else scalars["mu_product"].new_tensor(stored)
    )
    product = number(stored)
    known = {
        "on_gradient": -values["lr"] * (1.0 - mu) / (1.0 - product),
        "on_average": -lr * following / (1.0 - product * following),
        "correction2": 1 - power(beta2, t),
        "decay": decayed(values) if values["decoupled_weight_decay"] else None,
    }
    return Coefficients({**values, **known}, {"mu_product": stored})


def _update(p: Tensor, g: Tensor, slots: Slots, c: Values) -> tuple[Tensor, Slots]:
    beta1, beta2 = c["betas"]
    p, g = with_decay(p, g, c)
    m = lerp(slots["exp_avg"], g, 1 - beta1)
    v = addcmul(scaled(slots["exp_avg_sq"], beta2), g, g, 1 - beta2)
    denominator = root(v / like(c["correction2"], p), c["eps"]) + like(c["eps"], p)
    p = addcdiv(addcdiv(p, g, denominator, c["on_gradient"]), m, denominator, c["on_average"])
    return p, {"exp_avg": m, "exp_avg_sq": v}
