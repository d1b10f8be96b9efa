"""The structural copy: everything a module's behaviour depends on, pointing at the copy and not at the original."""

from __future__ import annotations

import functools
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import Member, fingerprint, members, tensors_in
from zoo_modules import Closures

from statelessify._skeleton import find_slots
from statelessify._structure import copy_structure
from statelessify._vacant import vacancies

pytestmark = pytest.mark.usefixtures("float64")


def emptied(module: nn.Module) -> nn.Module:
    return copy_structure(module, vacancies(find_slots(module).tensors))


@members(lambda m: not m.lazy)
def test_a_copy_without_tensors_has_the_same_slots(member: Member) -> None:
    module = member.make()
    before = fingerprint(module)
    twin = emptied(module)
    assert fingerprint(module) == before
    assert type(twin) is type(module)
    ours, theirs = find_slots(twin), find_slots(module)
    assert (ours.params, ours.buffers, ours.empty) == (theirs.params, theirs.buffers, theirs.empty)
    for name, tensor in ours.tensors.items():
        original = theirs.tensors[name]
        assert (tensor.shape, tensor.dtype) == (original.shape, original.dtype)
        assert tensor.requires_grad is original.requires_grad
    assert [part.training for part in twin.modules()] == [part.training for part in module.modules()]
    assert not {id(part) for part in twin.modules()} & {id(part) for part in module.modules()}


@members(lambda m: not m.lazy)
def test_a_copy_of_a_copy_is_independent(member: Member) -> None:
    """What runs in eager code is a copy of a copy; the one in between never changes."""
    twin = emptied(member.make())
    before = fingerprint(twin)
    emptied(twin).eval()
    assert fingerprint(twin) == before


def test_functions_reach_the_copy() -> None:
    module = Closures()
    twin = copy_structure(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    for parameter in twin.parameters():
        parameter.data.fill_(0.5)
    assert not twin(torch.ones(2, 3)).isnan().any()
    assert twin.helper.owner is twin
    assert twin.bound.__self__ is twin
    assert twin.child_bound.__self__ is twin.linear


def test_weak_references_reach_the_copy() -> None:
    module = nn.Module()
    module.child = nn.Linear(1, 1)
    module.child.parent = weakref.ref(module)
    twin = copy_structure(module)
    assert twin.child.parent() is twin


@pytest.mark.parametrize("deep", [False, True])
def test_what_cannot_be_copied_is_shared_alone(deep: bool) -> None:
    state = {"before": [], "lock": threading.Lock(), "after": []}
    module = nn.Linear(1, 1)
    module.again = module.state = {"deep": state} if deep else state
    twin = copy_structure(module)
    assert twin.state is twin.again
    copied = twin.state["deep"] if deep else twin.state
    assert list(copied) == list(state)
    assert copied["lock"] is state["lock"]
    copied["before"].append(1)
    copied["after"].append(1)
    assert (state["before"], state["after"]) == ([], [])


def test_one_object_stays_one_object() -> None:
    shared: list[int] = [1]
    module = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    module[0].log = module[1].log = shared
    module.functions = [functools.partial(shared.append), lambda: module[0]]
    twin = copy_structure(module)
    assert twin[0].log is twin[1].log
    assert twin[0].log is not shared
    assert twin.functions[1]() is twin[0]


def test_plain_tensors_get_storage_of_their_own_and_generators_their_state() -> None:
    module = nn.Module()
    module.plain, module.generator = torch.zeros(2), torch.Generator().manual_seed(5)
    module.views = [module.plain, module.plain]
    twin = copy_structure(module)
    twin.plain.add_(1)
    assert module.plain.tolist() == [0.0, 0.0]
    assert twin.views[0] is twin.views[1] is twin.plain
    drawn = torch.rand(3, generator=twin.generator)
    assert_close(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert_close(drawn, torch.rand(3, generator=module.generator))


def test_a_plain_tensor_that_needs_a_gradient_is_the_users_own() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    module = nn.Linear(1, 1)
    module.scales = [scale, scale * 3]
    twin = copy_structure(module)
    assert twin.scales[0] is scale
    (gradient,) = torch.autograd.grad(twin.scales[1], scale)
    assert gradient.item() == 3.0


@pytest.mark.parametrize("calls", [1, 3])
def test_hooks_of_a_copy_see_the_copy(calls: int) -> None:
    seen: list[nn.Module] = []

    class Watch:
        def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen.append(module)
            return out

    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(Watch())
    twin = copy_structure(module)
    for _ in range(calls):
        tensors_in(twin(torch.ones(2)))
    assert seen == [twin[0]] * calls
