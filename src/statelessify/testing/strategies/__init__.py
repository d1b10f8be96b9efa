"""hypothesis strategies for tensors, trees, modules, optimizers, tasks and losses: legal by default.

Whoever imports them has torch's random numbers seeded before every example, as hypothesis does it for `random`.
"""

from . import _torch_random as _torch_random

__all__: list[str] = []
