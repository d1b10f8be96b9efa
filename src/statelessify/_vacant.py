"""What stands in a skeleton's slots between calls: tensors that can be looked at, and not computed with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import LateUseError

__all__: list[str] = []


class Vacant(Tensor):
    """A slot's shape and dtype without its values: any operation is a named error, where a stale tensor would lie.

    It is met by what runs after its call has ended (recomputation in backward, a closure that was returned), and by
    what reads a weight past its slot (a list of weights kept beside them).
    """

    slot: str

    @staticmethod
    def __new__(cls: Any, slot: str, shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> Vacant:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        vacant: Vacant = Tensor._make_subclass(cls, empty, requires_grad)
        vacant.slot = slot
        return vacant

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        slot = next((arg.slot for arg in args if isinstance(arg, Vacant)), "?")
        raise LateUseError(
            f"`{slot}` is used outside the call that it was passed to, or past its slot: by code that runs after "
            '`apply` has returned (a returned closure; activation checkpointing under vmap, where `backend="loop"` '
            "helps), or through a second reference such as a list of weights; use the module's own attribute, inside "
            "forward"
        )

    def __repr__(self, **_: Any) -> str:
        return f"<vacant slot `{self.slot}` {tuple(self.shape)}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Vacant, (self.slot, self.shape, self.dtype, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Vacant:
        return memo.setdefault(id(self), Vacant(self.slot, self.shape, self.dtype, self.requires_grad))


_ATTRIBUTES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "is_leaf",
    "grad",
    "grad_fn",
    "is_meta",
    "_version",
)
_METHODS = ("requires_grad_", "size", "dim", "numel", "is_floating_point", "is_complex")
_LOOKS: set[Any] = {
    cast("Any", Tensor.requires_grad).__set__,
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METHODS),
}


def vacancies(tensors: Mapping[str, Tensor], traced: bool = False) -> dict[int, Tensor]:
    """What stands for each tensor, by its id; `traced` gives dynamo the plain parameters that it can follow."""
    return {id(tensor): _stand_in(name, tensor, traced) for name, tensor in tensors.items()}


def _stand_in(name: str, tensor: Tensor, traced: bool) -> Tensor:
    if not traced:
        return Vacant(name, tensor.shape, tensor.dtype, tensor.requires_grad)
    return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.requires_grad)


def storage_of(tensor: Tensor) -> int | None:
    """Where a tensor's values lie; None where it has no storage of the ordinary kind."""
    if isinstance(tensor, Vacant) or tensor.layout is not torch.strided or tensor.is_meta or is_lazy(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None


def views_of(tensors: Mapping[str, Tensor], held: Iterable[Any]) -> dict[int, Tensor]:
    """What stands for further tensors that see the storage of one of `tensors`: they would show stale values."""
    known = {id(tensor) for tensor in tensors.values()}
    owners = {storage_of(tensor): name for name, tensor in tensors.items()}
    owners.pop(None, None)
    views = {id(t): t for t in held if isinstance(t, Tensor) and id(t) not in known and storage_of(t) in owners}
    return {key: Vacant(owners[storage_of(t)], t.shape, t.dtype, False) for key, t in views.items()}
