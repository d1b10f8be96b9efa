"""How does a meta-gradient compare with JAX's? The sine MLP (1-40-40-1), 5 SGD steps, 10 points, float32 on the CPU.

- JAX unrolled, scan: one jitted function of the gradient of the mean over `vmap`ped tasks, whose inner loop is a Python
  loop or a `lax.scan`. Compilation is not part of the time; it is a column of its own.
- statelessify: `adapt_tasks` as anyone writes it, eager; and with a loss that is `compiled`.

JAX and torch live in a process each, because their threads would disturb each other. The processes take turns in blocks
of rounds, and while one measures, the other waits for its pipe. Both are kept on as many cores as `--threads` says;
with one it is CPU time that counts. A figure is the median over blocks, a ratio that of those within a block. Before it
both have given the same meta-gradients from the same arrays, in float64, to 1e-10 of the largest number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _report import Row, parser, report
from tqdm import tqdm

LR, STEPS, POINTS, SIZES = 0.01, 5, 10, (1, 40, 40, 1)
TASKS = {1: 40, 25: 20, 256: 5}
"""Numbers of tasks, and the rounds of a block."""
Arrays = dict[str, Any]
Run = Callable[[], list[Any]]
"""One meta-gradient, all of it there when the call returns."""


def arrays_of(tasks: int) -> Arrays:
    """Weights as `nn.Linear` has them, and the tasks' data."""
    draw, arrays = np.random.default_rng(tasks), {}
    for layer, (inputs, outputs) in enumerate(pairwise(SIZES)):
        arrays[f"w{layer}"] = draw.uniform(-1, 1, (outputs, inputs)) / inputs**0.5
        arrays[f"b{layer}"] = draw.uniform(-1, 1, outputs) / inputs**0.5
    data = {name: draw.normal(size=(tasks, POINTS, 1)) for name in ("x", "y", "query_x", "query_y")}
    return arrays | data


# What runs in the two processes ------------------------------------------------------------------------------------


def with_jax(arrays: Arrays, double: bool, threads: int) -> dict[str, Run]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", double)
    arrays = {name: jax.numpy.asarray(array, "float64" if double else "float32") for name, array in arrays.items()}
    weights = {name: array for name, array in arrays.items() if name[0] in "wb"}
    data = [(arrays["x"], arrays["y"]), (arrays["query_x"], arrays["query_y"])]

    def loss(weights: Any, batch: Any) -> Any:
        out = batch[0]
        for layer in range(len(SIZES) - 1):
            out = jax.nn.relu(out) if layer else out
            out = out @ weights[f"w{layer}"].T + weights[f"b{layer}"]
        return ((out - batch[1]) ** 2).mean()

    def step(weights: Any, support: Any) -> Any:
        return jax.tree.map(lambda w, g: w - LR * g, weights, jax.grad(loss)(weights, support))

    def unrolled(weights: Any, support: Any, query: Any) -> Any:
        for _ in range(STEPS):
            weights = step(weights, support)
        return loss(weights, query)

    def scanned(weights: Any, support: Any, query: Any) -> Any:
        return loss(jax.lax.scan(lambda w, _: (step(w, support), None), weights, length=STEPS)[0], query)

    def run(one: Callable[..., Any]) -> Run:
        mean = lambda weights, support, query: jax.vmap(one, (None, 0, 0))(weights, support, query).mean()  # noqa: E731
        compiled = jax.jit(jax.grad(mean))
        return lambda: [*jax.block_until_ready(compiled(weights, *data)).values()]

    return {"JAX unrolled": run(unrolled), "JAX scan": run(scanned)}


def with_torch(arrays: Arrays, double: bool, threads: int) -> dict[str, Run]:
    import torch
    import torch.nn.functional as F

    from statelessify import adapt_tasks, compiled, optim, over_tasks, stateless

    torch.set_num_threads(threads)
    tensors = {name: torch.tensor(a, dtype=torch.double if double else torch.float) for name, a in arrays.items()}
    layers = [torch.nn.Linear(*sizes) for sizes in pairwise(SIZES)]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]).to(tensors["x"].dtype)
    with torch.no_grad():
        for param, value in zip(net.parameters(), tensors.values(), strict=False):  # the weights are first
            param.copy_(value)
    apply, params, buffers = stateless(net)
    support, query = (tensors["x"], tensors["y"]), (tensors["query_x"], tensors["query_y"])

    def loss(params: Any, batch: Any) -> torch.Tensor:
        return F.mse_loss(apply(params, buffers, batch[0])[0], batch[1])

    def run(loss: Any) -> list[torch.Tensor]:
        adapted = adapt_tasks(loss, params, support, optimizer=optim.sgd(lr=LR), steps=STEPS)
        value = over_tasks(loss, in_dims=0)(adapted.params, query).mean()
        return list(torch.autograd.grad(value, list(params.values())))

    return {"adapt_tasks": partial(run, loss), "compiled": partial(run, compiled(loss))}


WORKERS = {"jax": with_jax, "torch": with_torch}


