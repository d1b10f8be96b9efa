"""PyTorch modules and optimizers as pure functions over pytrees, and meta-gradients in one line."""

from . import errors, implicit, optim, rules, typing
from ._adapt import Adapted, adapt
from ._adapt_tasks import adapt_tasks
from ._compare import Comparison, ModeResult, compare_modes
from ._compile import compiled
from ._forward_mode import ForwardMode
from ._implicit import Implicit
from ._partition import combine, partition
from ._stateless import Stateless, load_, stateless
from ._tasks import over_tasks
from ._tree import tree_copy, tree_stack, tree_unstack
from ._unroll import FirstOrder, Unroll
from .compat.higher.patch import buffer_sync, make_functional, monkeypatch
from .explain import explain

__all__ = [
    "Adapted",
    "Comparison",
    "FirstOrder",
    "ForwardMode",
    "Implicit",
    "ModeResult",
    "Stateless",
    "Unroll",
    "adapt",
    "adapt_tasks",
    "buffer_sync",
    "combine",
    "compare_modes",
    "compiled",
    "errors",
    "explain",
    "implicit",
    "load_",
    "make_functional",
    "monkeypatch",
    "optim",
    "over_tasks",
    "partition",
    "rules",
    "stateless",
    "tree_copy",
    "tree_stack",
    "tree_unstack",
    "typing",
]

__version__ = "0.1.0"
