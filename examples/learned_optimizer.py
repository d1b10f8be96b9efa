"""Learn an optimizer: an LSTM that reads gradients and writes updates, itself trained by gradient descent.

    python examples/learned_optimizer.py           # a few minutes on one core
    python examples/learned_optimizer.py --fast    # half a minute

"Learning to learn by gradient descent by gradient descent" (Andrychowicz et al. 2016, arXiv:1606.04474), section 3.1.
A task is to minimize a random quadratic, ``|W x - y|^2``. Each of its variables has an LSTM of its own, which sees that
variable's gradient only; all have the same weights, trained to make the losses along the way small. Two options:

    --first-order    inner gradients are constants in the meta-gradient, else it is exact          (the paper's way)
    --preprocess     the LSTM sees log and sign, whose exact meta-gradient explodes: use both      (its appendix A)
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import trange

from statelessify import adapt_tasks, optim, stateless, tree_copy

SIZE, STEPS, UNROLL, HIDDEN = 10, 100, 20, 20  # the paper's, whose LSTM has two layers
TASKS, OUTER_LR, OUTER_NORM = 64, 0.01, 1.0  # quadratics at once, and how the LSTM is trained
TUNING_TASKS, TEST_TASKS, TEST_STEPS, TEST_SEED = 1000, 600, 200, 2**40  # training seeds are small numbers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for option in ("--fast", "--first-order", "--preprocess"):
    parser.add_argument(option, action="store_true", help="see above")
parser.add_argument("--meta-steps", type=int, help="updates of the LSTM (default: 2000, or 200 with --fast)")
parser.add_argument("--seed", type=int, default=0, help="of weights and training tasks (default: 0)")
parser.add_argument("--out", default="pictures", help="folder for the picture (default: pictures)")
args = parser.parse_args()
args.meta_steps = args.meta_steps or (200 if args.fast else 2000)
torch.set_num_threads(1)  # tensors this small are not worth sharing

# 1. The tasks: every tensor starts with a task dimension; the loss is written for one task --------------------------


def sample_tasks(tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, SIZE, SIZE, generator=generator), torch.randn(tasks, SIZE, generator=generator)


def loss(params: dict[str, Tensor], task: tuple[Tensor, Tensor]) -> Tensor:
    w, y = task
    return (w @ params["x"] - y).square().sum()


# 2. The LSTM as a pure function of its weights, and the optimizer that they make -------------------------------------


class Rule(nn.Module):
    """From gradient and state to update and state; the entries of a gradient are the LSTM's batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2 if args.preprocess else 1, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, grad: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        seen = (grad.detach() if args.first_order else grad).reshape(-1, 1)
        if args.preprocess:  # (log |g| / 10, sign g), or (-1, e^10 g) where |g| < e^-10
            size = seen.abs().clamp(min=math.exp(-10))
            seen = torch.cat([size.log() / 10, seen / size], 1)
        state = self.cell(seen, state)
        return 0.1 * self.out(state[0]).view_as(grad), state


torch.manual_seed(args.seed)
apply, weights, buffers = stateless(Rule())


def lstm_optimizer(weights: dict[str, Tensor]) -> optim.Optimizer:
    """An optimizer is two functions, written for one task; these are differentiable in the weights."""

    def init(params):
        return {name: (p.new_zeros(p.numel(), HIDDEN),) * 2 for name, p in params.items()}

    def step(params, grads, state):
        new = {name: apply(weights, buffers, grads[name], state[name])[0] for name in params}
        return {name: p + new[name][0] for name, p in params.items()}, {name: new[name][1] for name in params}

    return optim.Optimizer(init, step)


# 3. Meta-training: a run of STEPS in pieces of UNROLL, each with a meta-gradient and an update of the LSTM ------------

