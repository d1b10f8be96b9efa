"""The private skeleton: its slots, when it is used again, and that it never answers without its tensors."""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_modules import MLP, Buffers, EmptySlots, Fails, Frozen, Norms, PythonState, Tied, WeakParent, shared_submodule

from statelessify import stateless
from statelessify._pristine import Pristine
from statelessify._skeleton import Skeletons, find_slots
from statelessify._structure import copy_structure
from statelessify._vacant import vacancies

pytestmark = pytest.mark.usefixtures("float64")


def pool(module: nn.Module) -> Skeletons:
    slots = find_slots(module)
    places = {**slots.params, **slots.buffers, **{name: (slot,) for name, slot in slots.empty.items()}}
    template = copy_structure(module, vacancies(slots.tensors))
    return Skeletons(template, tuple(place for each in places.values() for place in each))


# ---------------------------------------------------------------- slots


def test_each_tensor_has_one_name_and_all_of_its_slots() -> None:
    slots = find_slots(Tied())
    assert [place.path for place in slots.params["first.weight"]] == ["first.weight", "second.weight"]
    assert list(slots.params) == ["first.weight", "first.bias"]
    assert list(slots.empty) == ["second.bias"]
    slots = find_slots(shared_submodule())
    assert {name: [place.path for place in places] for name, places in slots.params.items()} == {
        "0.weight": ["0.weight"],
        "0.bias": ["0.bias"],
    }


def test_frozen_parameters_stand_with_the_buffers() -> None:
    slots = find_slots(Frozen())
    assert (list(slots.params), list(slots.buffers)) == (["head.weight", "head.bias"], ["body.weight", "body.bias"])
    assert not any(place.registered_buffer for places in slots.buffers.values() for place in places)


def test_frozen_parameters_stand_before_buffers_which_may_need_a_gradient() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[0].register_buffer("shift", torch.zeros(2, requires_grad=True))
    module[1].weight.requires_grad_(False)
    slots = find_slots(module)
    assert list(slots.params) == ["0.weight", "0.bias", "1.bias"]
    own = [f"0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked", "shift")]
    assert list(slots.buffers) == ["1.weight", *own]
    registered = [place.registered_buffer for places in slots.buffers.values() for place in places]
    assert registered == [False, True, True, True, True]


@pytest.mark.parametrize("make", [MLP, Norms, Tied, Frozen, Buffers, EmptySlots])
def test_slots_agree_with_torch(make: Any) -> None:
    module = make()
    slots = find_slots(module)
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    assert {name: id(t) for name, t in slots.tensors.items()} == {name: id(t) for name, t in named.items()}
    everywhere = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    places = {place.path for found in (slots.params, slots.buffers) for each in found.values() for place in each}
    assert places == set(everywhere)


# ---------------------------------------------------------------- reuse


def run(skeletons: Skeletons, call: Callable[[Any], Any]) -> Any:
    skeleton = skeletons.take()
    result = call(skeleton)
    skeletons.give_back(skeleton)
    return result


def test_a_call_without_a_trace_gives_its_skeleton_back() -> None:
    skeletons = pool(MLP())
    used = [run(skeletons, lambda skeleton: skeleton) for _ in range(3)]
    assert used[0] is used[1] is used[2]


@pytest.mark.parametrize("make", [Fails, PythonState])
def test_a_call_that_leaves_a_trace_does_not(make: Any) -> None:
    module = make()
    skeletons = pool(module)
    values = {f"inner.{name}": tensor.detach() for name, tensor in find_slots(module).tensors.items()}

    def call(skeleton: nn.Module) -> nn.Module:
        torch.func.functional_call(skeleton, values, (torch.ones(2, 3),))
        return skeleton

    assert run(skeletons, call) is not run(skeletons, call)


def test_a_call_that_raises_does_not() -> None:
    skeletons, used = pool(MLP()), []

    def call(skeleton: nn.Module) -> None:
        used.append(skeleton)
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            run(skeletons, call)
    assert used[0] is not used[1]


def test_concurrent_calls_get_their_own() -> None:
    skeletons = pool(MLP())
    assert run(skeletons, lambda outer: run(skeletons, lambda inner: inner is not outer))


CHANGES = {
    "tensor in a list": lambda m: m.tensors[0].add_(1),
    "other tensor in a list": lambda m: m.tensors.__setitem__(0, torch.zeros(2)),
    "attribute": lambda m: setattr(m, "n", m.n + 1),
    "attribute, twice": lambda m: [setattr(m, "much", m.much + 1.0) for _ in range(2)],  # frees the first value's id
    "new attribute": lambda m: setattr(m, "new", 1),
    "deleted attribute": lambda m: delattr(m, "n"),
    "of a child": lambda m: setattr(m.child, "flag", True),
    "list": lambda m: m.items.append(1),
    "list of lists": lambda m: m.nested["a"][0].append(1),
    "order of a dict": lambda m: m.nested.__setitem__("a", m.nested.pop("a")),
    "ordered dict": lambda m: m.ordered.move_to_end("x"),
    "deque": lambda m: m.queue.rotate(),
    "set": lambda m: m.seen.add(5),
    "equal but of another type": lambda m: m.items.__setitem__(0, True),
    "zero of another sign": lambda m: m.signed.__setitem__(0, -0.0),
    "plain tensor": lambda m: m.plain.add_(1),
    "plain tensor bound anew": lambda m: setattr(m, "plain", m.plain.clone()),
    "mode": lambda m: m.child.eval(),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "submodule": lambda m: m.add_module("other", nn.Tanh()),
    "slot": lambda m: m.register_buffer("empty", torch.ones(1)),
    "parameter": lambda m: setattr(m.child, "weight", nn.Parameter(torch.ones(2, 2))),
}


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.much = float("1000.5")
        self.n, self.items, self.nested, self.signed = 0, [1], {"a": [[0]], "b": []}, [0.0]
        self.ordered, self.queue, self.seen = OrderedDict(x=1, y=2), deque([1, 2]), {1}
        self.plain, self.tensors = torch.zeros(2), [torch.zeros(2)]
        self.register_buffer("empty", None)


@pytest.mark.parametrize("change", CHANGES)
def test_every_trace_is_noticed(change: str) -> None:
    module = Stateful()
    pristine = Pristine(module)
    assert pristine.still()
    CHANGES[change](module)
    assert not pristine.still()


@pytest.mark.parametrize("value", [threading.Lock(), iter([1]), torch.Generator(), object()])
def test_what_cannot_be_compared_is_never_used_twice(value: Any) -> None:
    module = nn.Linear(2, 2)
    module.extra = value
    assert not Pristine(module).still()


# ---------------------------------------------------------------- its life


def test_a_pool_pickles_without_what_it_has_used() -> None:
    skeletons = pool(MLP())
    run(skeletons, lambda skeleton: None)
    other = pickle.loads(pickle.dumps(skeletons))
    assert run(other, lambda skeleton: skeleton.inner[0].weight.shape) == (4, 3)


def test_a_template_outlives_its_module() -> None:
    apply, params, buffers = stateless(WeakParent(), params="detach")
    x: Tensor = torch.ones(3)
    assert torch.equal(apply(params, buffers, x)[0], x @ params["linear.weight"].T + params["linear.bias"])
