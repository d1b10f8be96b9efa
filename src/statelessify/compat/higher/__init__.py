"""The library `higher`, to import in its place: ``from statelessify.compat import higher``.

For code that imports `higher` itself, write before its first import::

    import sys, statelessify.compat.higher; sys.modules["higher"] = statelessify.compat.higher

A thin layer: patched modules are private copies whose weights are trees with copy policies, and the differentiable
optimizers are the rules of `statelessify.optim`. `docs/from-higher.md` lists where it differs on purpose;
`DifferenceWarning` says so once at each such place.
"""

from . import optim, patch, utils
from ._alias import register as _register
from ._context import innerloop_ctx
from ._differences import DifferenceWarning
from .optim import create_diff_optim, get_diff_optim, register_optim
from .patch import monkeypatch

__all__ = [
    "DifferenceWarning",
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]

_register()