def work(args: argparse.Namespace) -> None:
    """Answer requests, a line of JSON each: runs made ready, their gradients, or the ms of each of some rounds."""
    runs: dict[int, dict[str, Run]] = {}
    clock = time.process_time if args.threads == 1 else time.perf_counter  # the former knows nothing of a busy machine
    for line in sys.stdin:
        request = json.loads(line)
        tasks = request["tasks"]
        if "to" in request:
            runs[tasks], answer = WORKERS[args.worker](arrays_of(tasks), request["double"], args.threads), {}
            for name, run in runs[tasks].items():
                start = time.perf_counter()
                gradients = run()
                answer[name] = time.perf_counter() - start
                np.savez(f"{request['to']}/{name}.npz", *(np.asarray(gradient) for gradient in gradients))
        else:
            answer = {name: [] for name in runs[tasks]}
            for _ in range(request["rounds"]):
                for name, run in runs[tasks].items():
                    start = clock()
                    run()
                    answer[name].append(1e3 * (clock() - start))
        print(json.dumps(answer), flush=True)


class Worker:
    """A process with one of the libraries in it."""

    def __init__(self, library: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", library, "--threads", str(threads)]
        cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else []
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None  # JAX has no number of threads to set
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, preexec_fn=pin)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("a worker has ended; what it says stands above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


# Check, measurement, table, picture --------------------------------------------------------------------------------


def ready(workers: list[Worker], tasks: int, double: bool, tolerance: float) -> dict[str, float]:
    """Make the runs, see that all give the same gradients, and return the seconds of each one's first call."""
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, float] = {}
        for worker in workers:
            seconds |= worker.ask(tasks=tasks, double=double, to=folder)
        found = {name: list(np.load(Path(folder) / f"{name}.npz").values()) for name in seconds}
    # torch's parameters alternate weight and bias, JAX's dict is sorted by name: both in the order of shapes
    found = {name: sorted(gradients, key=lambda g: (g.ndim, g.shape, g.size)) for name, gradients in found.items()}
    expected = found["adapt_tasks"]
    scale = max(np.abs(gradient).max() for gradient in expected)
    for name, gradients in found.items():
        error = max(np.abs(g - e).max() for g, e in zip(gradients, expected, strict=True)) / scale
        if not error <= tolerance:
            raise AssertionError(f"{tasks} tasks: {name} is off by {error:.1e} of the largest")
    return seconds


def measure(workers: list[Worker], tasks: int, blocks: int) -> list[dict[str, float]]:
    """Medians of ms, by contender, of each block."""
    found = []
    for _ in tqdm(range(blocks), desc=f"{tasks} tasks"):
        times: dict[str, list[float]] = {}
        for worker in workers:
            times |= worker.ask(tasks=tasks, rounds=TASKS[tasks])
        found.append({name: statistics.median(own) for name, own in times.items()})
    return found


def rows_of(tasks: int, found: list[dict[str, float]], first: dict[str, float]) -> list[Row]:
    cells = {f"{name}, ms": f"{statistics.median(block[name] for block in found):.2f}" for name in found[0]}
    rows = []
    for peer in (name for name in first if name.startswith("JAX")):
        for ours in (name for name in first if not name.startswith("JAX")):
            ratio = statistics.median(block[peer] / block[ours] for block in found)
            headline = (
                f"sine MLP, {tasks} tasks: {peer} / {ours}, time"
                if (tasks, peer, ours) == (25, "JAX scan", "compiled")
                else ""
            )
            compiles = {"compiles, s": f"{first[peer]:.1f}"}
            rows.append(Row(f"{tasks} tasks: {peer} / {ours}", ratio, cells=cells | compiles, headline=headline))
    return rows


def draw(found: dict[int, list[dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in found[max(found)][0]:
        medians = {n: statistics.median(b[name] for b in blocks) for n, blocks in found.items() if name in blocks[0]}
        axes.loglog([*medians], [*medians.values()], "o-", label=name, linewidth=3 if name == "adapt_tasks" else 1.5)
    axes.set(xlabel="tasks", ylabel="ms for one meta-gradient", title=f"Sine MLP, {STEPS} SGD steps")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=15, help="(default: 15)")
    options.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        work(args)
        return
    workers = [Worker(library, args.threads) for library in WORKERS]
    try:
        ready(workers, 3, double=True, tolerance=1e-10)
    finally:
        for worker in workers:
            worker.close()
    if args.check:
        return

    args.out.mkdir(parents=True, exist_ok=True)
    workers = [Worker(library, args.threads) for library in WORKERS]  # without what was compiled for the check
    found, rows = {}, []
    try:
        for tasks in TASKS:
            first = ready(workers, tasks, double=False, tolerance=1e-3)
            found[tasks] = measure(workers, tasks, args.blocks)
            rows += rows_of(tasks, found[tasks], first)
    finally:
        for worker in workers:
            worker.close()
    picture = args.out / "jax_peer.png"
    draw(found, picture)
    note = f"Ratios below 1: JAX is faster. Medians of {args.blocks} blocks; {args.threads} thread(s)."
    report(__file__, "How does it compare with JAX?", rows, out=args.out, note=note, pictures=[picture])


if __name__ == "__main__":
    main()
