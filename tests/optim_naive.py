"""Every rule once more, as its equations say it, for tensors and for numpy arrays of mpmath numbers; unsafe at zero.

`SPECS` lists what each rule can be given, and between which ends a hyperparameter is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from statelessify import optim

Values = dict[str, Any]


def larger(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return np.maximum(a, b)


def smaller(a: Any, b: Any) -> Any:
    return -larger(-a, -b)


def sign(x: Any) -> Any:
    return torch.sign(x) if isinstance(x, Tensor) else np.sign(x)


def where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else np.where(condition, a, b)


def rms(x: Any) -> Any:
    return (x * x).mean() ** 0.5


def decayed(p: Any, g: Any, h: Values, decoupled: bool = False) -> tuple[Any, Any]:
    g = -g if h["maximize"] else g
    if decoupled:
        return p * (1 - h["lr"] * h["weight_decay"]), g
    return p, g + h["weight_decay"] * p


def sgd(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h)
    s["momentum_buffer"] = g if t == 1 else h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
    g = g + h["momentum"] * s["momentum_buffer"] if h["nesterov"] else s["momentum_buffer"]
    return p - h["lr"] * g


def moments(g: Any, s: Values, h: Values, t: int) -> tuple[Any, Any]:
    """Both of them without their bias."""
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", 0 * g) + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", 0 * g) + (1 - beta2) * g * g
    return s["exp_avg"] / (1 - beta1**t), s["exp_avg_sq"] / (1 - beta2**t)


def adam(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h, h.get("decoupled_weight_decay", True))
    m, v = moments(g, s, h, t)
    if h["amsgrad"]:
        s["max_exp_avg_sq"] = s["exp_avg_sq"] if t == 1 else larger(s["max_exp_avg_sq"], s["exp_avg_sq"])
        v = s["max_exp_avg_sq"] / (1 - h["betas"][1] ** t)
    return p - h["lr"] * m / (v**0.5 + h["eps"])


def nadam(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h, h["decoupled_weight_decay"])
    _, v = moments(g, s, h, t)
    now, following = (h["betas"][0] * (1 - 0.96 ** (k * h["momentum_decay"]) / 2) for k in (t, t + 1))
    s["mu_product"] = s.get("mu_product", 1) * now
    n = (1 - now) * g / (1 - s["mu_product"]) + following * s["exp_avg"] / (1 - s["mu_product"] * following)
    return p - h["lr"] * n / (v**0.5 + h["eps"])


def radam(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h, h["decoupled_weight_decay"])
    m, _ = moments(g, s, h, t)
    beta2 = h["betas"][1]
    most = 2 / (1 - beta2) - 1
    r = most - 2 * t * beta2**t / (1 - beta2**t)
    if not r > 5:
        return p - h["lr"] * m
    c = ((r - 4) * (r - 2) * most / ((most - 4) * (most - 2) * r)) ** 0.5
    return p - h["lr"] * c * m * (1 - beta2**t) ** 0.5 / (s["exp_avg_sq"] ** 0.5 + h["eps"])


def adamax(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h)
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", 0 * g) + (1 - beta1) * g
    # |g| = sqrt(g^2) has no derivative at zero, but g / (|g| + eps) does
    s["exp_inf"] = larger(beta2 * s.get("exp_inf", 0 * g), abs(g) + h["eps"])
    return p - h["lr"] / (1 - beta1**t) * s["exp_avg"] / s["exp_inf"]


def adagrad(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h)
    s["sum"] = s.get("sum", h["initial_accumulator_value"]) + g * g
    return p - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (s["sum"] ** 0.5 + h["eps"])


def adadelta(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h)
    rho, eps, before = h["rho"], h["eps"], s.get("acc_delta", 0 * g)
    s["square_avg"] = rho * s.get("square_avg", 0 * g) + (1 - rho) * g * g
    delta = ((before + eps) / (s["square_avg"] + eps)) ** 0.5 * g
    s["acc_delta"] = rho * before + (1 - rho) * delta * delta
    return p - h["lr"] * delta


def rmsprop(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h)
    alpha = h["alpha"]
    spread = s["square_avg"] = alpha * s.get("square_avg", 0 * g) + (1 - alpha) * g * g
    if h["centered"]:
        s["grad_avg"] = alpha * s.get("grad_avg", 0 * g) + (1 - alpha) * g
        spread = spread - s["grad_avg"] ** 2
    s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", 0 * g) + g / (spread**0.5 + h["eps"])
    return p - h["lr"] * s["momentum_buffer"]


def asgd(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    _, g = decayed(p, g, h)
    eta = s.get("eta", h["lr"])
    p = p * (1 - h["lambd"] * eta) - eta * g
    s["ax"] = p if t == 1 else s["ax"] + (p - s["ax"]) / larger(1, t - 1 - h["t0"])
    s["eta"] = h["lr"] / (1 + h["lambd"] * h["lr"] * t) ** h["alpha"]
    return p


def rprop(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    g = -g if h["maximize"] else g
    (down, up), (least, most) = h["etas"], h["step_sizes"]
    agree = sign(g) * sign(s.get("prev", 0 * g))
    size = s.get("step_size", h["lr"] + 0 * g)
    size = where(agree > 0, size * up, where(agree < 0, size * down, size))
    s["step_size"] = smaller(larger(size, least), most)
    s["prev"] = where(agree < 0, 0 * g, g)
    return p - s["step_size"] * sign(s["prev"])


def adafactor(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    (eps1, eps2), b = h["eps"], t ** h["beta2_decay"]
    rate = larger(eps2, rms(p)) * smaller(h["lr"], t**-0.5)
    p, g = decayed(p, g, h, True)
    if g.ndim == 2:
        rows, columns = (g * g).mean(1)[:, None], (g * g).mean(0)[None, :]
        s["row_var"] = s.get("row_var", 0 * rows) * (1 - b) + b * rows
        s["col_var"] = s.get("col_var", 0 * columns) * (1 - b) + b * columns
        v = s["row_var"] * s["col_var"] / larger(s["row_var"].mean(), eps1)
    else:
        v = s["variance"] = s.get("variance", 0 * g) * (1 - b) + b * g * g
    u = g / larger(v, eps1**2) ** 0.5
    return p - rate * u / larger(1, rms(u) / h["d"])


def lion(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h, True)
    beta1, beta2 = h["betas"]
    before = s.get("exp_avg", 0 * g)
    s["exp_avg"] = beta2 * before + (1 - beta2) * g
    return p - h["lr"] * sign(beta1 * before + (1 - beta1) * g)


def muon(p: Any, g: Any, s: Values, h: Values, t: int) -> Any:
    p, g = decayed(p, g, h, True)
    momentum, (a, b, c) = h["momentum"], h["ns_coefficients"]
    m = s["momentum_buffer"] = momentum * s.get("momentum_buffer", 0 * g) + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * m if h["nesterov"] else m
    x = x / larger((x * x).sum() ** 0.5, h["eps"])
    tall = p.shape[0] > p.shape[1]
    for _ in range(h["ns_steps"]):
        gram = x.T @ x if tall else x @ x.T
        mix = b * gram + c * (gram @ gram)
        x = a * x + (x @ mix if tall else mix @ x)
    rows, columns = p.shape
    original = h["adjust_lr_fn"] != "match_rms_adamw"
    return p - h["lr"] * (max(1, rows / columns) ** 0.5 if original else 0.2 * max(p.shape) ** 0.5) * x


class Spec(NamedTuple):
    """What a rule can be given.

    Attributes:
        naive: ``naive(p, g, slots, values, t) -> p`` changes the slots.
        numbers: name -> the ends between which it is generated, one pair of them for each number of a tuple.
        choices: name -> what it may be beside its default, which is False or comes last.
        dead: inputs of which only a sign counts, so that the derivative by them is zero almost everywhere.
    """

    naive: Callable[..., Any]
    numbers: dict[str, Any]
    choices: dict[str, tuple[Any, ...]]
    dead: tuple[str, ...] = ()


RATE, DECAY, BETA, EPS = (0.01, 0.3), (0.01, 0.3), (0.1, 0.9), (0.01, 0.3)
ADAM: dict[str, Any] = {"lr": RATE, "betas": (BETA, BETA), "eps": EPS, "weight_decay": DECAY}
SWITCH = (True, False)
SPECS = {
    "sgd": Spec(
        sgd,
        {"lr": RATE, "momentum": BETA, "dampening": (-0.5, 0.9), "weight_decay": DECAY},
        {"nesterov": SWITCH, "maximize": SWITCH},
    ),
    "adam": Spec(adam, ADAM, {"amsgrad": SWITCH, "decoupled_weight_decay": SWITCH, "maximize": SWITCH}),
    "adamw": Spec(adam, ADAM, {"amsgrad": SWITCH, "maximize": SWITCH}),
    "nadam": Spec(
        nadam, ADAM | {"momentum_decay": (0.001, 0.5)}, {"decoupled_weight_decay": SWITCH, "maximize": SWITCH}
    ),
    "radam": Spec(radam, ADAM | {"betas": (BETA, (0.5, 0.95))}, {"decoupled_weight_decay": SWITCH, "maximize": SWITCH}),
    "adamax": Spec(adamax, ADAM, {"maximize": SWITCH}),
    "adagrad": Spec(
        adagrad,
        {"lr": RATE, "lr_decay": DECAY, "weight_decay": DECAY, "initial_accumulator_value": (0.1, 1.0), "eps": EPS},
        {"maximize": SWITCH},
    ),
    "adadelta": Spec(
        adadelta, {"lr": (0.1, 1.0), "rho": BETA, "eps": EPS, "weight_decay": DECAY}, {"maximize": SWITCH}
    ),
    "rmsprop": Spec(
        rmsprop,
        {"lr": RATE, "alpha": BETA, "eps": EPS, "weight_decay": DECAY, "momentum": BETA},
        {"centered": SWITCH, "maximize": SWITCH},
    ),
    "asgd": Spec(
        asgd,
        {"lr": RATE, "lambd": (0.1, 1.0), "alpha": (-0.5, 1.5), "t0": (-0.9, -0.1), "weight_decay": DECAY},
        {"maximize": SWITCH},
    ),
    "rprop": Spec(
        rprop,
        {"lr": (0.05, 0.09), "etas": ((0.4, 0.7), (1.1, 1.5)), "step_sizes": ((0.03, 0.06), (0.09, 0.15))},
        {"maximize": SWITCH},
        dead=("data",),
    ),
    "adafactor": Spec(
        adafactor,
        {"lr": (0.01, 0.9), "beta2_decay": (-0.9, -0.3), "eps": ((0.01, 1.0), (0.1, 2.0)), "d": (1.01, 1.1)}
        | {"weight_decay": DECAY},
        {"maximize": SWITCH},
    ),
    "lion": Spec(
        lion,
        {"lr": RATE, "betas": (BETA, BETA), "weight_decay": DECAY},
        {"maximize": SWITCH},
        dead=("data", "betas[0]", "betas[1]"),
    ),
    "muon": Spec(
        muon,
        {"lr": RATE, "weight_decay": DECAY, "momentum": BETA, "eps": (0.1, 1.5)}
        | {"ns_coefficients": ((1.4, 1.6), (-0.6, -0.4), (0.01, 0.1))},
        {"nesterov": SWITCH, "maximize": SWITCH, "adjust_lr_fn": ("match_rms_adamw", None), "ns_steps": (1, 2, 3)}
        | {"dtype": (torch.float64, None)},
    ),
}


def numbers(ends: Any) -> st.SearchStrategy[Any]:
    """A number between these ends, or a tuple of numbers."""
    return st.tuples(*map(numbers, ends)) if isinstance(ends[0], tuple) else st.floats(*ends)


@st.composite
def configs(draw: st.DrawFn, rule: str) -> Values:
    """All hyperparameters and choices of a rule."""
    spec = SPECS[rule]
    found = {name: draw(numbers(ends)) for name, ends in spec.numbers.items()}
    found |= {name: draw(st.sampled_from(values)) for name, values in spec.choices.items()}
    return legal(rule, found)


def legal(rule: str, values: Values) -> Values:
    """Torch refuses dampening with Nesterov."""
    return values | ({"dampening": 0.0} if rule == "sgd" and values["nesterov"] else {})


def plain(rule: str, **given: Any) -> Values:
    """A fixed number between the ends for each hyperparameter, and every choice off."""

    def middle(ends: Any) -> Any:
        return tuple(map(middle, ends)) if isinstance(ends[0], tuple) else (ends[0] + 2 * ends[1]) / 3

    spec = SPECS[rule]
    found = {name: middle(ends) for name, ends in spec.numbers.items()}
    return legal(rule, found | {name: values[-1] for name, values in spec.choices.items()} | given)


def make(rule: str, values: Values) -> optim.Optimizer:
    return getattr(optim, rule)(**values)


def number_names(values: Values) -> Iterator[tuple[str, Any]]:
    """Every real-valued hyperparameter, each of a pair by itself."""
    for name, value in values.items():
        if isinstance(value, tuple):
            yield from ((f"{name}[{index}]", each) for index, each in enumerate(value))
        elif isinstance(value, float):
            yield name, value


def with_numbers(values: Values, numbers: dict[str, Any]) -> Values:
    def replaced(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(numbers[f"{name}[{index}]"] for index in range(len(value)))
        return numbers.get(name, value)

    return {name: replaced(name, value) for name, value in values.items()}
