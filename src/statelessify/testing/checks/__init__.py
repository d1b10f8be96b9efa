"""Checks that raise an AssertionError which names the leaf, the worst entry, both values and code to reproduce it."""

from .._close import assert_trees_close
from .._unmutated import unmutated
from ._grads import check_grads
from ._meta_grads import check_meta_grads
from ._modes import check_modes
from ._optimizer import check_optimizer
from ._over_tasks import check_over_tasks
from ._stateless import check_stateless

__all__ = [
    "assert_trees_close",
    "check_grads",
    "check_meta_grads",
    "check_modes",
    "check_optimizer",
    "check_over_tasks",
    "check_stateless",
    "unmutated",
]
