"""What does `statelessify.compat.higher` cost? Beside plain modules and real higher, interleaved in one process.

- call: `fmodel(x)` beside `module(x)`, with gradients recorded, in training mode. MLP: 1-40-40-1, 10 points. conv4:
  MAML's Omniglot network with 32 channels, 5 images.
- steps: `innerloop_ctx` with `copy_initial_weights=False`, and 5 steps of the optimizer on the MLP, on the graph.
  "plain" is the same SGD by hand, on lists of weights and `F.linear`. With backward: that of the loss after them too.
- test mode: the steps with `track_higher_grads=False`.
- monkeypatch: making the patched module, and no more.
- the second table: what is alive after as many steps of one inner loop in test mode. Tensors are those that Python
  sees; nodes are those of the autograd graph behind them, with all that they keep.

Before anything is timed, real higher has given the same numbers in float64, to 1e-10 of the largest. Times are CPU
times, without garbage collection, which higher needs more often. Each figure is the median over rounds in which every
contender runs once, in random order, and each ratio the median of those within the rounds, so that a noisy machine is
noisy for all.
"""

from __future__ import annotations

import copy
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import higher
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _report import Row, parser, report
from torch import Tensor, nn
from tqdm import tqdm

from statelessify.compat import higher as compat

STEPS = 5
LIBRARIES = {"statelessify": compat, "higher": higher}
CONTENDERS = ["plain", *LIBRARIES]
Run = Callable[[], list[Tensor]]
"""One run of a contender, and the tensors in which contenders have to agree."""


class Problem(NamedTuple):
    net: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, module: Callable[..., Tensor]) -> Tensor:
        return F.mse_loss(module(self.x), self.y)


def mlp() -> Problem:
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    x = torch.linspace(-5, 5, 10).view(10, 1).clone()
    return Problem(net, x, x.sin())


def conv4() -> Problem:
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        for channels in (1, 32, 32, 32)
    ]
    return Problem(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 5)), torch.rand(5, 1, 28, 28), torch.eye(5))


def calls(problem: Problem) -> dict[str, Run]:
    def call(module: nn.Module) -> Run:
        return lambda: [module(problem.x)]

    patched = {name: library.monkeypatch(problem.net) for name, library in LIBRARIES.items()}
    return {name: call(module) for name, module in {"plain": copy.deepcopy(problem.net), **patched}.items()}


def steps(kind: type[torch.optim.Optimizer], mode: str, **options: Any) -> Callable[[Problem], dict[str, Run]]:
    def make(problem: Problem) -> dict[str, Run]:
        net = problem.net
        weights, opt = list(net.parameters()), kind(net.parameters(), **options)
        test_mode = mode == "test mode"
        where = {"copy_initial_weights": test_mode, "track_higher_grads": not test_mode}

        def finish(module: Callable[..., Tensor], new: list[Tensor]) -> list[Tensor]:
            if mode != "with backward":
                return new
            for weight in weights:
                weight.grad = None
            problem.loss(module).backward()
            return [*new, *(weight.grad for weight in weights if weight.grad is not None)]

        def with_library(library: Any) -> Run:
            def run() -> list[Tensor]:
                with library.innerloop_ctx(net, opt, **where) as (fmodel, diffopt):
                    for _ in range(STEPS):
                        diffopt.step(problem.loss(fmodel))
                    return finish(fmodel, list(fmodel.parameters()))

            return run

        def by_hand() -> list[Tensor]:
            new = [weight.detach().requires_grad_() if test_mode else weight.clone() for weight in weights]

            def call(x: Tensor) -> Tensor:
                hidden = F.relu(F.linear(F.relu(F.linear(x, *new[:2])), *new[2:4]))
                return F.linear(hidden, *new[4:])

            for _ in range(STEPS):
                grads = torch.autograd.grad(problem.loss(call), new, create_graph=not test_mode)
                moved = [torch.sub(w, grad, alpha=options["lr"]) for w, grad in zip(new, grads, strict=True)]
                new = [w.detach().requires_grad_() for w in moved] if test_mode else moved
            return finish(call, new)

        plain: dict[str, Run] = {"plain": by_hand} if kind is torch.optim.SGD else {}
        return plain | {name: with_library(library) for name, library in LIBRARIES.items()}

    return make


def patches(problem: Problem) -> dict[str, Run]:
    def patch(library: Any) -> Run:
        return lambda: list(library.monkeypatch(problem.net, copy_initial_weights=False).parameters())

    return {name: patch(library) for name, library in LIBRARIES.items()}


