"""Inner loops for the tests of the modes: each a function ``run(mode, *inputs) -> scalar`` and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from problems import mlp, pull, recurrent, regression, regression_batch
from torch import Tensor, nn

from statelessify import adapt, adapt_tasks, optim, stateless, tree_stack

Run = Callable[..., Tensor]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def total(adapted: Any) -> Tensor:
    """Reads every result: parameters, losses, carry and the optimizer's slots."""
    leaves = torch.utils._pytree.tree_leaves((adapted.params, adapted.losses, adapted.carry, adapted.opt_state.slots))
    real = [torch.view_as_real(t) if t.is_complex() else t for t in leaves if isinstance(t, Tensor)]
    return torch.stack([(torch.sin(t) * (i + 1)).sum() for i, t in enumerate(real) if t.is_floating_point()]).sum()


def of(
    loss: Any, params: Any, batch: Any, mode: Any, *, steps: int = 3, lr: Any = 0.05, optimizer: Any = None, **more: Any
) -> Tensor:
    optimizer = optim.sgd(lr=lr) if optimizer is None else optimizer
    return total(adapt(loss, params, batch, optimizer=optimizer, steps=steps, gradient=mode, **more))


def quartic(w: Tensor, batch: Tensor) -> Tensor:
    return ((w - batch) ** 4).mean()


def rule(make: Callable[[Tensor], Any]) -> tuple[Run, list[Tensor]]:
    names, start = zip(*mlp().items(), strict=True)

    def run(mode: Any, *inputs: Tensor) -> Tensor:
        params = dict(zip(names, inputs[:3], strict=True))
        return of(regression, params, inputs[3:5], mode, optimizer=make(inputs[5]))

    return run, [*start, *regression_batch(), torch.tensor(0.1)]


def closing(loss: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[Run, list[Tensor]]:
    """A loss ``loss(w, batch, *closed)``; what it closes over is made from the inputs, start and batch too."""

    def run(mode: Any, w: Tensor, batch: Tensor, *closed: Tensor) -> Tensor:
        return of(lambda p, b: loss(p, b, *closed, w, batch), w, batch, mode)

    return run, [torch.rand(3), torch.rand(3), *(torch.rand(shape) for shape in shapes)]


def body() -> tuple[Run, list[Tensor]]:
    """Features computed outside, no leaf, and what they are computed from; both are read."""

    def run(mode: Any, w: Tensor, z: Tensor) -> Tensor:
        features = torch.tanh(z @ z.T) + z
        return of(lambda p, b: quartic(p @ features * z[0], b), w, torch.ones(3), mode)

    return run, [torch.rand(3), torch.rand(3, 3)]


def learned_loss() -> tuple[Run, list[Tensor]]:
    apply, weights, buffers = stateless(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), params="detach")

    def run(mode: Any, w: Tensor, *values: Tensor) -> Tensor:
        own = dict(zip(weights, values, strict=True))
        return of(lambda p, b: apply(own, buffers, p * b)[0].square().sum(), w, torch.ones(3), mode)

    return run, [torch.rand(3), *(t.detach() for t in weights.values())]


def learned_optimizer() -> tuple[Run, list[Tensor]]:
    class State(NamedTuple):
        slots: Any

    def run(mode: Any, w: Tensor, theta: Tensor) -> Tensor:
        def step(params: Any, grads: Any, state: State) -> tuple[Any, State]:
            memory = torch.tanh(theta[0] * state.slots + theta[1] * grads)
            return params - theta[2] * memory, State(memory)

        optimizer = optim.Optimizer(lambda params: State(torch.zeros_like(params)), step)
        return of(quartic, w, torch.ones(3), mode, optimizer=optimizer)

    return run, [torch.rand(3), torch.rand(3)]


def schedules() -> tuple[Run, list[Tensor]]:
    def run(mode: Any, w: Tensor, table: Tensor, momentum: Tensor) -> Tensor:
        rates = lambda step: {"a.*": table[step], "b": table[3:6]}
        loss = lambda p, b: pull({"w": p["a"]["x"] * p["b"]}, b)
        optimizer = optim.sgd(lr=rates, momentum=momentum)
        return of(loss, {"a": {"x": w}, "b": w * 2}, torch.ones(3), mode, optimizer=optimizer)

    return run, [torch.rand(3), torch.rand(6) * 0.05, torch.tensor(0.9)]


def carried() -> tuple[Run, list[Tensor]]:
    def run(mode: Any, w: Tensor, hidden: Tensor, batches: Tensor) -> Tensor:
        return of(recurrent, {"w": w}, lambda step, params: batches[step], mode, carry=hidden)

    return run, [torch.rand(3), torch.rand(3), torch.rand(3, 3)]


def clipped() -> tuple[Run, list[Tensor]]:
    def run(mode: Any, w: Tensor, bound: Tensor) -> Tensor:
        return of(quartic, w, torch.ones(3), mode, grad_transform=lambda g: bound * torch.tanh(g / bound))

    return run, [torch.rand(3), torch.rand(3)]


def tree() -> tuple[Run, list[Tensor]]:
    """Nested, complex, and one tensor in two places."""

    def run(mode: Any, w: Tensor, z: Tensor) -> Tensor:
        def loss(p: Any, b: Tensor) -> Tensor:
            return quartic(p["tied"][0] * p["tied"][1] * 2, b) + (p["z"] ** 2 * p["tied"][0]).abs().square().sum()

        return of(loss, {"tied": [w, w], "z": torch.complex(z, w)}, torch.ones(3), mode)

    return run, [torch.rand(3), torch.rand(3)]


