"""Optimizers that a third party might write, and what they make of a small problem."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from problems import assert_close
from torch import Tensor

from statelessify import adapt, optim
from statelessify.errors import DerivativeError

Kind = type[torch.optim.Optimizer]


class Foreign(torch.optim.Optimizer):
    """Calls `one` for each parameter, or whatever a subclass has for `step`."""

    def __init__(self, params: Any, lr: Any = 0.1, wd: Any = 0.2) -> None:
        super().__init__(params, {"lr": lr, "wd": wd})
        self.set_up()

    def set_up(self) -> None: ...

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, p.grad, group, self.state[p])

    def one(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.sub_(group["lr"] * (g + group["wd"] * p))


def made(one: Callable[..., None]) -> Kind:
    """An optimizer whose `one` is a function of ``(p, g, group, state)``."""
    return type("Made", (Foreign,), {"one": lambda self, *args: one(*args)})


def without_graph(kind: Kind) -> Kind:
    """The same as nearly all are written: nothing is recorded."""
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(kind.step)})


# Differentiable ones -----------------------------------------------------------------------------------------------


class OutOfPlace(Foreign):
    def one(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.copy_(p * (1 - group["lr"] * group["wd"]) - group["lr"] * g)


class Momentum(Foreign):
    def one(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        m = state.setdefault("m", torch.zeros_like(p))
        m.mul_(0.9).add_(g)
        p.mul_(1 - group["lr"] * group["wd"]).sub_(group["lr"] * m)


class Adaptive(Foreign):
    """What is saved for backward is written in place later: a root, a product, a parameter."""

    def one(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, v=torch.zeros_like(p), most=None)
        state["step"] += 1
        state["v"].mul_(0.9).addcmul_(g, g, value=0.1)
        state["most"] = state["v"].clone() if state["most"] is None else torch.maximum(state["most"], state["v"])
        root = (state["most"] / (1 - 0.9 ** state["step"]) + 0.1).sqrt_().add_(0.1)
        p.sub_(group["lr"] * g.div_(root).add_(group["wd"] * p))


class GroupCounter(Foreign):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["scale"] = 0.5 * group.get("scale", torch.zeros(())) + 1
            group["lr"] = group["lr"] * 0.8
            for p in group["params"]:
                p.sub_(group["scale"] * group["lr"] / group["step"] * (p.grad + group["wd"] * p))


class Attributes(Foreign):
    def set_up(self) -> None:
        self.count, self.sizes = 0, [1.0]
        self.means = [torch.zeros_like(p) for p in self.param_groups[0]["params"]]

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.sizes.append(self.sizes[-1] / self.count)
        for index, p in enumerate(self.param_groups[0]["params"]):
            self.means[index] = 0.5 * self.means[index] + p.grad
            group = self.param_groups[0]
            p.sub_(self.sizes[-1] * group["lr"] * (self.means[index] + group["wd"] * p))


class Foreach(Foreign):
    """Hyperparameters as lists: of a single tensor torch has a backward that fails."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            params, grads = group["params"], [p.grad for p in group["params"]]
            buffers = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in params]
            rate, decay = ([torch.as_tensor(group[key])] * len(params) for key in ("lr", "wd"))
            torch._foreach_add_(grads, torch._foreach_mul(params, decay))
            torch._foreach_mul_(buffers, 0.5)
            torch._foreach_add_(buffers, grads)
            torch._foreach_sub_(params, torch._foreach_mul(buffers, rate))