class Measure(NamedTuple):
    """What is timed: `at_once` runs for one figure; `most` of plain's time, or `least` of what higher takes to ours."""

    problem: Callable[[], Problem]
    make: Callable[[Problem], dict[str, Run]]
    at_once: int
    most: float | None = None
    least: float | None = None

    def runs(self, dtype: torch.dtype) -> dict[str, Run]:
        """The contenders in one dtype, all of them with the same numbers."""
        torch.manual_seed(0)
        problem = self.problem()
        return self.make(Problem(problem.net.to(dtype), problem.x.to(dtype), problem.y.to(dtype)))


# Adam: where higher adds `eps` (before the bias correction) it must not matter.
SGD, ADAM = (torch.optim.SGD, {"lr": 0.01}), (torch.optim.Adam, {"lr": 0.01, "eps": 1e-20})
MEASURES = {
    "call, MLP": Measure(mlp, calls, 20, most=1.15),
    "call, conv4": Measure(conv4, calls, 1, most=1.05),
    f"{STEPS} steps, SGD": Measure(mlp, steps(SGD[0], "alone", **SGD[1]), 1, least=1.6),
    f"{STEPS} steps, SGD, with backward": Measure(mlp, steps(SGD[0], "with backward", **SGD[1]), 1, least=1.6),
    f"{STEPS} steps, Adam, with backward": Measure(mlp, steps(ADAM[0], "with backward", **ADAM[1]), 1),
    f"{STEPS} steps, SGD, test mode": Measure(mlp, steps(SGD[0], "test mode", **SGD[1]), 1),
    f"{STEPS} steps, Adam, test mode": Measure(mlp, steps(ADAM[0], "test mode", **ADAM[1]), 1),
    "monkeypatch, MLP": Measure(mlp, patches, 5),
    "monkeypatch, conv4": Measure(conv4, patches, 5),
}


def check(name: str, runs: dict[str, Run]) -> None:
    """Contenders must agree before they are timed; twice, because a run must leave nothing behind that changes it."""
    expected = [tensor.detach().clone() for tensor in runs["higher"]()]
    for contender, run in [*runs.items()] * 2:
        for ours, theirs in zip(run(), expected, strict=True):
            error = float((ours.detach() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))
            if not error <= 1e-10:
                raise AssertionError(f"{name}: {contender} is off by {error:.1e} of the largest")


class Times(NamedTuple):
    """Medians of ms, and of how often as long as ours a contender takes within a round; both by contender."""

    ms: dict[str, float]
    to_ours: dict[str, float]


def measure(name: str, rounds: int, bar: Any) -> Times:
    chosen = MEASURES[name]
    runs = chosen.runs(torch.float32)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    order = list(runs)
    gc.collect()
    gc.freeze()
    gc.disable()
    for _ in range(rounds):
        random.shuffle(order)
        for contender in order:
            start = time.process_time()
            for _ in range(chosen.at_once):
                runs[contender]()
            times[contender].append(1e3 * (time.process_time() - start) / chosen.at_once)
        gc.collect()  # higher makes a class for each module, which no reference count frees
        bar.update()
    gc.enable()
    gc.unfreeze()
    ours = times["statelessify"]
    ratios = {c: [t / o for t, o in zip(own, ours, strict=True)] for c, own in times.items()}
    return Times(
        {c: statistics.median(own) for c, own in times.items()}, {c: statistics.median(r) for c, r in ratios.items()}
    )


# Memory in test mode -----------------------------------------------------------------------------------------------

UPDATES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": SGD,
    "SGD, momentum, weight decay": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}),
    "Adam": ADAM,
}
Alive = dict[tuple[str, str, int], tuple[int, int]]
"""``(optimizer, library, steps) -> (tensors, nodes)``."""


def alive_after(library: Any, optimizer: str, steps: int) -> tuple[int, int]:
    gc.collect()
    gc.freeze()  # what is there already is not looked at below
    problem, (kind, options) = mlp(), UPDATES[optimizer]
    opt = kind(problem.net.parameters(), **options)
    with library.innerloop_ctx(problem.net, opt, track_higher_grads=False) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(problem.loss(fmodel))
        gc.collect()
        own = {id(tensor) for tensor in (*problem.net.parameters(), problem.x, problem.y)}
        tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and id(item) not in own]
    stack, nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None], set[Any]()
    while stack:
        node = stack.pop()
        if node not in nodes:
            nodes.add(node)
            stack.extend(child for child, _ in node.next_functions if child is not None)
    gc.unfreeze()
    return len(tensors), len(nodes)


# Tables and picture ------------------------------------------------------------------------------------------------


