"""Learn to tell new handwritten characters apart from one example of each: MAML's few-shot classification.

    python examples/few_shot.py --data FOLDER     # with Omniglot's images_background_small1.zip and ..._small2.zip
    python examples/few_shot.py --fast            # on scikit-learn's digits, in half a minute

A task is N classes (ways), K labelled images of each (shots) to adapt to by gradient descent, the support, and more
images to label then, the query. Learned are the weights to start from (arXiv:1703.03400) and the inner learning rates.
"""

import argparse
import os
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import trange

from statelessify import adapt_tasks, optim, over_tasks, stateless

TASKS, INNER_LR, OUTER_LR = 8, 0.4, 3e-3
DISTORTION, COPIES = 0.1, 4  # the support's images in distorted copies: one alone gives poor batch statistics
TEST_QUERIES, TEST_STEPS, TEST_SEED = 15, 5, 2**40  # training seeds are small numbers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default=os.environ.get("OMNIGLOT"), help="Omniglot's folder (default: $OMNIGLOT)")
parser.add_argument("--out", default="pictures", help="folder for the picture (default: pictures)")
parser.add_argument("--fast", action="store_true", help="small settings, to see it work")
numbers = {"ways": 5, "shots": 1, "queries": 5, "inner-steps": 1, "meta-steps": 10_000, "channels": 32, "seed": 0}
for name, default in {**numbers, "test-tasks": 600}.items():
    parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
if parser.parse_known_args()[0].fast:
    parser.set_defaults(meta_steps=200, channels=16, test_tasks=200)
    torch.set_num_threads(1)  # such small tensors are not worth sharing
args = parser.parse_args()

# 1. Data: training and test classes `(classes, images, 28, 28)`, ink is 1 ---------------------------------


def read_omniglot(root: Path, name: str, without: tuple[str, ...] = ()) -> tuple[Tensor, list[str]]:
    """The characters of a background set, and the names of its alphabets."""
    top = root / name if (root / name).is_dir() else zipfile.Path(root / f"{name}.zip", f"{name}/")
    alphabets = sorted((path for path in top.iterdir() if path.name not in without), key=str)
    characters = [path.iterdir() for alphabet in alphabets for path in sorted(alphabet.iterdir(), key=str)]
    images = [[Image.open(file.open("rb")).convert("L") for file in sorted(row, key=str)] for row in characters]
    small = [[np.asarray(image.resize((28, 28), Image.Resampling.BOX)) for image in row] for row in images]
    return 1 - torch.tensor(np.array(small)) / 255, [path.name for path in alphabets]


if args.data:
    train, seen = read_omniglot(Path(args.data), "images_background_small1")
    test, new = read_omniglot(Path(args.data), "images_background_small2", without=tuple(seen))
else:
    digits, seen, new = load_digits(), "0125689", "347"
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.pad(F.interpolate(images, (24, 24), mode="bilinear"), (2, 2, 2, 2)).squeeze(1)
    train, test = (torch.stack([images[digits.target == int(d)][:170] for d in part]) for part in (seen, new))
train, test = (torch.cat([x.rot90(turns, (2, 3)) for turns in range(4)]) for x in (train, test))  # 4 classes each
print(f"Trains on {', '.join(seen)} ({len(train)} classes), tests on {', '.join(new)} ({len(test)} classes)")


def sample_tasks(images: Tensor, tasks: int, queries: int, generator: torch.Generator, distortion: float = 0.0):
    """Supports, in distorted copies, and queries: images `(tasks, n, 1, 28, 28)` and labels `(tasks, n)`."""
    classes = torch.rand(tasks, len(images), generator=generator).topk(args.ways).indices
    chosen = torch.rand(tasks, args.ways, images.shape[1], generator=generator).topk(args.shots + queries).indices
    x = images[classes[..., None], chosen].unsqueeze(3)
    y = torch.arange(args.ways)[:, None].expand(chosen.shape)
    batches = []
    for s, copies, strength in ((slice(args.shots), COPIES, DISTORTION), (slice(args.shots, None), 1, distortion)):
        part = x[:, :, s].repeat(1, 1, copies, 1, 1, 1).flatten(0, 2)
        maps = torch.eye(2, 3) + strength * torch.randn(len(part), 2, 3, generator=generator)
        part = F.grid_sample(part, F.affine_grid(maps, part.shape, False), align_corners=False)
        batches.append((part.view(tasks, -1, 1, 28, 28), y[:, :, s].repeat(1, 1, copies).flatten(1)))
    return batches


# 2. The network as a pure function; the loss, written for one task ----------------------------------------

