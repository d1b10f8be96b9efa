"""How does the cost of a meta-gradient grow with the tasks and with the inner steps? The sine MLP of `many_tasks.py`.

At most linearly: then the time for one task and one step falls with their number, and no step costs more than the
second one by much.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from many_tasks import LR, medians, milliseconds, sine, with_adapt_tasks
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    by_tasks = medians({str(n): partial(with_adapt_tasks, sine(n), 5) for n in TASKS}, args.rounds, "tasks")
    problem = sine(25)
    by_steps = medians({str(n): partial(with_adapt_tasks, problem, n) for n in STEPS}, args.rounds, "steps")
    each = of_each_step(25, 100, args.rounds)
    late = statistics.median(each[90:]) / statistics.median(each[1:11])

    lines = [
        "| what grows | number | ms | ms for each | against linear growth from the number before |",
        "|---" * 5 + "|",
    ]
    for words, found in (("tasks (5 steps)", by_tasks), ("steps (25 tasks)", by_steps)):
        before: tuple[int, float] | None = None
        for name, ms in found.items():
            number = int(name)
            ratio = "" if before is None else f"{ms / before[1] / (number / before[0]):.2f}"
            lines.append(f"| {words} | {name} | {ms:.2f} | {ms / number:.3f} | {ratio} |")
            before = number, ms
    verdict = "reached" if late <= TARGET else "missed"
    lines += ["", f"Inner steps 91 to 100 against 2 to 11: {late:.2f} times (target {TARGET}: {verdict})"]
    table = "\n".join(lines)
    print(table)
    (args.out / "many_tasks_cost.md").write_text(table + "\n")

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, words, found in ((axes[0], "tasks (5 steps)", by_tasks), (axes[1], "steps (25 tasks)", by_steps)):
        numbers = [int(name) for name in found]
        ax.loglog(numbers, list(found.values()), "o-", label="adapt_tasks")
        last = list(found.values())[-1]
        ax.loglog(numbers, [last * n / numbers[-1] for n in numbers], "--", color="gray", label="linear")
        ax.set(xlabel=words, ylabel="ms for one meta-gradient")
        ax.grid(True, which="both", alpha=0.2)
        ax.legend()
    figure.savefig(args.out / "many_tasks_cost.png", dpi=150)
    print(f"picture: {args.out / 'many_tasks_cost.png'}")


if __name__ == "__main__":
    main()