def rows_of(found: dict[str, Times], alive: Alive, lengths: list[int]) -> list[Row]:
    rows = []
    for name, (ms, to_ours) in found.items():
        chosen, cells = MEASURES[name], {f"{c}, ms": f"{ms[c]:.3f}" for c in CONTENDERS if c in ms}
        if "plain" in to_ours:
            rows.append(Row(f"{name}: statelessify / plain", 1 / to_ours["plain"], most=chosen.most, cells=cells))
        rows.append(Row(f"{name}: higher / statelessify", to_ours["higher"], least=chosen.least, cells=cells))
    for optimizer in UPDATES:
        first, last = (sum(alive[optimizer, "statelessify", steps]) for steps in (lengths[0], lengths[-1]))
        what = f"test mode, {optimizer}: alive after {lengths[-1]} steps / after {lengths[0]}"
        rows.append(Row(what, last / first, most=1))
    return rows


def table_of_memory(alive: Alive, lengths: list[int]) -> str:
    lines = [
        "Tensors + nodes of the graph that are alive after as many steps in test mode:",
        "",
        "| optimizer | library | " + " | ".join(map(str, lengths)) + " | |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    for optimizer, library in product(UPDATES, LIBRARIES):
        row = [alive[optimizer, library, steps] for steps in lengths]
        grows = "grows" if len(set(row)) > 1 else "constant"
        lines.append(f"| {optimizer} | {library} | " + " | ".join(f"{t} + {n}" for t, n in row) + f" | {grows} |")
    return "\n".join(lines)


def draw(found: dict[str, Times], alive: Alive, lengths: list[int], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    for index, (contender, side) in enumerate({"plain": "most", "higher": "least"}.items()):
        for place, (name, (_, to_ours)) in enumerate(found.items()):
            if contender not in to_ours:
                continue
            height, ratio, goal = place + 0.4 * index - 0.2, to_ours[contender], getattr(MEASURES[name], side)
            goal = 1 / goal if goal and side == "most" else goal
            left.barh(height, ratio - 1, 0.36, left=1, color=f"C{index}", label=None if place else contender)
            if goal:
                left.plot([goal] * 2, [height - 0.18, height + 0.18], color="black", linewidth=2.5)
            text = max(ratio, goal or 1, 1), height
            left.annotate(f"{ratio:.2f}", text, (4, 0), textcoords="offset points", va="center", size=8)
    left.plot([], [], color="black", linewidth=2.5, label="target: at least")
    left.axvline(1, color="black", linewidth=1)
    left.set(xlabel="time as a multiple of statelessify's", title="Time (right of 1: slower than statelessify)")
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.margins(x=0.08)
    left.legend(loc="center right")
    for index, optimizer in enumerate(UPDATES):
        for library, style in zip(LIBRARIES, ("o-", "s--"), strict=True):
            total = [sum(alive[optimizer, library, steps]) for steps in lengths]
            right.loglog(lengths, total, style, color=f"C{index}", label=f"{library}, {optimizer}")
    right.set(xlabel="steps", ylabel="tensors and nodes", title="Alive in test mode")
    right.grid(True, which="both", alpha=0.2)
    right.legend(fontsize=8, loc="center left")
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__, rounds=200)
    options.add_argument("--lengths", type=int, nargs="+", default=[10, 100, 1000], help="steps in test mode")
    args = options.parse_args()
    rounds, lengths = args.rounds, args.lengths
    warnings.filterwarnings("ignore", module="higher")
    warnings.simplefilter("ignore", compat.DifferenceWarning)
    torch.set_num_threads(args.threads)
    random.seed(0)
    for name, chosen in MEASURES.items():
        check(name, chosen.runs(torch.float64))
    if args.check:
        return

    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Times] = {}
    with tqdm(total=rounds * len(MEASURES)) as bar:
        for name in MEASURES:
            bar.set_description(name)
            found[name] = measure(name, rounds, bar)
    alive: Alive = {}
    for optimizer, library, steps in tqdm(list(product(UPDATES, LIBRARIES, lengths)), desc="memory"):
        alive[optimizer, library, steps] = alive_after(LIBRARIES[library], optimizer, steps)

    draw(found, alive, lengths, args.out / "higher_compat.png")
    report(
        __file__,
        "What does the layer for higher cost?",
        rows_of(found, alive, lengths),
        out=args.out,
        note=f"Ratios of CPU time within a round, medians of {rounds} rounds; {args.threads} thread.",
        details=table_of_memory(alive, lengths),
        pictures=[args.out / "higher_compat.png"],
    )


if __name__ == "__main__":
    main()
