"""How much memory does an inner loop take, and what does it cost to take less? A meta-gradient of one task, SGD.

- GPT: 4 pre-norm blocks, 128 channels, 4 heads, 64 tokens, 7 sequences. Attention is an explicit softmax, which can be
  differentiated twice. MLP: 64-256-256-10 on 256 points.
- Contenders: higher; the exact modes of `adapt`; `FirstOrder()`, whose meta-gradient is another, for comparison.

Memory is the peak of what the process holds (VmHWM) above what it held before, each contender in a fresh process after
a loop of one step. The C library does not find a use for every hole that freed tensors leave; the peak of what tensors
themselves take, which torch's profiler counts, is therefore given besides. Time is CPU time, contenders in one process
that take turns, ratios within a round. Before that all have given the meta-gradient of a loop written by hand, in
float64 on small versions, to 1e-10 of the largest number.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import higher
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _report import Row, fresh, parser, report
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from statelessify import FirstOrder, Unroll, adapt, optim, stateless

LR, TOKENS, SYMBOLS = 0.05, 64, 65


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / key.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(channels), Attention(channels, heads))
        wide = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), *wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, blocks: int, channels: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, channels), nn.Embedding(tokens, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, SYMBOLS))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.symbols(x) + self.places.weight[: x.shape[1]]))
        return logits.transpose(1, 2)  # classes where cross-entropy wants them


class Problem(NamedTuple):
    net: nn.Module
    x: Tensor
    y: Tensor

    def gradients(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, list(self.net.parameters())))


def gpt(small: bool) -> Problem:
    blocks, channels, heads, tokens, sequences = (2, 8, 2, 6, 2) if small else (4, 128, 4, TOKENS, 7)
    text = torch.randint(SYMBOLS, (sequences, tokens + 1))
    return Problem(GPT(blocks, channels, heads, tokens), text[:, :-1], text[:, 1:])


def mlp(small: bool) -> Problem:
    sizes, points = ((6, 8, 8, 10), 5) if small else ((64, 256, 256, 10), 256)
    first, second, third = (nn.Linear(*pair) for pair in pairwise(sizes))
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
    return Problem(net, torch.randn(points, sizes[0]), torch.randint(sizes[-1], (points,)))


class Setting(NamedTuple):
    """A problem, the numbers of inner steps (targets are for the last one), and a mode's targets against higher."""

    make: Callable[[bool], Problem]
    lengths: tuple[int, ...]
    rounds: int
    every: int | str
    less_memory: float
    more_time: float | None


SETTINGS = {
    "GPT": Setting(gpt, (5, 10, 20), 5, 1, 7, 1.4),
    "MLP": Setting(mlp, (20, 50, 100), 5, "auto", 5, None),
}
Run = Callable[[int], list[Tensor]]
"""A meta-gradient after as many steps."""


def by_hand(problem: Problem) -> Run:
    def run(steps: int) -> list[Tensor]:
        params = dict(problem.net.named_parameters())
        for _ in range(steps):
            value = F.cross_entropy(functional_call(problem.net, params, (problem.x,)), problem.y)
            grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
            params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return problem.gradients(F.cross_entropy(functional_call(problem.net, params, (problem.x,)), problem.y))

    return run


def with_higher(problem: Problem) -> Run:
    net = problem.net

    def run(steps: int) -> list[Tensor]:
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), LR), copy_initial_weights=False) as (f, inner):
            for _ in range(steps):
                inner.step(F.cross_entropy(f(problem.x), problem.y))
            return problem.gradients(F.cross_entropy(f(problem.x), problem.y))

    return run


def with_adapt(gradient: Any) -> Callable[[Problem], Run]:
    def make(problem: Problem) -> Run:
        apply, params, buffers = stateless(problem.net)
        batch = problem.x, problem.y

        def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(apply(params, buffers, batch[0])[0], batch[1])

        def run(steps: int) -> list[Tensor]:
            adapted = adapt(loss, params, batch, optimizer=optim.sgd(lr=LR), steps=steps, gradient=gradient)
            return problem.gradients(loss(adapted.params, batch))

        return run

    return make


EXACT: dict[str, Callable[[Problem], Run]] = {"higher": with_higher, "Unroll()": with_adapt(Unroll())}
CHECKPOINTED: list[str] = []
for every in (1, 5, "auto"):
    CHECKPOINTED.append(f"checkpoint_every={every!r}")
    EXACT[CHECKPOINTED[-1]] = with_adapt(Unroll(checkpoint_every=every))
CONTENDERS = EXACT | {"FirstOrder()": with_adapt(FirstOrder())}


def check() -> None:
    for name, setting in SETTINGS.items():
        torch.manual_seed(0)
        problem = setting.make(True)
        problem = Problem(problem.net.double(), problem.x.double() if name == "MLP" else problem.x, problem.y)
        for steps in (1, 7):
            expected = by_hand(problem)(steps)
            scale = max(float(gradient.abs().max()) for gradient in expected)
            for contender, make in EXACT.items():
                found = make(problem)(steps)
                error = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / scale
                if not error <= 1e-10:
                    raise AssertionError(f"{name}, {steps} steps: {contender} is off by {error:.1e} of the largest")


