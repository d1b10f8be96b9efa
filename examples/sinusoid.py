"""Learn to fit a sine wave from a few of its points: the regression experiment of the MAML paper.

    python examples/sinusoid.py --method maml --shots 10        # a few minutes on one core
    python examples/sinusoid.py --method meta-sgd --fast        # half a minute

A task is one wave. The inner loop takes one gradient step on a few of its points, the support; the outer loop moves
the initial weights to where that one step best predicts other points of the wave, the query. Methods:

    maml      the exact meta-gradient, through the inner step       (Finn et al. 2017, arXiv:1703.03400)
    fomaml    the inner gradient taken as a constant                (same paper, section 5.2)
    meta-sgd  an inner learning rate for each weight, learned too   (Li et al. 2017, arXiv:1707.09835)
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from statelessify import FirstOrder, Unroll, adapt_tasks, optim, over_tasks, stateless

TASKS, INNER_LR, OUTER_LR = 25, 0.01, 1e-3  # the paper's: waves in a meta-batch, inner and outer learning rate
TEST_TASKS, TEST_QUERIES, TEST_STEPS, TEST_SEED = 600, 100, 10, 2**40  # training seeds are small numbers
PUBLISHED = {"maml": "0.77 ± 0.11", "meta-sgd": "0.53 ± 0.09"}  # 10 shots, one step: Li et al. 2017, table 1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--method", choices=("maml", "fomaml", "meta-sgd"), default="maml")
parser.add_argument("--shots", type=int, default=10, help="points in a support (default: 10)")
parser.add_argument("--steps", type=int, help="meta-steps (default: 40000, or 1500 with --fast)")
parser.add_argument("--seed", type=int, default=0, help="of weights and training tasks (default: 0)")
parser.add_argument("--out", default="pictures", help="folder for the picture (default: pictures)")
parser.add_argument("--fast", action="store_true", help="a short run, to see it work")
args = parser.parse_args()
args.steps = args.steps or (1500 if args.fast else 40_000)
torch.set_num_threads(1)  # tensors this small are not worth sharing

# 1. The tasks: every tensor starts with a task dimension -----------------------------------------------------------


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def sample_tasks(tasks: int, shots: int, queries: int, generator: torch.Generator):
    """Supports and queries of random waves, each a pair x, y of shape `(tasks, points, 1)`."""
    amplitude = uniform(0.1, 5.0, (tasks, 1, 1), generator)
    phase = uniform(0.0, math.pi, (tasks, 1, 1), generator)
    x = uniform(-5.0, 5.0, (tasks, shots + queries, 1), generator)
    y = amplitude * torch.sin(x - phase)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


# 2. The network as a pure function; the loss, written for one task -------------------------------------------------

torch.manual_seed(args.seed)
net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
apply, params, buffers = stateless(net)


def predict(params, x: Tensor) -> Tensor:
    return apply(params, buffers, x)[0]


def loss(params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(predict(params, x), y)


# 3. Meta-training ---------------------------------------------------------------------------------------------------

rates = INNER_LR  # one for all; Meta-SGD has a tensor of them for each parameter, and trains it as well
if args.method == "meta-sgd":
    rates = {name: torch.full_like(p, INNER_LR, requires_grad=True) for name, p in params.items()}
inner = optim.sgd(lr=rates)
gradient = FirstOrder() if args.method == "fomaml" else Unroll()
learned = [*params.values(), *(rates.values() if args.method == "meta-sgd" else ())]
outer = torch.optim.Adam(learned, lr=OUTER_LR)
generator = torch.Generator().manual_seed(args.seed)
for step in (bar := trange(args.steps, desc=args.method, mininterval=0.5)):
    supports, queries = sample_tasks(TASKS, args.shots, args.shots, generator)
    adapted = adapt_tasks(loss, params, supports, optimizer=inner, steps=1, gradient=gradient)
    error = over_tasks(loss, in_dims=0)(adapted.params, queries).mean()
    outer.zero_grad()
    error.backward()
    outer.step()
    if step % 50 == 0:
        bar.set_postfix(error=f"{error.item():.2f}", refresh=False)

# 4. Test: every task's parameters after 0, 1, ... inner steps, and their error on new waves ------------------------


@torch.no_grad()
def trajectory(supports, steps: int) -> list[dict[str, Tensor]]:
    """Parameters `(tasks, ...)` after each step; `in_dims=0` lets each task go on from its own."""
    path = [adapt_tasks(loss, params, supports, optimizer=inner, steps=0).params]
    later = optim.sgd(lr=INNER_LR / 10) if args.method == "meta-sgd" else inner  # it learned rates for one step only
    for optimizer in [inner] + [later] * (steps - 1):
        path.append(adapt_tasks(loss, path[-1], supports, optimizer=optimizer, steps=1, in_dims=0).params)
    return path


supports, queries = sample_tasks(TEST_TASKS, args.shots, TEST_QUERIES, torch.Generator().manual_seed(TEST_SEED))
path = trajectory(supports, TEST_STEPS)
errors = torch.stack([over_tasks(loss, in_dims=0)(p, queries) for p in path]).detach()  # (steps + 1, tasks)
mean, band = errors.mean(1), 1.96 * errors.std(1) / TEST_TASKS**0.5
print(f"\n{args.method}, {args.shots} shots: {args.steps:,} meta-steps in {bar.format_dict['elapsed']:.0f} s")
print(f"{TEST_TASKS} new waves, {TEST_QUERIES} query points each\n\ninner steps   mean squared error, 95 % interval")
for step, (value, half) in enumerate(zip(mean, band, strict=True)):
    published = PUBLISHED.get(args.method) if step == 1 and args.shots == 10 else None
    print(f"{step:11d}   {value:.2f} ± {half:.2f}" + (f"   (published: {published})" if published else ""))

# 5. The picture: left one more wave and its fits, right the error --------------------------------------------------


def wave(x: Tensor) -> Tensor:
    return 3.5 * torch.sin(x - 1.0)


grid = torch.linspace(-5, 5, 300).reshape(1, -1, 1)
x = uniform(-5, 5, (1, args.shots, 1), torch.Generator().manual_seed(TEST_SEED + 1))
path = trajectory((x, wave(x)), 10)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(3, 2))
left.plot(grid.flatten(), wave(grid).flatten(), color="0.8", linewidth=7, label="true wave")
for steps, style in ((0, "k:"), (1, "C0--"), (10, "C3-")):
    fit = over_tasks(predict, in_dims=0)(path[steps], grid).detach().flatten()
    left.plot(grid.flatten(), fit, style, linewidth=2, label=f"after {steps} step{'s' * (steps != 1)}")
left.plot(x.flatten(), wave(x).flatten(), "k^", markersize=8, label=f"the {args.shots} points it sees")
left.set(title="A new wave", xlabel="x", ylabel="y")
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, frameon=False, columnspacing=1.2)
right.fill_between(range(len(mean)), mean - band, mean + band, alpha=0.25, linewidth=0)
right.plot(mean, "o-")
right.set(title=f"{TEST_TASKS} new waves", xlabel="inner steps", xticks=range(len(mean)), ylim=(0, None))
right.set(ylabel="mean squared error, 95 % interval")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.suptitle(f"{args.method}, {args.shots} shots, {args.steps:,} meta-steps")
file = Path(args.out) / f"sinusoid-{args.method}.png"
file.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(file, dpi=150)
print(f"\npicture: {file}")
