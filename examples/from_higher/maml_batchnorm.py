"""MAML with a BatchNorm network, few-shot classification: a program written for the library `higher`.

    python examples/from_higher/maml_batchnorm.py

It says `import higher` and nothing else about the library. docs/from-higher.md has the line with which the same file
runs on `statelessify`; tests/test_from_higher.py runs it on both and compares the numbers.

A task has a few classes. Each is a point in a hidden space that all tasks share; what is seen of it are noisy points,
mixed by a map that no task is told. Support and query are batches of their own in BatchNorm (training mode throughout,
as usual in MAML), and each task has running statistics of its own, which the network never sees.
"""

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, SEEN, NOISE = 4, 16, 0.3


def make_net(ways: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(SEEN, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, ways),
    )  # fmt: skip


def sample_task(ways: int, shots: int, mixing: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Support x and y, query x and y: `shots` points of each class in either."""
    classes = torch.randn(ways, 1, HIDDEN, generator=generator)
    points = classes + NOISE * torch.randn(ways, 2 * shots, HIDDEN, generator=generator)
    x, y = torch.tanh(points @ mixing), torch.arange(ways).repeat_interleave(shots)
    return x[:, :shots].flatten(0, 1), y, x[:, shots:].flatten(0, 1), y


def meta_step(net: nn.Module, inner: torch.optim.Optimizer, tasks: list[tuple[Tensor, ...]], steps: int) -> float:
    """Adds up in each `.grad` of the network the meta-gradient over these tasks; returns their mean query loss."""
    total = 0.0
    for x, y, query_x, query_y in tasks:
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(steps):
                diffopt.step(F.cross_entropy(fnet(x), y))
            loss = F.cross_entropy(fnet(query_x), query_y) / len(tasks)
            loss.backward()
            total += loss.item()
    return total


def evaluate(
    net: nn.Module, inner: torch.optim.Optimizer, tasks: list[tuple[Tensor, ...]], steps: int
) -> list[tuple[float, float]]:
    """Mean query loss and accuracy after 0, 1, ... inner steps; in test mode, where memory does not grow with steps."""
    rows = torch.zeros(steps + 1, 2)
    for x, y, query_x, query_y in tasks:
        with higher.innerloop_ctx(net, inner, track_higher_grads=False) as (fnet, diffopt):
            for step in range(steps + 1):
                with torch.no_grad():
                    logits = fnet(query_x)
                    rows[step, 0] += F.cross_entropy(logits, query_y) / len(tasks)
                    rows[step, 1] += (logits.argmax(1) == query_y).to(rows.dtype).mean() / len(tasks)
                if step < steps:
                    diffopt.step(F.cross_entropy(fnet(x), y))
    return [(loss, accuracy) for loss, accuracy in rows.tolist()]


def main(
    meta_steps: int = 150,
    tasks: int = 8,
    test_tasks: int = 100,
    steps: int = 3,
    ways: int = 5,
    shots: int = 5,
    seed: int = 0,
) -> dict[str, list[tuple[float, float]]]:
    """Prints the table of losses and accuracies before and after meta-training, and returns it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HIDDEN, SEEN, generator=generator)
    net = make_net(ways)
    inner, outer = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.Adam(net.parameters(), lr=3e-3)
    unseen = [sample_task(ways, shots, mixing, generator) for _ in range(test_tasks)]

    table = {"before": evaluate(net, inner, unseen, steps)}
    for _ in range(meta_steps):
        batch = [sample_task(ways, shots, mixing, generator) for _ in range(tasks)]
        outer.zero_grad()
        meta_step(net, inner, batch, steps)
        outer.step()
    table["after"] = evaluate(net, inner, unseen, steps)

    print(f"{ways} ways, {shots} shots, {meta_steps} meta-steps; {test_tasks} unseen tasks\n")
    print("inner steps   before meta-training        after")
    print("              loss     accuracy           loss     accuracy")
    for step, (old, new) in enumerate(zip(table["before"], table["after"], strict=True)):
        print(f"{step:11d}   {old[0]:.4f}   {old[1]:6.1%}             {new[0]:.4f}   {new[1]:6.1%}")
    print(f"\nbatches that the network's own BatchNorm has seen: {net[1].num_batches_tracked}")
    return table


if __name__ == "__main__":
    main()
