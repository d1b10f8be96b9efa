"""The state of torch's random number generators."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__: list[str] = []


def random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def drawn_since(state: list[Tensor]) -> bool:
    """Whether random numbers were drawn since that state."""
    return not all(map(torch.equal, state, random_state()))


def set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def drawn_from(state: list[Tensor]) -> Generator[None]:
    """Random numbers as from that state on; afterwards the state is what it was."""
    now = random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(now)
