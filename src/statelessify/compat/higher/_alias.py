"""``sys.modules["higher"] = statelessify.compat.higher``, submodules included."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__: list[str] = []

_OWN = __name__.rpartition(".")[0]
_ALIAS = "higher."


class Alias(MetaPathFinder, Loader):
    """Finds submodules of `higher` here, where the package of that name is this one, and makes no copies of them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.startswith(_ALIAS) and sys.modules.get("higher") is sys.modules.get(_OWN)
        return ModuleSpec(fullname, self) if ours and importlib.util.find_spec(_own_name(fullname)) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_own_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is executed again: the module has been imported under its own name, which it keeps."""
        if module.__spec__ is not None and module.__spec__.loader_state is not None:
            module.__spec__ = module.__spec__.loader_state


def _own_name(name: str) -> str:
    return f"{_OWN}.{name.removeprefix(_ALIAS)}"


def register() -> None:
    """Let imports of submodules of `higher` come here, as long as that name stands for this package."""
    if not any(type(finder).__name__ == Alias.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Alias())
