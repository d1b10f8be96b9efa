"""How fast is one meta-gradient over many tasks? The sine MLP (1-40-40-1) and conv4, peers interleaved in one process.

Each figure is the median over rounds in which every contender runs once, so that a noisy machine is noisy for all, and
then the median of some fresh processes. All contenders agree with a plain loop in float64 to 1e-10 before any is timed.
"by hand" is the least that torch can do: the network written out for all tasks at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import higher
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchopt
from _report import Row, fresh, medians, parser, report
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

from statelessify import adapt_tasks, optim, over_tasks, stateless

LR = 0.01
Params = dict[str, Tensor]
Data = tuple[Tensor, Tensor]


def sine_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def conv4(channels: int = 32, classes: int = 5) -> nn.Module:
    """The network for Omniglot of Finn et al. (ICML 2017), appendix A, with pooling."""
    blocks: list[nn.Module] = []
    for given in (1, channels, channels, channels):
        blocks += [nn.Conv2d(given, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels, classes))


@dataclass
class Problem:
    """A network with its criterion, and support and query sets ``(tasks, ...)``."""

    net: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    support: Data
    query: Data

    def __post_init__(self) -> None:
        self.apply, self.params, self.buffers = stateless(self.net)

    @property
    def tasks(self) -> list[tuple[Tensor, ...]]:
        return list(zip(*self.support, *self.query, strict=True))

    def loss(self, params: Params, batch: Data) -> Tensor:
        out, _ = self.apply(params, self.buffers, batch[0])
        return self.criterion(out, batch[1])

    def plain_loss(self, params: Params, batch: Data) -> Tensor:
        return self.criterion(functional_call(self.net, params, (batch[0],)), batch[1])

    def gradients(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, list(self.params.values())))


def sine(tasks: int, dtype: torch.dtype = torch.float32) -> Problem:
    support, query = torch.randn(2, 2, tasks, 10, 1, dtype=dtype)
    return Problem(sine_mlp().to(dtype), F.mse_loss, (support[0], support[1]), (query[0], query[1]))


def omniglot(tasks: int, dtype: torch.dtype = torch.float32, shots: int = 3) -> Problem:
    """Noise in the shapes of 5 ways with 1 shot, and 15 queries: the arithmetic is that of images."""

    def images(each: int) -> Data:
        return torch.randn(tasks, 5 * each, 1, 28, 28, dtype=dtype), torch.arange(5).repeat(tasks, each)

    return Problem(conv4().to(dtype), F.cross_entropy, images(1), images(shots))


# The contenders: the meta-gradient of the mean query loss, after some steps of SGD -----------------------------------


def with_adapt_tasks(problem: Problem, steps: int) -> list[Tensor]:
    options: Any = {"optimizer": optim.sgd(lr=LR), "steps": steps}
    adapted = adapt_tasks(problem.loss, problem.params, problem.support, **options)
    return problem.gradients(over_tasks(problem.loss, in_dims=0)(adapted.params, problem.query).mean())


def with_a_plain_loop(problem: Problem, steps: int) -> list[Tensor]:
    losses = []
    for x, y, query_x, query_y in problem.tasks:
        params: Params = dict(problem.params)
        for _ in range(steps):
            grads = torch.autograd.grad(problem.plain_loss(params, (x, y)), list(params.values()), create_graph=True)
            params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(problem.plain_loss(params, (query_x, query_y)))
    return problem.gradients(torch.stack(losses).mean())


def with_torch_func(problem: Problem, steps: int) -> list[Tensor]:
    def one(params: Params, support: Data, query: Data) -> Tensor:
        for _ in range(steps):
            grads = torch.func.grad(problem.plain_loss)(params, support)
            params = {name: params[name] - LR * grads[name] for name in params}
        return problem.plain_loss(params, query)

    together = vmap(one, in_dims=(None, 0, 0))
    found = torch.func.grad(lambda p: together(p, problem.support, problem.query).mean())(problem.params)
    return [found[name] for name in problem.params]


def with_higher(problem: Problem, steps: int) -> list[Tensor]:
    losses, net = [], problem.net
    for x, y, query_x, query_y in problem.tasks:
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), LR), copy_initial_weights=False) as (f, inner):
            for _ in range(steps):
                inner.step(problem.criterion(f(x), y))
            losses.append(problem.criterion(f(query_x), query_y))
    return problem.gradients(torch.stack(losses).mean())


def with_torchopt(problem: Problem, steps: int) -> list[Tensor]:
    losses, optimizer = [], torchopt.sgd(LR)
    for x, y, query_x, query_y in problem.tasks:
        params: Any = dict(problem.params)
        state = optimizer.init(params)
        for _ in range(steps):
            value = problem.plain_loss(params, (x, y))
            found = torch.autograd.grad(value, list(params.values()), create_graph=True)
            updates, state = optimizer.update(dict(zip(params, found, strict=True)), state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        losses.append(problem.plain_loss(params, (query_x, query_y)))
    return problem.gradients(torch.stack(losses).mean())


def with_bmm(problem: Problem, steps: int) -> list[Tensor]:
    """The sine MLP by hand, for all tasks at once: no library does with fewer operations."""
    tasks = len(problem.support[0])

    def losses(params: list[Tensor], batch: Data) -> Tensor:
        out = batch[0]
        for layer, (weight, bias) in enumerate(zip(params[::2], params[1::2], strict=True)):
            out = torch.baddbmm(bias.unsqueeze(1), out if layer == 0 else out.relu(), weight.mT)
        return (out - batch[1]).square().mean((1, 2))

    params = [p.expand(tasks, *p.shape) for p in problem.params.values()]
    for _ in range(steps):
        grads = torch.autograd.grad(losses(params, problem.support).sum(), params, create_graph=True)
        params = list(torch._foreach_add(params, grads, alpha=-LR))
    return problem.gradients(losses(params, problem.query).mean())


OURS = "adapt_tasks"
CONTENDERS: dict[str, Callable[[Problem, int], list[Tensor]]] = {
    OURS: with_adapt_tasks,
    "higher": with_higher,
    "TorchOpt": with_torchopt,
    "grad(vmap(grad))": with_torch_func,
    "bmm by hand": with_bmm,
}


@dataclass
class Question:
    """One row: a problem, and how many times faster than each contender it should be, and is meant to become."""

    name: str
    make: Callable[..., Problem]
    tasks: int
    targets: dict[str, float | None]
    aims: dict[str, float]
    share: float = 1.0
    """of the rounds"""
    steps: int = 5
    threads: int | None = None  # those of `--threads`

    @property
    def label(self) -> str:
        return f"{self.name}, {self.tasks} task{'s' if self.tasks > 1 else ''}"


QUESTIONS = [
    Question(
        "sine MLP",
        sine,
        25,
        {"higher": 13, "TorchOpt": 9.5, "grad(vmap(grad))": 1.7, "bmm by hand": None},
        {"higher": 20, "TorchOpt": 14, "grad(vmap(grad))": 2.5},
    ),
    Question("sine MLP", sine, 1, {"higher": 1.5, "TorchOpt": None, "grad(vmap(grad))": None, "bmm by hand": None}, {}),
    Question("conv4", omniglot, 8, {"higher": 1.6, "TorchOpt": None}, {}, share=0.25, threads=2),
]


def check_agreement(question: Question) -> None:
    """In float64 each contender gives the gradient of a plain loop."""
    problem = question.make(2 if question.tasks > 1 else 1, torch.float64)
    expected = with_a_plain_loop(problem, question.steps)
    for name in (OURS, *question.targets):
        found = CONTENDERS[name](problem, question.steps)
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10, msg=f"{name} gives another gradient")


def milliseconds(run: Callable[[], object]) -> float:
    """On one thread the time of this process, in which no other one takes part; else what a clock says."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return 1e3 * (clock() - start)


