"""Every member of the zoo as a patched module, against an ordinary module that is trained in place."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from higher_cases import QUIET, slopes, visible
from torch import Tensor, nn
from torch.func import vmap
from torch.testing import assert_close
from zoo import ZOO, Member, fingerprint, perturbed, seeded, tensors_in, total
from zoo_detours import DETOURS
from zoo_refused import REFUSED

from statelessify import errors
from statelessify.compat import higher

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings(QUIET),
    # torch loops over some kernels by itself, which is slow and right
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

# What depends on weights being `nn.Parameter`, on what was noted on one, or on `params` as a keyword; as in higher.
OTHERWISE = {"asks_for_parameters", "keyed", "annotated", "reflects", "structured"}
OTHERWISE |= {"lasting"}  # makes parameters in its first call
# Each list of weights is new, so the gradient of a kept output ends at the weights of its own time.
KEEPS = {"plain_tensors"}
ALL: dict[str, Member] = ZOO | DETOURS | {name: member for name, (member, _) in REFUSED.items()}
# A named error that says why is an answer for these; see their docstrings.
MAY_REFUSE = {
    "backward_hooks",  # they read a weight in backward
    "unregistered",
    "singleton",
    "read-only_dict",
    "dict_view",
    "weak_dict",
    "cached_method",
    "view_data",
    "view_detached",
    "view_in_the_graph",
    "prior",
}
every = pytest.mark.parametrize("name", [name for name in ALL if name not in OTHERWISE])


def two_of(member: Member, training: bool) -> tuple[nn.Module, nn.Module]:
    """Two equal modules: one to be patched, one to be trained in place."""
    pair = member.make(training), member.make(training)
    for module in pair if member.lazy else ():
        module.eval()(torch.ones(member.shape))
        module.train(training)
    return pair


def give(fmodel: Any, step: int, new: list[Tensor]) -> dict[str, Any]:
    """In the first step by `update_params`, then by `fast_params`, then as an argument of the next call."""
    if step == 2:
        return {"params": new}
    fmodel.update_params(new) if step == 0 else setattr(fmodel, "fast_params", new)
    return {}


@contextlib.contextmanager
def may_refuse(name: str) -> Iterator[None]:
    """A named error is an answer for some."""
    try:
        yield
    except errors.StatelessifyError:
        if name not in MAY_REFUSE:
            raise


@every
@modes
def test_a_member_of_the_zoo_is_right_or_refused_by_name(name: str, training: bool) -> None:
    """Outputs, gradients and buffers over three updates."""
    member = ALL[name]
    module, plain = two_of(member, training)
    with may_refuse(name):
        fmodel = higher.monkeypatch(module)
        for step in range(3):
            held = zip(fmodel.parameters(), plain.parameters(), strict=True)
            own = [(p.detach() + 0.1 * torch.rand_like(p)).requires_grad_(q.requires_grad) for p, q in held]
            write(plain, own)
            x, given = member.inputs(), give(fmodel, step, own)
            out, expected = seeded(fmodel, x, **given, **member.kwargs), seeded(plain, x, **member.kwargs)
            assert_close(tensors_in(out), tensors_in(expected))
            if total(expected).requires_grad and not (step and name in KEEPS):
                assert_close(slopes(total(out), own), slopes(total(expected), plain.parameters()))
            assert_close(dict(fmodel.named_buffers()), dict(plain.named_buffers()))


def write(module: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(module.parameters(), values, strict=True):
            p.copy_(value)


@pytest.mark.parametrize("name", [n for n, member in ZOO.items() if member.blocked is None and n not in OTHERWISE])
@modes
def test_inside_vmap_a_member_is_right_and_keeps_nothing(name: str, training: bool) -> None:
    member = ALL[name]
    module, _ = two_of(member, training)
    with may_refuse(name):
        fmodel, x, expected = higher.monkeypatch(module), member.inputs(), []
        rows = [list(perturbed(dict(enumerate(fmodel.parameters()))).values()) for _ in range(2)]
        for values in rows:
            plain, _ = two_of(member, training)
            write(plain, values)
            expected.append([tensor.detach() for tensor in tensors_in(seeded(plain, x, **member.kwargs))])
        before = visible(fmodel), fingerprint(module)
        call = lambda params: tensors_in(fmodel(x, params=params, **member.kwargs))
        mapped = vmap(call, randomness="same" if member.random else "error")
        found = seeded(mapped, [torch.stack(pair) for pair in zip(*rows, strict=True)])
        assert_close(found, [torch.stack(pair) for pair in zip(*expected, strict=True)])
        assert (visible(fmodel), fingerprint(module)) == before


# A graph of torch.fx is pickled by tracing it anew, which wants the very classes that it was traced with.
@pytest.mark.parametrize("name", [name for name in ZOO if name not in OTHERWISE | {"traced"}])
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_member_goes_on_from_the_same_state(name: str, way: Any) -> None:
    """Wherever the module itself can be copied so."""
    member, fmodel = ALL[name], None
    module, _ = two_of(member, True)
    with may_refuse(name):
        fmodel = higher.monkeypatch(module)
    x = member.inputs()
    try:
        way(module)(x, **member.kwargs)
    except Exception:
        return  # nor can an ordinary module be copied
    if fmodel is None:
        return
    fmodel.update_params([p.detach() + 0.1 * torch.rand_like(p) for p in fmodel.parameters()])
    seeded(fmodel, x, **member.kwargs)
    copied = way(fmodel)
    for _ in range(2):
        assert_close(*(tensors_in(seeded(f, x, **member.kwargs)) for f in (copied, fmodel)))


def test_the_zoo_is_not_changed_by_making_copies() -> None:
    for name in ("mlp", "norms", "tied", "closures", "hooked", "parametrized_twice", "pruned", "nested", "packed"):
        module = ALL[name].make() if name in ALL else nn.Identity()
        before = fingerprint(module)
        for make in (higher.monkeypatch, higher.patch.make_functional):
            make(module)
        assert fingerprint(module) == before
