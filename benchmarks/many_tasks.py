"""How fast is one meta-gradient over many tasks? The sine MLP (1-40-40-1), SGD, peers interleaved in one process.

Each figure is the median over rounds in which every contender runs once, so that a noisy machine is noisy for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import higher
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

from statelessify import adapt, adapt_tasks, optim, over_tasks, stateless

LR = 0.01
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
apply, params, buffers = stateless(net)
Data = tuple[Tensor, Tensor]


def loss(params: dict[str, Tensor], batch: Data) -> Tensor:
    out, _ = apply(params, buffers, batch[0])
    return F.mse_loss(out, batch[1])


def plain_loss(params: dict[str, Tensor], batch: Data) -> Tensor:
    return F.mse_loss(functional_call(net, params, (batch[0],)), batch[1])


def gradients(value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(params.values())))


def with_adapt_tasks(support: Data, query: Data, steps: int) -> list[Tensor]:
    adapted = adapt_tasks(loss, params, support, optimizer=optim.sgd(lr=LR), steps=steps)
    return gradients(over_tasks(loss, in_dims=0)(adapted.params, query).mean())


def with_adapt_in_a_loop(support: Data, query: Data, steps: int) -> list[Tensor]:
    losses = []
    for task in range(len(support[0])):
        adapted = adapt(loss, params, (support[0][task], support[1][task]), optimizer=optim.sgd(lr=LR), steps=steps)
        losses.append(loss(adapted.params, (query[0][task], query[1][task])))
    return gradients(torch.stack(losses).mean())


def with_torch_func(support: Data, query: Data, steps: int) -> list[Tensor]:
    def one(params: dict[str, Tensor], support: Data, query: Data) -> Tensor:
        for _ in range(steps):
            grads = torch.func.grad(plain_loss)(params, support)
            params = {name: params[name] - LR * grads[name] for name in params}
        return plain_loss(params, query)

    found = torch.func.grad(lambda p: vmap(one, in_dims=(None, 0, 0))(p, support, query).mean())(params)
    return [found[name] for name in params]


def with_higher(support: Data, query: Data, steps: int) -> list[Tensor]:
    losses = []
    for task in range(len(support[0])):
        with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), LR), copy_initial_weights=False) as (f, inner):
            for _ in range(steps):
                inner.step(F.mse_loss(f(support[0][task]), support[1][task]))
            losses.append(F.mse_loss(f(query[0][task]), query[1][task]))
    return gradients(torch.stack(losses).mean())


CONTENDERS = {
    "adapt_tasks": with_adapt_tasks,
    "adapt in a loop": with_adapt_in_a_loop,
    "grad(vmap(grad))": with_torch_func,
    "higher": with_higher,
}


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 5, 25, 100])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="higher")

    medians: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for tasks in args.tasks:
        support, query = torch.randn(2, tasks, 10, 1).unbind(), torch.randn(2, tasks, 10, 1).unbind()
        runs = {name: partial(call, support, query, args.steps) for name, call in CONTENDERS.items()}
        reference = runs["adapt in a loop"]()
        for name, run in runs.items():  # they must agree before they are timed
            for ours, theirs in zip(reference, run(), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6, msg=f"{name} gives another gradient")
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in tqdm(range(args.rounds), desc=f"{tasks} tasks"):
            for name, run in runs.items():
                times[name].append(milliseconds(run))
        for name in runs:
            medians[name].append(statistics.median(times[name]))

    lines = [
        f"ms for one meta-gradient, {args.steps} inner steps, {torch.get_num_threads()} threads (ratio to adapt_tasks)"
    ]
    lines += ["| tasks | " + " | ".join(CONTENDERS) + " |", "|---" * (len(CONTENDERS) + 1) + "|"]
    for index, tasks in enumerate(args.tasks):
        row = [medians[name][index] for name in CONTENDERS]
        lines.append(f"| {tasks} | " + " | ".join(f"{ms:.1f} ({ms / row[0]:.1f}x)" for ms in row) + " |")
    table = "\n".join(lines)
    print(table)
    (args.out / "many_tasks.md").write_text(table + "\n")

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in medians.items():
        axes.loglog(args.tasks, values, "o-", label=name, linewidth=3 if name == "adapt_tasks" else 1.5)
    axes.set(xlabel="tasks", ylabel="ms for one meta-gradient", title=f"Sine MLP, {args.steps} SGD steps")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(args.out / "many_tasks.png", dpi=150)
    print(f"picture: {args.out / 'many_tasks.png'}")


if __name__ == "__main__":
    main()
