"""What does compiling one inner step bring? The sine MLP (1-40-40-1), 25 tasks, SGD: time to compile, time afterwards.

Compile times are those of fresh processes with inductor's caches off; steady times are medians over rounds in which
both contenders run once. ``--conv`` adds a convolutional network, which takes minutes to compile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _report import Row, fresh, parser, report
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
NO_CACHES = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def largest_difference(problem: Problem, steps: int, backend: str) -> float:
    fast = compiled(problem.loss, backend=backend)
    pairs = zip(problem.meta_gradient(fast, steps), problem.meta_gradient(problem.loss, steps), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


class Measured(NamedTuple):
    times: dict[str, list[float]]
    """milliseconds of each round"""
    again: int
    """how often something was compiled in later calls"""


def measure(name: str, steps: int, rounds: int) -> Measured:
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
    return Measured(times, again)


def rows_of(name: str, steps: int, found: Measured) -> list[Row]:
    plain, fast = (statistics.median(found.times[contender]) for contender in ("plain", "compiled"))
    cells, sine = {"plain": f"{plain:.1f} ms", "compiled": f"{fast:.1f} ms"}, name == "sine"
    return [
        Row(
            f"{name}, {steps} steps: plain / compiled",
            plain / fast,
            2 if sine else None,
            cells=cells,
        ),
        Row(f"{name}, compiled again in 100 later calls" if sine else f"{name}, compiled again", found.again, most=0),
    ]


def draw(found: dict[str, Measured], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for index, (name, (times, _)) in enumerate(found.items()):
        ratios = [a / b for a, b in zip(times["plain"], times["compiled"], strict=True)]
        axes.boxplot(ratios, positions=[index], tick_labels=[name], widths=0.5)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(ylabel="plain / compiled, each round", title="One meta-gradient, compiled steps")
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__, rounds=60)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--conv", action="store_true")
    options.add_argument("--first-call", nargs=2, metavar=("PROBLEM", "STEPS"), help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.first_call:
        problem = PROBLEMS[args.first_call[0]]()
        print(milliseconds(partial(problem.meta_gradient, compiled(problem.loss), int(args.first_call[1]))) / 1e3)
        return
    # What inductor makes of the same graphs takes a compiler and a minute.
    difference = largest_difference(sine(torch.float64), args.steps, "aot_eager" if args.check else "inductor")
    if not difference < 1e-10:
        raise AssertionError(f"the compiled meta-gradient is off by {difference:.1e}")
    if args.check:
        return

    short, long = (fresh(__file__, "--first-call", "sine", steps, **NO_CACHES)[0] for steps in (2, 20))
    rows = [
        Row("largest difference of the meta-gradient, float64", difference, most=1e-10),
        Row(
            "sine, first call: 20 steps / 2 steps",
            long / short,
            most=1.2,
            cells={"compiled": f"{long:.0f} s / {short:.0f} s"},
        ),
    ]
    found: dict[str, Measured] = {}
    for name in ["sine", "conv4"] if args.conv else ["sine"]:
        found[name] = measure(name, args.steps, args.rounds if name == "sine" else max(3, args.rounds // 10))
        rows += rows_of(name, args.steps, found[name])
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "compiled.png"
    draw(found, picture)
    note = f"Medians of {args.rounds} rounds; {args.threads} thread(s)."
    report(__file__, "What does compiling one step bring?", rows, out=args.out, note=note, pictures=[picture])


if __name__ == "__main__":
    main()
