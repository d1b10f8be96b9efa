"""hypothesis strategies for tensors, trees, modules, optimizers, tasks and losses: legal by default.

Whoever imports them has torch's random numbers seeded before every example, as hypothesis does it for `random`.
"""

from . import _printing as _printing
from . import _torch_random as _torch_random
from ._blocks import Buffered as Buffered
from ._blocks import Chain as Chain
from ._blocks import Residual as Residual
from ._blocks import Shared as Shared
from ._blocks import Single as Single
from ._blocks import Tied as Tied
from ._losses import OnLogits as OnLogits
from ._losses import losses
from ._modules import inputs_for, modules
from ._optimizers import optimizers
from ._param_trees import Pair as Pair
from ._param_trees import param_trees
from ._problems import Problem as Problem
from ._problems import problem, problems
from ._recipe import Indices as Indices
from ._recipe import seeded
from ._tasks import tasks
from ._tensors import shapes, tensors

__all__ = [
    "inputs_for",
    "losses",
    "modules",
    "optimizers",
    "param_trees",
    "problem",
    "problems",
    "seeded",
    "shapes",
    "tasks",
    "tensors",
]
