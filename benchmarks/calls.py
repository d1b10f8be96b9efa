"""What does a call of `apply` cost, beside a call of the module itself? Peers are interleaved in the same process.

- module: ``module(x)``, which is 1 in each row.
- statelessify, own: with the module's own parameters. Fast: with weights that are results, as in an inner loop.
- functional_call: torch's. higher: the patched module. tensordict: ``with tensors.to_module(module): module(x)``.
  All three with fast weights.

MLP: 1-40-40-1, 10 points. class: the same as a class with a forward of its own. deep: 50 linear layers of width 8.
encoder: 4 layers of `nn.TransformerEncoder`, width 32, without dropout. conv4: MAML's Omniglot network with 32 channels
and batch norm in training, 5 images; its buffers are the caller's, which statelessify alone leaves untouched.

Before anything is timed, all outputs have been those of the module in float64, to 1e-10. Times are CPU times of one
thread, with gradients recorded, without garbage collection. Each ratio is the median over rounds in which every
contender runs once, in random order, of the ratio within the round: a noisy machine is noisy for all.
"""

from __future__ import annotations

import copy
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import higher
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _report import Row, parser, report
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from statelessify import stateless

OURS = ["statelessify, own", "statelessify, fast"]
CONTENDERS = ["module", *OURS, "functional_call", "higher", "tensordict"]
TARGET = 1.1
"""The most that a call of ours may take of the module's time."""
HEADLINES = {"MLP": "a call of a 3-layer MLP with fast weights: `apply` / `module(x)`"}


class Model(NamedTuple):
    """What is called: `at_once` calls make one figure."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    at_once: int


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(1, 40), nn.Linear(40, 40), nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def deep() -> nn.Module:
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(50)])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def conv4() -> nn.Module:
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        for channels in (1, 32, 32, 32)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 5))


MODELS = {
    "MLP": Model(mlp, (10, 1), 20),
    "class": Model(Net, (10, 1), 20),
    "deep": Model(deep, (10, 8), 4),
    "encoder, training": Model(encoder, (4, 10, 32), 3),
    "encoder, evaluation": Model(lambda: encoder().eval(), (4, 10, 32), 3),
    "conv4": Model(conv4, (5, 1, 28, 28), 1),
}


def contenders(model: Model, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """One call by each contender, on a module of its own where a call writes into buffers."""
    torch.manual_seed(0)
    module, x = model.make().to(dtype), torch.randn(model.shape, dtype=dtype)
    apply, params, buffers = stateless(module)
    fast = {name: p * 1.0 for name, p in params.items()}
    plain, called, filled = (copy.deepcopy(module) for _ in range(3))
    tensors = {**fast, **dict(called.named_buffers())}
    fmodel, patched = higher.monkeypatch(module), list(fast.values())
    nested = TensorDict(dict(fast)).unflatten_keys(".")

    def with_tensordict() -> Tensor:
        with nested.to_module(filled):
            return filled(x)

    return {
        "module": lambda: plain(x),
        OURS[0]: lambda: apply(params, buffers, x)[0],
        OURS[1]: lambda: apply(fast, buffers, x)[0],
        "functional_call": lambda: functional_call(called, tensors, (x,)),
        "higher": lambda: fmodel(x, params=patched),
        "tensordict": with_tensordict,
    }


def check(name: str, model: Model) -> None:
    """All contenders give what the module gives, call after call."""
    runs = contenders(model, torch.float64)
    expected = runs["module"]().detach()
    for contender, run in [*runs.items()] * 2:
        error = float((run().detach() - expected).abs().max())
        if not error <= 1e-10:
            raise AssertionError(f"{name}: {contender} is off by {error:.1e}")


class Times(NamedTuple):
    """Medians by contender: microseconds of a call, and how often the module's own time within a round."""

    us: dict[str, float]
    ratios: dict[str, float]


def measure(name: str, rounds: int, bar: Any) -> Times:
    model = MODELS[name]
    runs = contenders(model, torch.float32)
    for run in [*runs.values()] * 3:
        run()
    times: dict[str, list[float]] = {contender: [] for contender in runs}
    order = list(runs)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        random.shuffle(order)
        for contender in order:
            start = time.thread_time()
            for _ in range(model.at_once):
                runs[contender]()
            times[contender].append(1e6 * (time.thread_time() - start) / model.at_once)
        bar.update()
    gc.enable()
    plain = times["module"]
    ratios = {c: statistics.median(t / p for t, p in zip(own, plain, strict=True)) for c, own in times.items()}
    return Times({c: statistics.median(own) for c, own in times.items()}, ratios)


def rows_of(name: str, found: Times) -> list[Row]:
    plain = {"module, us": f"{found.us['module']:.1f}"}
    peers = {
        contender: f"{found.ratios[contender]:.2f}" for contender in CONTENDERS if contender not in ("module", *OURS)
    }
    own, fast = (found.ratios[contender] for contender in OURS)
    return [
        Row(f"{name}, its own parameters: apply / module", own, most=TARGET, cells=plain),
        Row(
            f"{name}, fast weights: apply / module",
            fast,
            most=TARGET,
            cells=plain | peers,
            headline=HEADLINES.get(name, ""),
        ),
    ]


def draw(found: dict[str, Times], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    width = 0.8 / (len(CONTENDERS) - 1)
    for index, contender in enumerate(CONTENDERS[1:]):
        heights = [place + width * (index - (len(CONTENDERS) - 2) / 2) for place in range(len(found))]
        ratios = [times.ratios[contender] for times in found.values()]
        bars = axes.barh(heights, ratios, 0.9 * width, color=f"C{index}", label=contender)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=1, label="module(x)")
    axes.axvline(TARGET, color="black", linewidth=1, linestyle="--", label="target")
    axes.set(xlabel="CPU time of a call as a multiple of module(x)", title="What a call costs")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    options = parser(__doc__, rounds=500)
    options.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    args = options.parse_args()
    warnings.filterwarnings("ignore", module="higher")
    torch.set_num_threads(args.threads)
    random.seed(0)
    for name in args.models:
        check(name, MODELS[name])
    if args.check:
        return

    found: dict[str, Times] = {}
    with tqdm(total=args.rounds * len(args.models)) as bar:
        for name in args.models:
            bar.set_description(name)
            found[name] = measure(name, args.rounds, bar)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "calls.png"
    draw(found, picture)
    report(
        __file__,
        "What does a call of `apply` cost?",
        [row for name, times in found.items() for row in rows_of(name, times)],
        out=args.out,
        note=f"CPU times as a multiple of `module(x)`, medians of {args.rounds} rounds, {args.threads} thread(s).",
        pictures=[picture],
    )


if __name__ == "__main__":
    main()
