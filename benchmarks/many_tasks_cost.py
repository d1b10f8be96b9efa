"""How does the cost of a meta-gradient grow with the tasks and with the inner steps? The sine MLP of `many_tasks.py`.

At most linearly: then the time for one task and one step falls with their number, and no step costs more than the
second one by much.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _report import Row, parser, report
from many_tasks import LR, Question, check_agreement, in_rounds, milliseconds, sine, with_adapt_tasks
from tqdm import tqdm

from statelessify import adapt_tasks, optim

TASKS = [1, 4, 16, 64, 256]
STEPS = [1, 2, 5, 10, 20, 50, 100]
TARGET = 1.3


def of_each_step(tasks: int, steps: int, rounds: int) -> list[float]:
    """The median time of each inner step, in ms, the gradient's graph still growing."""
    problem, columns = sine(tasks), [[] for _ in range(steps)]
    for _ in tqdm(range(rounds), desc="inner steps"):
        params, extra, in_dims = problem.params, {}, (None, 0)
        for column in columns:
            options: Any = {"optimizer": optim.sgd(lr=LR), "steps": 1, "in_dims": in_dims, **extra}
            adapted: list[Any] = []
            run = partial(adapt_tasks, problem.loss, params, problem.support, **options)
            column.append(milliseconds(lambda run=run, adapted=adapted: adapted.append(run())))
            params, extra, in_dims = adapted[0].params, {"opt_state": adapted[0].opt_state}, (0, 0)
    return [statistics.median(column) for column in columns]


def growth(words: str, found: dict[str, float]) -> list[Row]:
    """The time for each against that of the number before: at most 1 where growth is at most linear."""
    each = {name: ms / int(name) for name, ms in found.items()}
    cells = {name: {"ms": f"{found[name]:.2f}", "ms for each": f"{each[name]:.3f}"} for name in found}
    return [
        Row(f"{words}, {after}: time for each / for each of {before}", each[after] / each[before], cells=cells[after])
        for before, after in pairwise(found)
    ]


def check() -> None:
    """Many steps at once are as many of one step each, in float64."""
    problem = sine(3, torch.float64)
    options: Any = {"optimizer": optim.sgd(lr=LR)}
    at_once = adapt_tasks(problem.loss, problem.params, problem.support, steps=3, **options)
    last = adapt_tasks(problem.loss, problem.params, problem.support, steps=1, **options)
    for _ in range(2):
        more: Any = {"in_dims": (0, 0), "opt_state": last.opt_state}
        last = adapt_tasks(problem.loss, last.params, problem.support, steps=1, **options, **more)
    for name, param in at_once.params.items():
        torch.testing.assert_close(last.params[name], param, rtol=1e-10, atol=1e-10)
    for count in (1, 4):
        check_agreement(Question("sine MLP", sine, count, {}, {}))


def draw(by_tasks: dict[str, float], by_steps: dict[str, float], each: list[float], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for ax, words, found in ((axes[0], "tasks (5 steps)", by_tasks), (axes[1], "steps (25 tasks)", by_steps)):
        numbers, times = [int(name) for name in found], list(found.values())
        ax.loglog(numbers, times, "o-", label="adapt_tasks")
        ax.loglog(numbers, [times[-1] * n / numbers[-1] for n in numbers], "--", color="gray", label="linear")
        ax.set(xlabel=words, ylabel="ms for one meta-gradient")
        ax.grid(True, which="both", alpha=0.2)
        ax.legend()
    axes[2].plot(range(1, len(each) + 1), each, label="adapt_tasks")
    axes[2].axhline(TARGET * statistics.median(each[1:11]), color="gray", linestyle="--", label="target")
    axes[2].set(xlabel="inner step (25 tasks)", ylabel="ms of the step", ylim=(0, None))
    axes[2].legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    args = parser(__doc__, rounds=9).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    check()
    if args.check:
        return

    by_tasks = in_rounds({str(n): partial(with_adapt_tasks, sine(n), 5) for n in TASKS}, args.rounds, "tasks")
    problem = sine(25)
    by_steps = in_rounds({str(n): partial(with_adapt_tasks, problem, n) for n in STEPS}, args.rounds, "steps")
    each = of_each_step(25, 100, args.rounds)
    late = statistics.median(each[90:]) / statistics.median(each[1:11])
    linear = {
        words: found[last] / found[first] / (int(last) / int(first))
        for words, found in (("tasks", by_tasks), ("steps", by_steps))
        for first, last in [(next(iter(found)), list(found)[-1])]
    }
    rows = [
        Row("time for each of 256 tasks / of 1 task", linear["tasks"], most=1),
        *growth("tasks (5 steps)", by_tasks),
        Row("time for each of 100 steps / of 1 step", linear["steps"], most=1),
        *growth("steps (25 tasks)", by_steps),
        Row("inner steps 91 to 100 / 2 to 11", late, most=TARGET),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "many_tasks_cost.png"
    draw(by_tasks, by_steps, each, picture)
    note = f"Below 1: less than linear growth. Medians of {args.rounds} rounds; {args.threads} thread(s)."
    report(__file__, "How does the cost grow with tasks and steps?", rows, out=args.out, note=note, pictures=[picture])


if __name__ == "__main__":
    main()
