"""Differentiate a minimum instead of the steps that led to it: two uses of the implicit function theorem.

    python examples/implicit.py            # less than a minute on one core
    python examples/implicit.py --fast     # a few seconds

Regularization: one L2 strength for each feature of a linear model, learned on validation data. The inner loop trains
the model to its minimum; how that moves with the strengths needs neither the steps nor their memory (arXiv:1911.02590).

Implicit MAML (arXiv:1909.04630): a task is a sine wave, and its weights are tied to the initial ones `w0`, for the loss
adds ``0.5 * LAM * |w - w0|^2``. As the loss reads `w0` there, the implicit gradient reaches it.
"""

import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from tqdm import trange

from statelessify import Implicit, adapt, adapt_tasks, implicit, optim, over_tasks, stateless

GRID = torch.logspace(-3, 1, 17)  # common strengths
LAM, TASKS, SHOTS, TEST_TASKS = 1.0, 10, 10, 100  # of iMAML

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {"outer-steps": 80, "meta-steps": 120, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
parser.add_argument("--out", default="pictures", help="folder for the picture (default: pictures)")
parser.add_argument("--fast", action="store_true", help="small settings, to see it work")
if parser.parse_known_args()[0].fast:
    parser.set_defaults(outer_steps=20, meta_steps=20)
args = parser.parse_args()
torch.set_num_threads(1)  # tensors this small are not worth sharing
torch.manual_seed(args.seed)

# 1. Data: the progress of diabetes from 10 measured features, and from the same 10 of some other patient: pure noise --
data = load_diabetes()
x, y = ((t - t.mean(0)) / t.std(0) for t in (torch.tensor(each).float() for each in (data.data, data.target)))
x, size = torch.cat([x, x[torch.randperm(len(x))]], 1), 2 * x.shape[1]
train, validation, test = ((x[part], y[part]) for part in torch.randperm(len(x)).split([70, 170, 202]))


def error(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(batch[0] @ w, batch[1])


def regularized(w: Tensor, batch) -> Tensor:
    strengths, examples = batch
    return error(w, examples) / 2 + (strengths * w**2).sum() / 2


def fitted(log_strengths: Tensor, start: Tensor) -> Tensor:
    """The weights at the minimum, as a function of the strengths; rates and number of steps do not change it."""
    strengths = log_strengths.exp()
    inner = optim.sgd(lr={"*": 1 / (5 + strengths.detach())}, momentum=0.8)  # a stiffer weight takes smaller steps
    return adapt(regularized, start, (strengths, train), optimizer=inner, steps=100, gradient=Implicit()).params


# 2. The strengths go down the gradient of the validation error ------------------------------------------------------
common = [fitted(strength.log().repeat(size), torch.zeros(size)) for strength in GRID]
best = min(range(len(GRID)), key=lambda index: error(common[index], validation))
log_strengths = GRID[best].log().repeat(size).requires_grad_()  # begins with the best common one
outer, curves, w = torch.optim.Adam([log_strengths], lr=0.1), [], common[best]
for _ in (bar := trange(args.outer_steps + 1, desc="strengths", mininterval=0.5)):
    w = fitted(log_strengths, w.detach())  # the next minimum is near the last one
    value = error(w, validation)
    curves.append((value.item(), error(w, test).item()))
    learned = log_strengths.detach().exp()
    outer.zero_grad()
    value.backward()
    outer.step()
    bar.set_postfix(validation=f"{value.item():.3f}", refresh=False)
print(f"\nmean squared error{'':13}validation   test")
for name, (at_validation, at_test) in ((f"best common strength {GRID[best]:.2g}", curves[0]), ("learned", curves[-1])):
    print(f"{name:30} {at_validation:.3f}        {at_test:.3f}")
halves = learned.log().split(size // 2)
print(f"learned strengths, geometric means: {halves[0].mean().exp():.2g} measured, {halves[1].mean().exp():.2g} noise")

# 3. Implicit MAML: the loss of one task, and its minimum for many ---------------------------------------------------
net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
apply, initial, buffers = stateless(net)
generator = torch.Generator().manual_seed(args.seed)


def sample_waves(tasks: int):
    """Supports and queries of random waves, each a pair x, y of shape `(tasks, SHOTS, 1)`."""
    amplitude, phase = torch.rand(2, tasks, 1, 1, generator=generator)
    x = 6 * torch.rand(tasks, 2 * SHOTS, 1, generator=generator) - 3
    y = (0.5 + 1.5 * amplitude) * torch.sin(x + torch.pi * phase)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def fit(params, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(apply(params, buffers, batch[0])[0], batch[1])


def tied(params, batch) -> Tensor:
    away = sum(((params[name] - w0) ** 2).sum() for name, w0 in initial.items())  # closed over, and reached
    return fit(params, batch) + 0.5 * LAM * away


def adapted(supports):
    five = partial(implicit.cg, maxiter=5, tol=None)  # products with the Hessian, however near they come: iMAML's
    inner = optim.sgd(lr=0.05, momentum=0.5)
    return adapt_tasks(tied, initial, supports, optimizer=inner, steps=25, gradient=Implicit(five)).params


# 4. Meta-training ---------------------------------------------------------------------------------------------------
outer, meta_curve, new = torch.optim.Adam(initial.values(), lr=5e-3), {}, sample_waves(TEST_TASKS)
grid, fits = torch.linspace(-3, 3, 200)[:, None], {}
for step in (bar := trange(args.meta_steps + 1, desc="iMAML", mininterval=0.5)):
    if step % max(args.meta_steps // 10, 1) == 0:
        with torch.no_grad():  # on new waves, and a curve through one of them
            now = adapted(new[0])
            meta_curve[step] = over_tasks(fit, in_dims=0)(now, new[1]).mean().item()
            fits[step] = apply({name: value[0] for name, value in now.items()}, buffers, grid)[0]
    supports, queries = sample_waves(TASKS)
    value = over_tasks(fit, in_dims=0)(adapted(supports), queries).mean()
    outer.zero_grad()
    value.backward()
    outer.step()
    bar.set_postfix(error=f"{value.item():.3f}", refresh=False)
print(f"\n{TEST_TASKS} new waves, {SHOTS} points each\nmeta-steps   mean squared error")
print("\n".join(f"{step:10d}   {value:.3f}" for step, value in meta_curve.items()))

# 5. The picture -----------------------------------------------------------------------------------------------------
figure, ((top, bars), (low, wave)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
for values, name, color in zip(zip(*curves, strict=True), ("validation", "test"), ("C0", "C3"), strict=True):
    top.plot(values, color, label=f"{name}, {size} strengths")
    top.axhline(values[0], color=color, linestyle=":", label=f"{name}, best common strength")
top.set(title="Diabetes: learning the strengths", xlabel="outer steps", ylabel="mean squared error")
names = [*data.feature_names, *(f"{name} of another" for name in data.feature_names)]
bars.barh(names, learned, color=["C0"] * (size // 2) + ["0.6"] * (size // 2))
bars.axvline(GRID[best].item(), color="k", linestyle=":", label="best common")
bars.set(title="Learned strengths", xscale="log", xlabel="strength", ylim=(size - 0.5, -0.5))
low.plot(*zip(*meta_curve.items(), strict=True), "o-", label=f"{TEST_TASKS} new waves")
low.set(title="Implicit MAML", xlabel="meta-steps", ylabel="mean squared error", ylim=(0, None))
for step, style in zip((0, max(fits)), ("C0--", "C3-"), strict=True):
    wave.plot(grid, fits[step], style, label=f"adapted, after {step} meta-steps")
wave.plot(*(part[0].flatten() for part in new[0]), "k^", label=f"the {SHOTS} points it sees")
wave.set(title="A new wave", xlabel="x", ylabel="y")
for axes in figure.axes:
    axes.legend(framealpha=1, edgecolor="none")
Path(args.out).mkdir(parents=True, exist_ok=True)
figure.savefig(Path(args.out) / "implicit.png", dpi=120)
print(f"\npicture: {Path(args.out) / 'implicit.png'}")