torch.manual_seed(args.seed)
layers: list[nn.Module] = []
for before in (1, args.channels, args.channels, args.channels):  # the paper's net for Omniglot
    norm = nn.BatchNorm2d(args.channels, track_running_stats=False)  # the statistics of the batch at hand
    layers += [nn.Conv2d(before, args.channels, 3, stride=2, padding=1), norm, nn.ReLU()]
layers += [nn.Flatten(), nn.Linear(4 * args.channels, args.ways)]
apply, params, buffers = stateless(nn.Sequential(*layers))


def loss(params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(apply(params, buffers, x)[0], y)


# 3. Meta-training: of the initial weights, and of one inner learning rate for each parameter --------------
rates = {name: torch.tensor(INNER_LR, requires_grad=True) for name in params}
inner = optim.sgd(lr=rates)
outer = torch.optim.Adam([*params.values(), *rates.values()], lr=OUTER_LR)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, args.meta_steps)
generator = torch.Generator().manual_seed(args.seed)
mirrored = torch.cat([train, train.flip(3)])  # twice as many classes to learn from
for _ in (bar := trange(args.meta_steps, desc="meta-training", mininterval=0.5)):
    supports, queries = sample_tasks(mirrored, TASKS, args.queries, generator, DISTORTION)
    adapted = adapt_tasks(loss, params, supports, optimizer=inner, steps=args.inner_steps)
    error = over_tasks(loss, in_dims=0)(adapted.params, queries).mean()
    outer.zero_grad()
    error.backward()
    outer.step()
    schedule.step()
    bar.set_postfix(loss=f"{error.item():.2f}", refresh=False)
print(f"\n{args.ways}-way {args.shots}-shot: {args.meta_steps:,} meta-steps in {bar.format_dict['elapsed']:.0f} s")

# 4. Test on new characters: accuracy `(steps, tasks)` in percent after 0, 1, ... inner steps ------------------------
supports, (x, y) = sample_tasks(test, args.test_tasks, TEST_QUERIES, torch.Generator().manual_seed(TEST_SEED))
label = over_tasks(lambda params, x: apply(params, buffers, x)[0].argmax(-1), in_dims=0, chunk_size=20)
with torch.no_grad():
    path = [adapt_tasks(loss, params, supports, optimizer=inner, steps=0).params]
    for _ in range(TEST_STEPS):  # `in_dims=0`: each task goes on from its own parameters
        path.append(adapt_tasks(loss, path[-1], supports, optimizer=inner, steps=1, in_dims=0, chunk_size=20).params)
    labels = torch.stack([label(now, x) for now in path])  # (steps + 1, tasks, ways * TEST_QUERIES)
accuracy = 100 * (labels == y).float().mean(2)
mean, band = accuracy.mean(1), 1.96 * accuracy.std(1) / args.test_tasks**0.5

# 5. The table, and a picture: left the first test task with a row for each class, right the accuracy ---------------
rows = ((supports[0], args.shots), (x, 10))
images = torch.cat([part[0].reshape(args.ways, -1, 28, 28)[:, :count] for part, count in rows], 1)
figure = plt.figure(figsize=(13, 0.7 * args.ways + 0.8), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(5, 2))
left.suptitle("gray: the support; green: right; red: wrong, taken for the class of the letter")
for (way, n), axes in np.ndenumerate(left.subplots(args.ways, args.shots + 10, squeeze=False)):
    answer = way if n < args.shots else int(labels[-1, 0].view(args.ways, -1)[way, n - args.shots])
    color = "0.6" if n < args.shots else "tab:green" if answer == way else "tab:red"
    axes.imshow(images[way, n], cmap="gray_r")
    axes.set(xticks=[], yticks=[], ylabel="" if n else chr(65 + way))
    axes.spines[:].set(color=color, linewidth=3)
    axes.text(26, 2, "" if answer == way else chr(65 + answer), color=color, ha="right", va="top", weight="bold")
axes = right.subplots(subplot_kw={"xlim": (-0.4, TEST_STEPS + 0.4), "ylim": (0, 105)})
axes.set(title=f"{args.test_tasks} new tasks", xlabel="inner steps", ylabel="accuracy in %, 95 % interval")
axes.errorbar(range(len(mean)), mean, band, marker="o", capsize=4)
print(f"\n{args.test_tasks} new tasks\ninner steps   accuracy in %, 95 % interval")
for step, (value, half) in enumerate(zip(mean, band, strict=True)):
    print(f"{step:11d}   {value:.1f} ± {half:.1f}")
    axes.annotate(f"{value:.1f}", (step, value), (0, -16), textcoords="offset points", ha="center")
Path(args.out).mkdir(parents=True, exist_ok=True)
figure.savefig(Path(args.out) / "few_shot.png", dpi=150)
print(f"\npicture: {Path(args.out) / 'few_shot.png'}")
