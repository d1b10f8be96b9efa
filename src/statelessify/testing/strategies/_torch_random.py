"""Torch's random numbers, seeded by hypothesis before every example, as it does for `random` and numpy."""

from __future__ import annotations

import hypothesis
import torch
from torch import Tensor

__all__: list[str] = []


class TorchRandom:
    """Torch's global generator in the form of `random.Random`."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also queues a call for each device not yet used
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)
