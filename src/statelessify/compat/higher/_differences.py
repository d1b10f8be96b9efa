"""Where the layer differs from higher on purpose: each place is said once, when a program comes to it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

__all__ = ["DifferenceWarning"]


class DifferenceWarning(UserWarning):
    """A number or a behaviour that differs from higher's, because higher's is wrong.

    Each place warns once in a process. ``warnings.simplefilter("ignore", higher.DifferenceWarning)`` silences them,
    ``"error"`` turns them into errors. `docs/from-higher.md` lists them with their reasons.
    """


DIFFERENCES = {
    "maximize": "`maximize=True` is heeded; higher ignores it and goes down",
    "eps": "Adam adds `eps` after the bias correction, as torch.optim does; higher 0.2.1 adds it before",
    "betas": "the gradient of learned `betas` goes through the bias correction too; higher cuts it there",
    "asgd": "ASGD's learned `lr`, `lambd` and `alpha` have their whole gradient; higher cuts part of it",
    "momentum": "a `momentum` that is a tensor takes part also where it is 0; higher leaves it out, without a gradient",
    "hooks": "hooks of the module (legacy weight_norm, pruning) run on the patched module too; higher drops them",
    "buffers": "`make_functional` copies the buffers; higher leaves them empty",
    "frozen": "frozen parameters stay frozen without tracking; higher makes them require a gradient",
    "untracked": "switching `track_higher_grads` off keeps the latest weights only; higher loses the updates after it",
    "late": "every weight is in place before a call; higher gives {kind} the weights of the call before",
    "bools": "switches are not made trainable; higher returns a tensor for each bool",
    "whole": "a learned value that is not whole replaces an int as a float; higher cuts it to an int",
    "nested": "the keyword `params` reaches a submodule whose forward has it; higher drops it",
    "pure": "inside torch.func a call leaves the weights and buffers of the patched module as they are; higher keeps "
    "tensors that die with the transform",
}
"""What is said, by place."""

_said: set[str] = set()
_OWN = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def differs(place: str, **details: str) -> None:
    """Say, the first time, that a program relies on what higher does otherwise."""
    if place in _said:
        return
    _said.add(place)
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(_OWN)):
        depth, frame = depth + 1, frame.f_back
    said = DIFFERENCES[place].format(**details)
    warnings.warn(f"{said}; see docs/from-higher.md", DifferenceWarning, stacklevel=depth)