def in_rounds(runs: dict[str, Callable[[], object]], rounds: int, words: str) -> dict[str, float]:
    """The median time of each in ms, over rounds in which each runs once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in tqdm(range(rounds), desc=words):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(each) for name, each in times.items()}


def of_one_process(rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds of each contender, and how often those of `adapt_tasks` they are."""
    found: dict[str, float] = {}
    for question in QUESTIONS:
        problem, names = question.make(question.tasks), (OURS, *question.targets)
        runs = {name: partial(CONTENDERS[name], problem, question.steps) for name in names}
        torch.set_num_threads(question.threads or threads)
        times = in_rounds(runs, max(round(rounds * question.share), 3), question.label)
        for name, ms in times.items():
            found[f"{question.label}: {name}"] = ms
            found[f"{question.label}: {name} / {OURS}"] = ms / times[OURS]
    return found


def rows_of(question: Question, found: dict[str, float]) -> list[Row]:
    rows, ours = [], found[f"{question.label}: {OURS}"]
    for name, target in question.targets.items():
        what = f"{question.label}: {name} / {OURS}"
        cells = {"ms": f"{found[f'{question.label}: {name}']:.2f}", f"{OURS}, ms": f"{ours:.2f}"}
        if name in question.aims:
            cells["aim"] = f"{question.aims[name]:g}"
        headline = f"{question.label}, {question.steps} steps: {name} / `{OURS}`, time" if name == "higher" else ""
        rows.append(Row(what, found[what], least=target, cells=cells, headline=headline))
    return rows


def draw(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    bars = axes.barh([row.what.removesuffix(f" / {OURS}") for row in rows][::-1], [row.measured for row in rows][::-1])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(1, color="black")
    axes.set(xscale="log", xlabel=f"times the time of {OURS}", title="One meta-gradient, 5 steps of SGD")
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__, rounds=25)
    options.add_argument("--processes", type=int, default=3, help="(default: 3)")
    options.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="higher")
    if args.one:
        print(json.dumps(of_one_process(args.rounds, args.threads)))
        return
    for question in QUESTIONS:
        check_agreement(question)
    if args.check:
        return

    arguments = ("--one", "--rounds", args.rounds, "--threads", args.threads)
    found = medians(fresh(__file__, *arguments, count=args.processes))
    rows = [row for question in QUESTIONS for row in rows_of(question, found)]
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "many_tasks.png"
    draw(rows, picture)
    note = f"Medians of {args.processes} processes of {args.rounds} rounds; {args.threads} thread(s), conv4 with two."
    report(__file__, "How fast is a meta-gradient over many tasks?", rows, out=args.out, note=note, pictures=[picture])


if __name__ == "__main__":
    main()