class OnGradients(Foreign):
    """In place on `p.grad`, which is the caller's."""

    def one(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.grad.add_(group["wd"] * p).mul_(group["lr"])
        p.grad = p.grad.sin()
        p.sub_(p.grad)


class Flat(Foreign):
    """All parameters of a group as one vector; a history of gradients."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            flat = torch.cat([p.grad.reshape(-1) for p in group["params"]])
            flat = flat / (flat.norm() + 1)
            first = self.state[group["params"][0]]
            first.setdefault("past", collections.deque(maxlen=2)).append(flat)
            move = torch.stack(list(first["past"])).mean(0)
            for p, part in zip(group["params"], move.split([p.numel() for p in group["params"]]), strict=True):
                p.sub_(group["lr"] * part.view_as(p))
                p.mul_(1 - group["wd"] * group["lr"])


class OnViews(Foreign):
    def one(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        flat = p.view(-1)
        flat[0] = flat[0] * (1 - group["wd"])
        flat[:1].sub_(group["lr"] * g.view(-1)[:1])
        p.view(-1).index_add_(0, torch.tensor([p.numel() - 1]), -group["lr"] * g.view(-1)[-1:])


class OfAdam(torch.optim.Adam):
    def __init__(self, params: Any, lr: Any = 0.1, wd: Any = 0.2) -> None:
        super().__init__(params, lr, weight_decay=0.1, eps=0.1, betas=(0.5, 0.6))
        self.param_groups[0]["wd"] = wd

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(p * (1 - group["lr"] * group["wd"]))


DIFFERENTIABLE: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        *(Foreign, OutOfPlace, Momentum, Adaptive, GroupCounter, Attributes, Foreach, OnGradients, Flat, OnViews),
        OfAdam,
    )
}


# What they make of a problem ---------------------------------------------------------------------------------------


def loss(params: dict[str, Tensor], target: Tensor) -> Tensor:
    return torch.sin(params["z"] * target).sum() + ((params["z"] - params["a"]) ** 4).sum() + torch.cos(params["a"])


def start() -> dict[str, Tensor]:
    """Names whose order is not that of the alphabet."""
    return {"z": torch.tensor([0.3, -0.7]), "a": torch.tensor(1.2)}


def real(kind: Kind, steps: int, options: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """What the stateful optimizer does."""
    leaves = {name: value.requires_grad_() for name, value in start().items()}
    optimizer = kind(list(leaves.values()), **(options or {}))
    target = torch.tensor([0.5, 2.0])
    for _ in range(steps):
        optimizer.zero_grad()
        loss(leaves, target).backward()
        with torch.no_grad():
            optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def pure(kind: Any, steps: int, **options: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        optimizer = kind if isinstance(kind, optim.Optimizer) else optim.from_torch(kind, **options)
        return adapt(loss, start(), torch.tensor([0.5, 2.0]), optimizer=optimizer, steps=steps).params


def inputs() -> list[Tensor]:
    """Of `adapted`: parameters, data, hyperparameters."""
    values = [*start().values(), torch.tensor([0.5, 2.0]), torch.tensor(0.1), torch.tensor(0.2)]
    return [value.requires_grad_() for value in values]


def adapted(kind: Kind, steps: int = 3, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """``(z, a, target, lr, wd) -> (z, a)`` after some steps."""

    def after(z: Tensor, a: Tensor, target: Tensor, lr: Tensor, wd: Tensor) -> tuple[Tensor, Tensor]:
        optimizer = optim.from_torch(kind, lr=lr, wd=wd)
        params = adapt(loss, {"z": z, "a": a}, target, optimizer=optimizer, steps=steps, **options).params
        return params["z"], params["a"]

    return after


# Never a wrong derivative ------------------------------------------------------------------------------------------

DIFFERENCE = 1e-6


def total(kind: Kind) -> Callable[..., Tensor]:
    """A number that depends on all of `inputs`."""

    def after(*given: Tensor) -> Tensor:
        z, a = adapted(kind, steps=2)(*given)
        return z.sum() + a

    return after


def quotients(kind: Kind) -> list[Tensor]:
    """The derivative of `total` by central differences, for which values are enough."""
    given = [value.detach() for value in inputs()]
    found = []
    with torch.no_grad():
        for place, value in enumerate(given):
            slopes = []
            for index in range(value.numel()):
                ends = []
                for sign in (1, -1):
                    moved = value.clone().reshape(-1)
                    moved[index] += sign * DIFFERENCE
                    ends.append(total(kind)(*given[:place], moved.view_as(value), *given[place + 1 :]))
                slopes.append((ends[0] - ends[1]) / (2 * DIFFERENCE))
            found.append(torch.stack(slopes).view_as(value))
    return found


def refused_or_right(compute: Callable[[], Any], kind: Kind, errors: Any = DerivativeError) -> None:
    """A derivative of `total` that is not refused has to be right."""
    try:
        found = compute()
    except errors:
        return
    assert_close(list(found), quotients(kind), 1e-6)


def by_autograd(kind: Kind) -> tuple[Tensor, ...]:
    given = inputs()
    return torch.autograd.grad(total(kind)(*given), given, allow_unused=True, materialize_grads=True)