outer = torch.optim.Adam(weights.values(), lr=OUTER_LR)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, args.meta_steps)
generator = torch.Generator().manual_seed(args.seed)
for meta_step in (bar := trange(args.meta_steps, desc="meta-training", mininterval=0.5)):
    if meta_step % (STEPS // UNROLL) == 0:  # new quadratics, on which the optimizer begins anew
        tasks, params, state = sample_tasks(TASKS, generator), {"x": torch.zeros(TASKS, SIZE)}, None
    learned = lstm_optimizer(weights)  # `in_dims=0`: each task goes on from its own parameters and state
    adapted = adapt_tasks(loss, params, tasks, optimizer=learned, steps=UNROLL, opt_state=state, in_dims=0)
    error = adapted.losses.mean()  # of all tasks and steps
    outer.zero_grad()
    error.backward()
    nn.utils.clip_grad_norm_(weights.values(), OUTER_NORM)
    outer.step()
    schedule.step()
    params, state = tree_copy((adapted.params, adapted.opt_state), "detach")  # for the next piece
    bar.set_postfix(loss=f"{error.item():.2f}", refresh=False)

# 4. The baselines: one call tries all learning rates on all tasks, as one hyperparameter per task ---------------------


@torch.no_grad()
def run(optimizer: optim.Optimizer, tasks: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """The losses `(tasks, steps + 1)` after 0, 1, ... steps."""
    return adapt_tasks(loss, {"x": torch.zeros(SIZE)}, tasks, optimizer=optimizer, steps=steps + 1).losses


optimizers, rates = {"learned": lstm_optimizer(weights)}, torch.logspace(-2.5, 0, 21)
grid = [torch.cat([part] * len(rates)) for part in sample_tasks(TUNING_TASKS, generator)]
baselines = {"sgd": optim.sgd, "nesterov": lambda lr: optim.sgd(lr, momentum=0.9, nesterov=True), "adam": optim.adam}
for name, make in baselines.items():
    losses = run(make(lr=optim.per_task(rates.repeat_interleave(TUNING_TASKS))), grid, STEPS).view(len(rates), -1)
    rate = rates[losses.mean(1).nan_to_num(math.inf).argmin()].item()  # of the mean that the LSTM is trained on
    optimizers[f"{name}, lr {rate:.3f}"] = make(lr=rate)

# 5. The test on new quadratics, and the picture: left the mean loss, right each quadratic -----------------------------

tasks = sample_tasks(TEST_TASKS, torch.Generator().manual_seed(TEST_SEED))
losses = torch.stack([run(each, tasks, TEST_STEPS) for each in optimizers.values()])  # (optimizers, tasks, steps + 1)
mean, band = losses.mean(1), 1.96 * losses.std(1) / TEST_TASKS**0.5
print(f"\n{args.meta_steps:,} meta-steps in {bar.format_dict['elapsed']:.0f} s; {TEST_TASKS} new quadratics")
print("mean loss, 95 % interval\n\nsteps" + "".join(f"{name:>20}" for name in optimizers))
for step in (0, 10, 20, 40, 60, 80, 100, 150, 200):
    cells = (f"{value:.3f} ± {half:.3f}" for value, half in zip(mean[:, step], band[:, step], strict=True))
    print(f"{step:5d}" + "".join(f"{cell:>20}" for cell in cells))
plt.rc("axes.spines", top=False, right=False)
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(8, 5))
for name, color, value, half in zip(optimizers, ("C3", "C0", "C2", "C1"), mean, band, strict=True):
    left.fill_between(range(TEST_STEPS + 1), value - half, value + half, color=color, alpha=0.12)
    left.plot(value, color, linewidth=4 if name == "learned" else 1.5)
    left.text(TEST_STEPS + 3, value[-1], name, color=color, va="center")
left.axvline(STEPS, color="0.7", linestyle=":")
left.text(STEPS + 2, mean[0, 0], "longer than in training", color="0.4", va="center")
left.set(title=f"{TEST_TASKS} new quadratics", xlabel="steps", ylabel="mean loss, 95 % interval", yscale="log")
ours, *_, theirs = losses[:, :, STEPS]
right.loglog(theirs, ours, "C3.", alpha=0.4)
right.axline((1, 1), (2, 2), color="0.7", linestyle=":")
right.set(title=f"after {STEPS} steps: learned is ahead on {100 * (ours < theirs).float().mean():.0f} %")
right.set(xlabel=f"loss, {name}", ylabel="loss, learned", aspect="equal")
Path(args.out).mkdir(parents=True, exist_ok=True)
figure.savefig(Path(args.out) / "learned_optimizer.png", dpi=150)
print(f"\npicture: {Path(args.out) / 'learned_optimizer.png'}")
