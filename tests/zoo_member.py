"""What a member of the zoo is: a module, the inputs that it takes, and what torch itself can do with it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Member(NamedTuple):
    """One module of the zoo: how to make it (the same each time), what it is called with, and what torch cannot do.

    `blocked` says why torch.vmap cannot run it, `once` why it has no second derivative; None where torch can. `random`
    marks what draws from the global generator, `lazy` what has no shapes before its first call. `compiles` chooses the
    members whose compiled calls are tested: compilation is slow, so these are the plain ones.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 3)
    kwargs: Mapping[str, Any] = types.MappingProxyType({})
    blocked: str | None = None
    once: str | None = None
    random: bool = False
    lazy: bool = False
    compiles: bool = False

    def make(self, training: bool = True) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return self.build().train(training)

    def inputs(self, *batch: int) -> Tensor:
        return torch.randn(*batch, *self.shape)

    @property
    def split(self) -> dict[str, Any]:
        """What `stateless` needs to know about the module beside itself."""
        return {"example_args": (torch.ones(self.shape),)} if self.lazy else {}
