"""Property tests of meta-learning code: hypothesis strategies, and checks that say which entry is wrong.

    from hypothesis import given
    from statelessify.testing import check_grads, tensors

    @given(tensors(shape=(3,)))
    def test_gradient(x):
        check_grads(my_loss, x)

The checks need torch alone; the strategies need hypothesis, which ``pip install statelessify[testing]`` brings. Both
are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from ._close import assert_trees_close
    from ._unmutated import unmutated
    from .checks import check_grads, check_meta_grads, check_modes, check_optimizer, check_over_tasks, check_stateless
    from .strategies import (
        inputs_for,
        losses,
        modules,
        optimizers,
        param_trees,
        problem,
        problems,
        seeded,
        shapes,
        tasks,
        tensors,
    )

_CHECKS = (
    "assert_trees_close",
    "check_grads",
    "check_meta_grads",
    "check_modes",
    "check_optimizer",
    "check_over_tasks",
    "check_stateless",
    "unmutated",
)

__all__ = [
    "assert_trees_close",
    "check_grads",
    "check_meta_grads",
    "check_modes",
    "check_optimizer",
    "check_over_tasks",
    "check_stateless",
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
    "unmutated",
]


def __getattr__(name: str) -> Any:
    if name in ("checks", "strategies"):
        return _part(name)
    if name in __all__:
        return getattr(_part("checks" if name in _CHECKS else "strategies"), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def _part(name: str) -> Any:
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hypothesis":
            raise
        raise MissingExtraError(
            f"`{__name__}.{name}` needs hypothesis, which is not installed: pip install 'statelessify[testing]'"
        ) from error


def __dir__() -> list[str]:
    return list(__all__)
