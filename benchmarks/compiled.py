"""What does compiling one inner step bring? The sine MLP (1-40-40-1), 25 tasks, SGD: time to compile, time afterwards.

Compile times are those of fresh processes with inductor's caches off; steady times are medians over rounds in which
both contenders run once. ``--conv`` adds a convolutional network, which takes minutes to compile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from statelessify import adapt_tasks, compiled, optim, over_tasks, stateless

Data = tuple[Tensor, Tensor]


class Problem:
    """A network, its loss, and tasks."""

    def __init__(self, network: nn.Module, support: Data, query: Data, fit: Callable[[Tensor, Tensor], Tensor]) -> None:
        apply, self.params, buffers = stateless(network)
        self.support, self.query = support, query

        def loss(params: dict[str, Tensor], batch: Data) -> Tensor:
            return fit(apply(params, buffers, batch[0])[0], batch[1])

        self.loss = loss

    def meta_gradient(self, loss: Any, steps: int) -> list[Tensor]:
        adapted = adapt_tasks(loss, self.params, self.support, optimizer=optim.sgd(lr=0.01), steps=steps)
        value = over_tasks(loss, in_dims=0)(adapted.params, self.query).mean()
        return list(torch.autograd.grad(value, list(self.params.values())))


def sine(dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    (support, query) = ((torch.randn(25, 10, 1, dtype=dtype), torch.randn(25, 10, 1, dtype=dtype)) for _ in range(2))
    return Problem(net.to(dtype), support, query, F.mse_loss)


def conv4(dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(
            nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)
        )
        for c in (1, 32, 32, 32)
    ]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 5))

    def shots(count: int) -> Data:
        return torch.randn(8, 5 * count, 1, 28, 28, dtype=dtype), torch.arange(5).repeat(8, count)

    return Problem(net.to(dtype), shots(1), shots(3), F.cross_entropy)


PROBLEMS = {"sine": sine, "conv4": conv4}


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def first_call(name: str, steps: int) -> float:
    """Seconds of the first meta-gradient in a process of its own, with nothing cached."""
    command = [sys.executable, __file__, "--first-call", name, str(steps)]
    caches = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    out = subprocess.run(command, env=os.environ | caches, check=True, capture_output=True, text=True).stdout
    return float(out.split()[-1])


def largest_difference(problem: Problem, steps: int) -> float:
    fast = compiled(problem.loss)
    pairs = zip(problem.meta_gradient(fast, steps), problem.meta_gradient(problem.loss, steps), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def measure(name: str, steps: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of each round, and how often something was compiled again in 100 calls."""
    problem = PROBLEMS[name]()
    runs = {
        "plain": partial(problem.meta_gradient, problem.loss, steps),
        "compiled": partial(problem.meta_gradient, compiled(problem.loss), steps),
    }
    for run in runs.values():
        run()
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    for _ in range(100 if name == "sine" else 3):
        runs["compiled"]()
    again = counters["stats"]["unique_graphs"] - before
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=name):
        for contender, run in runs.items():
            times[contender].append(milliseconds(run))
    return times, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--conv", action="store_true")
    parser.add_argument("--first-call", nargs=2, metavar=("PROBLEM", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    if args.first_call:
        problem = PROBLEMS[args.first_call[0]]()
        fast = compiled(problem.loss)
        print(milliseconds(partial(problem.meta_gradient, fast, int(args.first_call[1]))) / 1e3)
        return
    args.out.mkdir(parents=True, exist_ok=True)

    difference = largest_difference(sine(torch.float64), args.steps)  # it must be right before it is timed
    assert difference < 1e-10, difference
    short, long = first_call("sine", 2), first_call("sine", 20)
    lines = ["| | measured | target |", "|---|---|---|"]
    lines.append(f"| largest difference of the meta-gradient, float64 | {difference:.0e} | 1e-10 |")
    lines.append(
        f"| first call, 20 steps / 2 steps | {long:.0f} s / {short:.0f} s = {long / short:.2f} | at most 1.2 |"
    )
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, name in enumerate(["sine", "conv4"] if args.conv else ["sine"]):
        times, again = measure(name, args.steps, args.rounds if name == "sine" else max(3, args.rounds // 10))
        plain, fast = (statistics.median(times[contender]) for contender in ("plain", "compiled"))
        target = "at least 2" if name == "sine" else "none: kernels decide"
        figures = f"{plain:.1f} / {fast:.1f} ms = {plain / fast:.1f}"
        lines.append(f"| {name}, {args.steps} steps, plain / compiled | {figures} | {target} |")
        lines.append(f"| {name}, compiled again in later calls | {again} | 0 |")
        ratios = [a / b for a, b in zip(times["plain"], times["compiled"], strict=True)]
        axes.boxplot(ratios, positions=[index], tick_labels=[name], widths=0.5)
    threads = torch.get_num_threads()
    table = f"torch {torch.__version__}, {threads} threads\n\n" + "\n".join(lines)
    print(table)
    (args.out / "compiled.md").write_text(table + "\n")
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(ylabel="plain / compiled, each round", title="One meta-gradient, compiled steps")
    figure.savefig(args.out / "compiled.png", dpi=150)
    print(f"picture: {args.out / 'compiled.png'}")


if __name__ == "__main__":
    main()
