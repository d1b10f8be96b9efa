"""Learned learning rates and momentum, one of each per parameter group: a program written for the library `higher`.

    python examples/from_higher/learned_rates.py

It says `import higher` and nothing else about the library. docs/from-higher.md has the line with which the same file
runs on `statelessify`; tests/test_from_higher.py runs it on both and compares the numbers.

A network begins each task, a wave to fit, at the same random weights, which stay as they are. What is learned is how
to train it: with which rate and which momentum each group of its parameters moves in a few steps of SGD. The
hyperparameters leave the optimizer as tensors (`get_trainable_opt_params`), replace its numbers in the inner loop
(`override`), and go back into it (`apply_trainable_opt_params`), where plain torch then uses them.
"""

import copy

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = ("first", "middle", "last")  # the three layers


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))


def make_optimizer(net: nn.Sequential) -> torch.optim.SGD:
    layers = [net[0], net[2], net[4]]
    return torch.optim.SGD([{"params": layer.parameters()} for layer in layers], lr=0.02, momentum=0.5)


def sample_wave(points: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Support x and y, query x and y."""
    amplitude, phase = 0.5 + 2 * torch.rand(2, generator=generator)
    x = 6 * torch.rand(2 * points, 1, generator=generator) - 3
    y = amplitude * torch.sin(x + phase)
    return x[:points], y[:points], x[points:], y[points:]


def plain_training(net: nn.Sequential, inner: torch.optim.SGD, waves: list[tuple[Tensor, ...]], steps: int) -> float:
    """The mean query error that torch.optim reaches with the numbers in `inner`, without `higher`."""
    total = 0.0
    for x, y, query_x, query_y in waves:
        own = copy.deepcopy(net)
        optimizer = make_optimizer(own)
        for group, given in zip(optimizer.param_groups, inner.param_groups, strict=True):
            group.update(lr=given["lr"], momentum=given["momentum"])
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(own(x), y).backward()
            optimizer.step()
        total += F.mse_loss(own(query_x), query_y).item() / len(waves)
    return total


def main(
    meta_steps: int = 150, tasks: int = 4, test_tasks: int = 50, steps: int = 8, points: int = 10, seed: int = 0
) -> dict[str, list[float]]:
    """Prints the table of hyperparameters and errors before and after meta-training, and returns it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = make_net()
    inner = make_optimizer(net)
    unseen = [sample_wave(points, generator) for _ in range(test_tasks)]

    found = higher.optim.get_trainable_opt_params(inner)
    learned = {name: found[name] for name in ("lr", "momentum")}  # not the others: weight_decay, dampening
    outer = torch.optim.Adam([{"params": learned["lr"], "lr": 3e-3}, {"params": learned["momentum"], "lr": 1e-2}])

    def columns() -> dict[str, list[float]]:
        numbers = {name: [float(group[name]) for group in inner.param_groups] for name in learned}
        return {**numbers, "error": [plain_training(net, inner, unseen, steps)]}

    before = columns()
    for _ in range(meta_steps):
        outer.zero_grad()
        for _ in range(tasks):
            x, y, query_x, query_y = sample_wave(points, generator)
            with higher.innerloop_ctx(net, inner, override=learned) as (fnet, diffopt):
                for _ in range(steps):
                    diffopt.step(F.mse_loss(fnet(x), y))
                (F.mse_loss(fnet(query_x), query_y) / tasks).backward()
        outer.step()
        with torch.no_grad():
            for rate, momentum in zip(learned["lr"], learned["momentum"], strict=True):
                rate.clamp_(1e-4, 1.0)
                momentum.clamp_(1e-3, 0.95)
    higher.optim.apply_trainable_opt_params(inner, learned)
    after = columns()

    print(f"{steps} steps of SGD, {meta_steps} meta-steps; {test_tasks} unseen waves\n")
    print("layer     rate before   after     momentum before   after")
    for row, name in enumerate(GROUPS):
        rates, momenta = (before["lr"][row], after["lr"][row]), (before["momentum"][row], after["momentum"][row])
        print(f"{name:8s}  {rates[0]:11.4f}   {rates[1]:.4f}    {momenta[0]:15.3f}   {momenta[1]:.3f}")
    print(f"\nmean squared error with torch.optim: {before['error'][0]:.4f} before, {after['error'][0]:.4f} after")
    return {f"{name} {when}": c[name] for when, c in (("before", before), ("after", after)) for name in c}


if __name__ == "__main__":
    main()
