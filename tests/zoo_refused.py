"""Modules that no pure function can be made of, because they write into their own parameters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from zoo_member import Member
from zoo_modules import MLP
from zoo_networks import Table


class WritesParameter(nn.Module):
    """What no pure function can do: `how` it changes its own parameter."""

    def __init__(self, how: str = "add_") -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "add_":
            with torch.no_grad():
                self.weight.add_(1.0)
        elif self.how == "data":
            self.weight.data.add_(1.0)
        elif self.how == "rebind":
            self.weight = nn.Parameter(self.weight.detach() + 1)
        elif self.how == "in training" and self.training:
            with torch.no_grad():
                self.weight.add_(1.0)
        return x * self.weight


class Renormalized(nn.Module):
    """Keeps its rows on a sphere, as a constraint after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.div_(self.linear.weight.norm(dim=1, keepdim=True) / 2)
        return self.linear(x)


class Target(nn.Module):
    """A frozen copy that follows the online network in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = MLP(), MLP().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.online.parameters(), strict=True):
                own.lerp_(other, 0.1)
        return self.online(x) - self.target(x)


class Averages(nn.Module):
    """Updates torch's own moving average of a model in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online = MLP()
        self.average = torch.optim.swa_utils.AveragedModel(self.online)
        self.average.update_parameters(self.online)

    def forward(self, x: Tensor) -> Tensor:
        self.average.update_parameters(self.online)
        return self.online(x) - self.average(x)


class ActNorm(nn.Module):
    """Sets its parameters from the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.shift.data.copy_(-x.detach().mean(0))
            self.scale.data.copy_(1 / x.detach().std(0))
            self.ready.fill_(True)
        return (x + self.shift) * self.scale


class Clipped(nn.Module):
    """Clips through `clamp_` of ``.data`` (a critic of a Wasserstein GAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        return self.linear(x)


class Reloads(nn.Module):
    """Loads a state into itself in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        self.target.load_state_dict(self.online.state_dict())
        return self.target(x)


# Each with the parameter that the error names.
REFUSED = {
    "max_norm": (Member(functools.partial(Table, max_norm=0.5)), "table.weight"),
    "bag_max_norm": (Member(functools.partial(Table, nn.EmbeddingBag, max_norm=0.5)), "table.weight"),
    "renormalized": (Member(Renormalized), "linear.weight"),
    "target": (Member(Target), "target.0.weight"),
    "averages": (Member(Averages), "average.module.0.weight"),
    "act_norm": (Member(ActNorm), "scale"),
    "clipped": (Member(Clipped), "linear.weight"),
    "reloads": (Member(Reloads), "target.0.weight"),
}
