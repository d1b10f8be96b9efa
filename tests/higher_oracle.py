"""Inner loops that run under real higher and under the layer that replaces it: modules, optimizers, overrides."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from live import CLASSES
from optim_naive import SPECS, configs, numbers
from optimizers import with_each
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

with warnings.catch_warnings():  # its code has a SyntaxWarning
    warnings.simplefilter("ignore")
    real: Any = pytest.importorskip("higher", reason="the library that is replaced is the oracle")

KINDS: dict[str, Any] = {cls.__name__.lower(): cls for cls in CLASSES}
EACH = pytest.mark.parametrize("rule", KINDS)

# What it differentiates rightly; not Adam's betas and ASGD's numbers. Rprop's derivatives are zero.
LEARNED: dict[str, tuple[str, ...]] = {
    "sgd": ("lr", "momentum", "dampening", "weight_decay"),
    "adam": ("lr", "weight_decay"),
    "adadelta": ("lr", "rho", "eps", "weight_decay"),
    "adagrad": ("lr", "lr_decay", "eps", "weight_decay"),
    "adamax": ("lr", "betas", "eps", "weight_decay"),
    "asgd": ("weight_decay",),
    "rmsprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "rprop": (),
}
NAMES = ("first.weight", "first.bias", "second.weight", "second.bias", "scale", "unused")


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(2) + 0.5)
        self.unused = nn.Parameter(torch.randn(3))
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.scale)


def square(params: Any) -> Tensor:
    return sum((p**2).sum() for p in params)


def clipped(gradients: Any) -> list[Any]:
    norm = square([g for g in gradients if g is not None]).sqrt()
    return [None if g is None else g / (1 + norm) for g in gradients]


CALLBACKS = [None, clipped, lambda gradients: [None, *gradients[1:]]]


@st.composite
def cases(draw: st.DrawFn, frozen: bool = True) -> dict[str, Any]:
    rule = draw(st.sampled_from(list(LEARNED)))
    options = draw(configs(rule)) | {"maximize": False}
    if rule == "adam":  # the place of eps differs
        options |= {"eps": 1e-20, "decoupled_weight_decay": False}
    if "momentum" in options and draw(st.booleans()):
        options |= {"momentum": 0.0} | ({"dampening": 0.0, "nesterov": False} if rule == "sgd" else {})
    places = draw(st.lists(st.integers(-1, 2), min_size=6, max_size=6).filter(lambda found: max(found) >= 0))
    rate = numbers(SPECS[rule].numbers["lr"])
    groups = [([n for n, at in zip(NAMES, places, strict=True) if at == group], draw(rate)) for group in range(3)]
    groups = [group for group in groups if group[0]]
    learned = [n for n in LEARNED[rule] if n != "dampening" or not options.get("nesterov")]
    overrides = []
    for name in draw(st.lists(st.sampled_from(learned), unique=True)) if learned else []:
        value, size = numbers(SPECS[rule].numbers[name]), draw(st.sampled_from([1, len(groups)]))
        at = -1 if rule == "rmsprop" else draw(st.integers(-1, 2))  # higher has to see its momentum at first
        overrides.append((at, name, draw(st.lists(value, min_size=size, max_size=size)), draw(st.booleans())))
    return {
        "rule": rule,
        "options": options,
        "groups": groups,
        "overrides": overrides,
        "frozen": draw(st.sets(st.sampled_from(NAMES[:5]), max_size=2)) if frozen else set(),
        "tied": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        # higher changes the step count of a warm state in place, which a learned beta needs.
        "warm": 0 if rule in ("rmsprop", "adamax") and overrides else draw(st.integers(0, 2)),
        "callbacks": [draw(st.sampled_from(CALLBACKS)) for _ in range(2)],
    }


def run(library: Any, case: Any, track: bool = True) -> tuple[Any, list[Tensor]]:
    """The weights after each of three steps, and the meta-gradients by initial weights and learned tensors."""
    torch.manual_seed(case["seed"])
    net = Net(case["tied"])
    named, x, y = dict(net.named_parameters()), torch.randn(5, 2), torch.randn(5, 2)
    for name in case["frozen"] & named.keys():
        named[name].requires_grad_(False)
    groups = [{"params": [named[n] for n in names if n in named], "lr": rate} for names, rate in case["groups"]]
    opt = KINDS[case["rule"]](groups, **case["options"])
    for _ in range(case["warm"]):
        opt.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        opt.step()
    given: list[dict[str, Any]] = [{}, {}, {}, {}]  # the last is the constructor's
    for at, name, values, learned in case["overrides"]:
        leaf = (lambda v: torch.tensor(v, requires_grad=True)) if learned else (lambda v: v)
        given[at][name] = [with_each(value, leaf) for value in values]
    first, then = case["callbacks"]
    fmodel = library.monkeypatch(net, copy_initial_weights=False, track_higher_grads=track)
    diffopt = library.get_diff_optim(
        opt, net.parameters(), fmodel, override=given[-1], track_higher_grads=track, grad_callback=first
    )
    new = []
    for step in range(3):
        loss = ((fmodel(x) - y) ** 2).mean()
        new.append(diffopt.step(loss, override=given[step] or None, grad_callback=then if step == 1 else None))
    assert all(a is b for a, b in zip(new[-1], fmodel.parameters(), strict=True))
    meta = ((fmodel(x + 0.1) - y) ** 2).mean() + sum((p**3).sum() for p in new[-1])
    inputs = [p for p in named.values() if p.requires_grad]
    inputs += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return new, list(torch.autograd.grad(meta, inputs, materialize_grads=True)) if track else []
