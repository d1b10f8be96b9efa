"""hypothesis strategies for tensors, trees, modules, optimizers, tasks and losses: legal by default.

Whoever imports them has torch's random numbers seeded before every example, as hypothesis does it for `random`.
"""

from . import _torch_random as _torch_random
from ._blocks import Buffered as Buffered
from ._blocks import Chain as Chain
from ._blocks import Residual as Residual
from ._blocks import Shared as Shared
from ._blocks import Single as Single
from ._blocks import Tied as Tied
from ._recipe import Indices as Indices
from ._recipe import seeded as seeded

__all__: list[str] = []