# Memory: one process for each contender ----------------------------------------------------------------------------

PROCESS = Path("/proc/self")


def mebibytes(field: str) -> float:
    (line,) = [line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def trim() -> None:
    """Give memory that nobody uses back to the system, as far as the C library can."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


TENSORS = "tensors"


def taken(run: Run, steps: int) -> float:
    """MiB that tensors take at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(steps)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / 2**20


def peaks(setting: Setting, contender: str) -> dict[str, float]:
    """MiB above those at the beginning, by number of steps; also what tensors took of the last number."""
    torch.manual_seed(0)
    run = CONTENDERS[contender](setting.make(False))
    run(1)
    trim()
    start, found = mebibytes("VmRSS"), {}
    for steps in setting.lengths:
        trim()
        (PROCESS / "clear_refs").write_text("5")  # the peak is counted from here
        run(steps)
        found[str(steps)] = mebibytes("VmHWM") - start
    return found | {TENSORS: taken(run, setting.lengths[-1])}


# Time: contenders take turns in one process ------------------------------------------------------------------------


def seconds(setting: Setting, rounds: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    problem = setting.make(False)
    runs = {contender: make(problem) for contender, make in CONTENDERS.items()}
    for run in runs.values():
        run(1)
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for contender in order:
            gc.collect()
            start = time.process_time()
            runs[contender](setting.lengths[-1])
            times[contender].append(time.process_time() - start)
    return times


# Table and picture -------------------------------------------------------------------------------------------------

Peaks = dict[str, dict[str, float]]


def rows_of(name: str, memory: Peaks, times: dict[str, list[float]]) -> list[Row]:
    setting, rows = SETTINGS[name], []
    steps = setting.lengths[-1]
    for contender in list(CONTENDERS)[1:]:
        slower = statistics.median(o / h for o, h in zip(times[contender], times["higher"], strict=True))
        less, tensors = (memory["higher"][key] / memory[contender][key] for key in (str(steps), TENSORS))
        both = {c: f"{memory[c][str(steps)]:.0f} MiB, {statistics.median(times[c]):.2f} s" for c in memory}
        cells = {"ours": both[contender], "higher": both["higher"]}
        what = f"{name}, {steps} steps, `{contender}`"
        aim = contender == f"checkpoint_every={setting.every!r}"
        least, most = (setting.less_memory, setting.more_time) if aim else (None, None)
        kind = f"`Unroll({contender})`, {name}, {steps} steps" if most else ""
        headline = f"memory of higher / of {kind}" if kind else ""
        rows.append(Row(f"{what}: memory of higher / ours", less, least=least, cells=cells, headline=headline))
        sizes = {c: f"{memory[c][TENSORS]:.0f} MiB" for c in memory}
        cells_of_tensors = {"ours": sizes[contender], "higher": sizes["higher"]}
        rows.append(Row(f"{what}: tensors of higher / ours", tensors, least=least, cells=cells_of_tensors))
        headline = f"time of {kind} / of higher" if kind else ""
        rows.append(Row(f"{what}: our time / higher's", slower, most=most, cells=cells, headline=headline))
    return rows


def draw(memory: dict[str, Peaks], path: Path) -> None:
    figure, panels = plt.subplots(1, len(memory), figsize=(11, 4), layout="constrained")
    for axes, (name, found) in zip(panels, memory.items(), strict=True):
        for contender, by_steps in found.items():
            style = "k--" if contender == "higher" else "o-"
            lengths = SETTINGS[name].lengths
            axes.loglog(lengths, [by_steps[str(steps)] for steps in lengths], style, label=contender)
        axes.set_xticks(lengths, lengths)
        axes.minorticks_off()
        axes.set(xlabel="inner steps", ylabel="MiB above the start, at the peak", title=name)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(True, which="both", alpha=0.2)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="of timing (default: 3 for the GPT, 5 for the MLP)")
    options.add_argument("--peaks", nargs=2, metavar=("PROBLEM", "CONTENDER"), help="only this one's memory, as JSON")
    args = options.parse_args()
    warnings.filterwarnings("ignore", module="higher")
    torch.set_num_threads(args.threads)
    if args.peaks:
        print(json.dumps(peaks(SETTINGS[args.peaks[0]], args.peaks[1])))
        return
    check()
    if args.check:
        return

    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    rows, memory = [], {}
    for name, setting in SETTINGS.items():
        memory[name] = {}
        for contender in tqdm(CONTENDERS, desc=f"{name}, memory"):
            (memory[name][contender],) = fresh(__file__, "--threads", args.threads, "--peaks", name, contender)
        rows += rows_of(name, memory[name], seconds(setting, args.rounds or setting.rounds))
    picture = args.out / "memory.png"
    draw(memory, picture)
    note = f"Peak of memory above the start; CPU time, {args.threads} thread."
    report(__file__, "How much memory does an inner loop take?", rows, out=args.out, note=note, pictures=[picture])


if __name__ == "__main__":
    main()