def warm() -> tuple[Run, list[Tensor]]:
    """Goes on where an earlier loop has stopped."""

    def run(mode: Any, w: Tensor, lr: Tensor, hidden: Tensor) -> Tensor:
        options: Any = {"optimizer": optim.adam(lr=lr, eps=0.1), "steps": 2, "gradient": mode}
        begun = adapt(recurrent, {"w": w}, torch.ones(3), carry=hidden, **options)
        return total(begun) + total(
            adapt(recurrent, begun.params, torch.ones(3), carry=begun.carry, opt_state=begun.opt_state, **options)
        )

    return run, [torch.rand(3), torch.tensor(0.1), torch.rand(3)]


def module(make: Callable[[], nn.Module], *shape: int, call: Any = lambda out: out) -> tuple[Run, list[Tensor]]:
    apply, params, buffers = stateless(make(), params="detach", buffers="detach")
    x = torch.randn(2, *shape)

    def run(mode: Any, *values: Tensor) -> Tensor:
        torch.manual_seed(1)

        def loss(p: Any, carry: Any, b: Tensor) -> Any:
            out, carry = apply(p, carry, b)
            return call(out).square().mean(), carry

        return of(loss, dict(zip(params, values, strict=True)), x, mode, carry=buffers, steps=2)

    return run, [value.detach() for value in params.values()]


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)


def tasks(noise: float = 0.0, shared: bool = False, **choices: Any) -> tuple[Run, list[Tensor]]:
    def run(mode: Any, w: Tensor, hidden: Tensor, batches: Tensor, closed: Tensor, lr: Tensor) -> Tensor:
        torch.manual_seed(1)

        def loss(p: Any, h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            value, h = recurrent(p, h, F.dropout(b * closed.view(-1), noise))
            return value + ((p["w"] - w) ** 2).mean(), h

        rate = lr[0] if shared else optim.per_task(lr)
        data = (lambda step, params: batches[step % 2] * torch.rand(())) if noise else batches[0]
        options: Any = {"optimizer": optim.adam(lr=rate, eps=0.1), "steps": 3, "gradient": mode}
        return total(adapt_tasks(loss, {"w": w}, data, carry=hidden, **options, **choices))

    return run, [torch.rand(3), torch.rand(3), torch.rand(2, 4, 3), torch.rand(3), torch.rand(4) * 0.1]


def perturbed(w: Tensor, b: Tensor, z: Tensor, *_: Tensor) -> Tensor:
    """Gradients inside the loss: of a new leaf (an adversary), and of the parameters (SAM)."""
    delta = torch.zeros_like(b)
    delta.requires_grad = True
    (g,) = torch.autograd.grad(quartic((w + delta) * z, b), delta, create_graph=True)
    (h,) = torch.autograd.grad(quartic(w * z, b), w, create_graph=True)
    return quartic((w + 0.1 * g + 0.1 * h) * z, b)


LOOPS: dict[str, Callable[[], tuple[Run, list[Tensor]]]] = {
    "sgd": lambda: rule(lambda lr: optim.sgd(lr=lr, momentum=0.9, nesterov=True)),
    "adam": lambda: rule(lambda lr: optim.adam(lr=lr, eps=0.1, betas=(lr * 5, 0.99))),
    "adafactor": lambda: rule(lambda lr: optim.adafactor(lr=lr)),
    "proximal": lambda: closing(lambda w, b, w0, b0: quartic(w, b * w0) + ((w - w0) ** 2).sum() + w @ b0),
    "a view": lambda: closing(lambda w, b, z, *_: quartic(z.T @ w.view(3, 1), b) + z[0] @ w, (3, 3)),
    "a named tuple": lambda: closing(lambda w, b, z, *_: quartic(torch.stack(Pair(w, z)).sum(0) * w, b), (3,)),
    "nested lists": lambda: closing(lambda w, b, z, *_: quartic(torch.cat([w, *z.unbind()]), b[0]), (2, 3)),
    "vmap inside": lambda: closing(lambda w, b, z, *_: quartic(torch.vmap(lambda v: z * v)(w), b), (3,)),
    "perturbed": lambda: closing(perturbed, (3,)),
    "body": body,
    "learned loss": learned_loss,
    "learned optimizer": learned_optimizer,
    "schedules": schedules,
    "carried": carried,
    "clipped": clipped,
    "tree": tree,
    "warm": warm,
    "conv": lambda: module(lambda: nn.Sequential(nn.Conv1d(2, 2, 3), nn.BatchNorm1d(2), nn.Dropout(0.3)), 2, 4),
    "lstm": lambda: module(lambda: nn.LSTM(2, 2, batch_first=True), 3, 2, call=lambda out: out[0]),
    "attention": lambda: module(attention, 3, 4),
    "tasks": tasks,
    "tasks in chunks": lambda: tasks(chunk_size=3, shared=True),
    "tasks in a loop": lambda: tasks(backend="loop"),
    "tasks with noise": lambda: tasks(0.5),
    "tasks with one noise": lambda: tasks(0.5, randomness="same", shared=True),
}
__all__ = ["LOOPS", "Pair", "Run", "of", "quartic", "tasks", "total", "tree_stack"]
