"""A learned loss: a small network is what the inner loop minimizes. A program written for the library `higher`.

    python examples/from_higher/learned_loss.py

It says `import higher` and nothing else about the library. docs/from-higher.md has the line with which the same file
runs on `statelessify`; tests/test_from_higher.py runs it on both and compares the numbers.

A task is a line to fit to points of which a few are outliers. The inner loop never sees the squared error: it goes
down the loss network, a function of prediction and target, as in Bechtle et al. 2019 (arXiv:1906.05374). The outer
loop moves the weights of that network to where a few inner steps bring the regressor closest to the true line.
"""

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LossNet(nn.Module):
    """A number for each point, averaged over points; the outer loop alone makes it a loss."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        features = torch.cat([error, error**2 / (1 + error**2), target], dim=1)
        return self.layers(features).mean()


def sample_line(points: int, outliers: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, observed values with outliers, true values."""
    slope, offset = 2 * torch.randn(2, generator=generator)
    x = 2 * torch.rand(points, 1, generator=generator) - 1
    true = slope * x + offset
    observed = true.clone()
    observed[:outliers] += 8.0
    return x, observed, true


def fit(net: nn.Module, rate: float, line: tuple[Tensor, ...], loss: nn.Module, steps: int, tracked: bool) -> Tensor:
    """The squared distance from the true line after some inner steps of `loss`."""
    x, observed, true = line
    fnet = higher.monkeypatch(net, track_higher_grads=tracked)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    diffopt = higher.get_diff_optim(optimizer, net.parameters(), fmodel=fnet, track_higher_grads=tracked)
    for _ in range(steps):
        diffopt.step(loss(fnet(x), observed))
    return F.mse_loss(fnet(x), true)


def errors(
    net: nn.Module, rate: float, lines: list[tuple[Tensor, ...]], losses: dict[str, nn.Module], steps: int
) -> dict[str, float]:
    """The mean of that distance over lines, for each loss; in test mode."""
    return {
        name: sum(fit(net, rate, line, loss, steps, tracked=False).item() for line in lines) / len(lines)
        for name, loss in losses.items()
    }


def main(
    meta_steps: int = 200, tasks: int = 8, test_tasks: int = 100, steps: int = 5, rate: float = 0.3, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Prints the table of distances before and after meta-training, and returns it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, learned = nn.Linear(1, 1), LossNet()
    losses = {"squared error": nn.MSELoss(), "absolute error": nn.L1Loss(), "learned": learned}
    outer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    unseen = [sample_line(12, 3, generator) for _ in range(test_tasks)]

    table = {"before": errors(net, rate, unseen, losses, steps)}
    for _ in range(meta_steps):
        outer.zero_grad()
        for _ in range(tasks):
            (fit(net, rate, sample_line(12, 3, generator), learned, steps, tracked=True) / tasks).backward()
        outer.step()
    table["after"] = errors(net, rate, unseen, losses, steps)

    print(f"{steps} inner steps, {meta_steps} meta-steps; {test_tasks} unseen lines, 3 of 12 points outliers\n")
    print("inner loss       squared distance from the true line")
    print("                 before     after")
    for name in losses:
        print(f"{name:15s}  {table['before'][name]:7.4f}   {table['after'][name]:7.4f}")
    return table


if __name__ == "__main__":
    main()
