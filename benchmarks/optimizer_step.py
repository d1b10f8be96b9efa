"""How fast is one out-of-place, differentiable optimizer step? 100 tensors, peers interleaved in one process.

Timed is one step from a warm state (one step was taken before), which must stay as it was; and that step with the
gradient of the sum of all new parameters with respect to the old ones and the gradients, which all require one:

- statelessify: `step(params, grads, state)`.
- TorchOpt: `update` and `apply_updates`, both with `inplace=False`; not its fused Adam, whose backward is slower.
- higher: `_update`, not the loss's gradient, which its `step` takes as well. Filling its groups with the parameters and
  a shallow copy of the state is part of the time. It has no AdamW.
- torch.optim: `step` with `differentiable=True`. It works in place, so that it is given clones of the parameters and of
  the state, which are part of the time; making the optimizer is not.

Each figure is the median over rounds in which every contender runs once, so that a noisy machine is noisy for all.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import higher
import matplotlib.pyplot as plt
import torch
import torchopt
from _report import Row, parser, report
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor
from tqdm import tqdm

from statelessify import optim

TENSORS = 100
RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {  # every contender gets these numbers
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.99}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0, "eps": 1e-6}),
    "adamax": (torch.optim.Adamax, {"lr": 0.1, "eps": 1e-8}),
}
SIZES = (8, 64)
PASSES = ("forward", "forward + backward")
TARGETS = {(8, PASSES[0]): 6.0, (8, PASSES[1]): 2.5, (64, PASSES[0]): 2.5, (64, PASSES[1]): 1.5}  # against TorchOpt
Tree = dict[str, Tensor]
Step = Callable[[], list[Tensor]]


class Problem(NamedTuple):
    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    params: Tree
    grads: Tree
    warm: Tree  # the gradients of the step before

    def inputs(self) -> list[Tensor]:
        return [*self.params.values(), *self.grads.values()]

    def made_by(self, library: Any) -> Any:
        return getattr(library, self.kind.__name__.lower())(**self.options)


def with_statelessify(problem: Problem) -> Step:
    optimizer = problem.made_by(optim)
    with torch.no_grad():
        _, state = optimizer.step(problem.params, problem.warm, optimizer.init(problem.params))
    return lambda: list(optimizer.step(problem.params, problem.grads, state)[0].values())


def with_torchopt(problem: Problem) -> Step:
    optimizer, params = problem.made_by(torchopt), problem.params
    with torch.no_grad():
        _, state = optimizer.update(problem.warm, optimizer.init(params), params=params, inplace=False)

    def step() -> list[Tensor]:
        updates, _ = optimizer.update(problem.grads, state, params=params, inplace=False)
        return list(torchopt.apply_updates(params, updates, inplace=False).values())

    return step


def with_higher(problem: Problem) -> Step | None:
    if problem.kind is torch.optim.AdamW:
        return None
    leaves = list(problem.params.values())
    optimizer = higher.optim.get_diff_optim(problem.kind(leaves, **problem.options), leaves)

    def update(grads: Tree) -> list[Tensor]:
        optimizer.param_groups[0]["params"] = list(leaves)
        optimizer._update([list(grads.values())])
        return optimizer.param_groups[0]["params"]

    with torch.no_grad():
        update(problem.warm)
    (warm,) = (
        optimizer.state
    )  # its updates are out of place but for Adagrad's step count, which matters to a decay only

    def step() -> list[Tensor]:
        optimizer.state = [{index: dict(own) for index, own in warm.items()}]
        return update(problem.grads)

    return step


def with_torch_optim(problem: Problem) -> Step:
    leaves = list(problem.params.values())
    optimizer = problem.kind(leaves, differentiable=True, **problem.options)

    def update(grads: Tree, state: Iterable[dict[str, Tensor]]) -> list[Tensor]:
        clones = [leaf.clone() for leaf in leaves]
        for clone, grad in zip(clones, grads.values(), strict=True):
            clone.grad = grad
        optimizer.param_groups[0]["params"] = clones
        copies = ({name: tensor.clone() for name, tensor in own.items()} for own in state)
        optimizer.state = defaultdict(dict, zip(clones, copies, strict=True))
        optimizer.step()
        return clones

    with torch.no_grad():
        clones = update(problem.warm, [optimizer.state[leaf] for leaf in leaves])
    warm = [optimizer.state[clone] for clone in clones]
    return lambda: update(problem.grads, warm)


CONTENDERS: dict[str, Callable[[Problem], Step | None]] = {
    "statelessify": with_statelessify,
    "TorchOpt": with_torchopt,
    "higher": with_higher,
    "torch.optim": with_torch_optim,
}
PEERS = list(CONTENDERS)[1:]
Medians = dict[tuple[int, str, str, str], float]
"""``(size, pass, rule, contender) -> ms``; a contender without the rule has no entry."""


def problem_of(rule: str, size: int) -> Problem:
    """Gradients stay away from zero, where it would matter that `eps` does not mean the same to all contenders."""
    shape = (TENSORS, size, size)

    def tree(tensors: Tensor, requires_grad: bool = True) -> Tree:
        return {f"w{index}": tensor.clone().requires_grad_(requires_grad) for index, tensor in enumerate(tensors)}

    grads, warm = (torch.empty(shape).uniform_(0.5, 1.5) * torch.randn(shape).sign() for _ in range(2))
    return Problem(*RULES[rule], tree(0.1 * torch.randn(shape)), tree(grads), tree(warm, requires_grad=False))


def made_for(problem: Problem) -> dict[str, Step]:
    made = {name: make(problem) for name, make in CONTENDERS.items()}
    return {name: step for name, step in made.items() if step}


def backward(new: list[Tensor], problem: Problem) -> tuple[Tensor, ...]:
    total = torch.stack(new).sum()  # the cheapest sum of all, so that least is added to every contender
    return torch.autograd.grad(total, problem.inputs())


def check(steps: dict[str, Step], problem: Problem) -> None:
    """Contenders must agree before they are timed; twice, because a step must leave its state as it was."""
    old, expected = torch.stack(list(problem.params.values())), None
    for name, step in [*steps.items()] * 2:
        new = step()
        gradients = backward(new, problem)
        found = {
            "update": torch.stack(new) - old,
            "gradient for the parameters": torch.stack(gradients[:TENSORS]),
            "gradient for the gradients": torch.stack(gradients[TENSORS:]),
        }
        expected = expected or found
        for what, ours in expected.items():
            error = (found[what] - ours).abs().max() / ours.abs().max()
            if not error <= 1e-4:
                raise AssertionError(
                    f"{name}, {problem.kind.__name__}: its {what} is off by {error:.1e} of the largest"
                )


def milliseconds(step: Step, problem: Problem) -> tuple[float, float]:
    """Of the step, and of the step with its backward; without garbage collection, as in `timeit`."""
    gc.disable()
    start = time.perf_counter()
    new = step()
    middle = time.perf_counter()
    backward(new, problem)
    end = time.perf_counter()
    gc.enable()
    return 1e3 * (middle - start), 1e3 * (end - start)


def measure(rounds: int) -> Medians:
    medians: Medians = {}
    with tqdm(total=rounds * len(SIZES) * len(RULES)) as bar:
        for size, rule in product(SIZES, RULES):
            bar.set_description(f"{rule}, {size}x{size}")
            problem = problem_of(rule, size)
            steps = made_for(problem)
            check(steps, problem)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    times[name].append(milliseconds(step, problem))
                bar.update()
            for name in steps:
                for what, column in zip(PASSES, zip(*times[name], strict=True), strict=True):
                    medians[size, what, rule, name] = statistics.median(column)
    return medians


def rows_of(medians: Medians) -> list[Row]:
    rows = []
    for size, what, rule in product(SIZES, PASSES, RULES):
        ours = medians[size, what, rule, "statelessify"]
        found = {peer: medians.get((size, what, rule, peer)) for peer in PEERS}
        cells = {"ours, ms": f"{ours:.2f}"}
        cells |= {f"{peer} / ours": f"{ms / ours:.1f}" for peer, ms in found.items() if ms and peer != "TorchOpt"}
        name = f"{rule}, {size}x{size}, {what}: TorchOpt / ours"
        headline = f"one differentiable Adam step, {TENSORS} small tensors: TorchOpt / ours"
        row = Row(name, medians[size, what, rule, "TorchOpt"] / ours, TARGETS[size, what], cells=cells)
        rows.append(row._replace(headline=headline) if (size, what, rule) == (8, PASSES[0], "adam") else row)
    return rows


def draw(medians: Medians, path: Path) -> None:
    figure, grid = plt.subplots(
        len(SIZES), len(PASSES), figsize=(12, 7), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (size, what) in zip(grid.flat, product(SIZES, PASSES), strict=True):
        for index, peer in enumerate(PEERS):
            for place, rule in enumerate(RULES):
                if (size, what, rule, peer) in medians:
                    ratio = medians[size, what, rule, peer] / medians[size, what, rule, "statelessify"]
                    x = place + 0.27 * (index - 1)
                    axes.bar(x, ratio - 1, 0.25, bottom=1, color=f"C{index}", label=None if place else peer)
                    axes.annotate(
                        f"{ratio:.2g}", (x, max(ratio, 1)), (0, 2), textcoords="offset points", ha="center", size=7
                    )
        target = TARGETS[size, what]
        axes.axhline(1, color="black", linewidth=1)
        axes.axhline(target, color="black", linestyle="--", linewidth=1, label="target against TorchOpt")
        axes.set_yscale("log")
        axes.set_title(f"{size}x{size}, {what} (target {target:g}x)")
        axes.set_xticks(range(len(RULES)), [rule.replace(" ", "\n") for rule in RULES])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}x")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(
        f"One differentiable step over {TENSORS} tensors: time as a multiple of ours (above 1x, statelessify is faster)"
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    args = parser(__doc__, rounds=25).parse_args()
    warnings.filterwarnings("ignore", module="higher")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    if args.check:
        for rule in RULES:
            problem = problem_of(rule, SIZES[0])
            check(made_for(problem), problem)
        return

    medians = measure(args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(medians, args.out / "optimizer_step.png")
    report(
        __file__,
        "How fast is one differentiable optimizer step?",
        rows_of(medians),
        out=args.out,
        note=f"{TENSORS} tensors; ratios of medians of {args.rounds} rounds, {args.threads} thread.",
        pictures=[args.out / "optimizer_step.png"],
    )


if __name__ == "__main__":
    main()
