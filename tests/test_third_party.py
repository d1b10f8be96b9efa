"""Third-party optimizers through `from_torch`: values, derivatives, transforms, and that nothing else is touched."""

from __future__ import annotations

import copy
import random
import types
from typing import Any

import pytest
import torch
from foreign import DIFFERENTIABLE, Foreign, Kind, loss, pure, real, start, without_graph
from live import assert_same, detour, gradients_for, pure_steps, round_trip, step, untouched
from problems import assert_close
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from statelessify import adapt, optim, stateless
from statelessify.errors import StatelessifyError

pytestmark = pytest.mark.usefixtures("float64")
EACH = pytest.mark.parametrize("kind", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
TARGETS = torch.tensor([[0.5, 2.0], [1.0, -1.0], [0.2, 0.3]], dtype=torch.float64)


# Values ------------------------------------------------------------------------------------------------------------


@EACH
def test_values_are_those_of_the_stateful_optimizer(kind: Kind) -> None:
    for cls in (kind, without_graph(kind)):
        assert_close(pure(cls, 5), real(cls, 5), 1e-14)
        assert_close(pure(cls, 5, lr=0.3, wd=0.1), real(cls, 5, {"lr": 0.3, "wd": 0.1}), 1e-14)


@EACH
def test_values_of_a_live_optimizer(kind: Kind) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    make = lambda own: without_graph(kind)(list(own.parameters())[::-1], lr=0.05)
    for warm in (0, 2):
        round_trip(make, module, gradients_for(module, warm + 5), before=warm, pure=2)


@EACH
def test_values_with_a_number_for_each_parameter_and_step(kind: Kind) -> None:
    if kind.__name__ in ("Flat", "Attributes"):
        pytest.skip("reads all parameters of one group")

    def grouped(leaves: list[Tensor]) -> Any:
        rates = ({"lr": 0.3, "wd": 0.1}, {"lr": 0.1, "wd": 0.4})
        made = without_graph(kind)([{"params": [leaf]} for leaf in leaves])
        for group, own in zip(made.param_groups, rates, strict=True):
            group.update(own)
        return made

    given: dict[str, Any] = {"lr": {"z": 0.3, "a": 0.1}, "wd": lambda step: {"z": 0.1, "a": 0.4}}
    assert_close(pure(without_graph(kind), 3, **given), real(grouped, 3), 1e-14)


class Pair(Foreign):
    def __init__(self, params: Any, betas: Any = (0.9, 0.5)) -> None:
        super().__init__(params)
        self.param_groups[0]["betas"] = betas

    def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        p.sub_(group["betas"][0] * g + group["betas"][1] * p)


def test_a_schedule_inside_of_a_dict_or_a_pair() -> None:
    expected = pure(Foreign, 3, lr=0.3)
    for lr in (lambda step: 0.3, {"z": 0.3, "a": lambda step: 0.3}, {"*": lambda step: torch.tensor(0.3)}):
        assert_close(pure(Foreign, 3, lr=lr), expected, 1e-14)
    expected = pure(Pair, 3, betas=(0.3, 0.1))
    for betas in (lambda step: (0.3, 0.1), (0.3, lambda step: 0.1), ({"z": 0.3, "a": torch.tensor(0.3)}, 0.1)):
        assert_close(pure(Pair, 3, betas=betas), expected, 1e-14)


AWKWARD: dict[str, Kind] = {}


def awkward(kind: Kind) -> Kind:
    AWKWARD[kind.__name__] = without_graph(kind)
    return kind


@awkward
class OnlyTrainable(Foreign):
    def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        if p.requires_grad:
            p.sub_(group["lr"] * g)


@awkward
class OwnList(Foreign):
    def set_up(self) -> None:
        self.params = list(self.param_groups[0]["params"])

    def step(self, closure: Any = None) -> None:
        for p in self.params:
            if p.grad is not None:
                p.sub_(0.1 * p.grad)


class WithBuffer(Foreign):
    """Momentum, its buffer wherever a subclass keeps that."""

    def buffer(self, p: Tensor) -> Tensor:
        return self.state[p].setdefault("m", torch.zeros_like(p))

    def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        p.sub_(group["lr"] * self.buffer(p).mul_(0.9).add_(g))


@awkward
class ByNumber(WithBuffer):
    def set_up(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def buffer(self, p: Tensor) -> Tensor:
        return self.buffers.setdefault(id(p), torch.zeros_like(p))


@awkward
class ByTensor(ByNumber):
    def buffer(self, p: Tensor) -> Tensor:
        return self.buffers.setdefault(p, torch.zeros_like(p))


@awkward
class BoundMethod(WithBuffer):
    def set_up(self) -> None:
        self.buffer = self.usual  # type: ignore[method-assign]

    def usual(self, p: Tensor) -> Tensor:
        return super().buffer(p)


@awkward
class Closure(WithBuffer):
    def set_up(self) -> None:
        self.buffer = lambda p: self.state[p].setdefault("m", torch.zeros_like(p))  # type: ignore[method-assign]


@awkward
class ObjectInState(WithBuffer):
    def buffer(self, p: Tensor) -> Tensor:
        return self.state[p].setdefault("kept", types.SimpleNamespace(m=torch.zeros_like(p))).m


class Counting(Foreign):
    """A rate that falls with the steps, which a subclass counts."""

    def count(self) -> float:
        raise NotImplementedError

    def step(self, closure: Any = None) -> None:
        count = self.count()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] / count * p.grad)


@awkward
class StateOfNoParameter(Counting):
    def count(self) -> float:
        self.state["all"]["steps"] = self.state["all"].get("steps", 0) + 1
        return self.state["all"]["steps"]


@awkward
class NumberInState(Counting):
    def set_up(self) -> None:
        self.state["steps"] = 0

    def count(self) -> float:
        self.state["steps"] += 1
        return self.state["steps"]


@awkward
class ListInGroup(Counting):
    def set_up(self) -> None:
        self.param_groups[0]["seen"] = []

    def count(self) -> float:
        self.param_groups[0]["seen"].append(1)
        return len(self.param_groups[0]["seen"])


@awkward
class DictInGroup(Counting):
    def set_up(self) -> None:
        self.param_groups[0]["kept"] = {"steps": 0}

    def count(self) -> float:
        self.param_groups[0]["kept"]["steps"] += 1
        return self.param_groups[0]["kept"]["steps"]


@awkward
class ObjectAttribute(Counting):
    def set_up(self) -> None:
        self.kept = types.SimpleNamespace(steps=0)

    def count(self) -> float:
        self.kept.steps += 1
        return self.kept.steps


@awkward
class SetAttribute(Counting):
    def set_up(self) -> None:
        self.seen: set[int] = set()

    def count(self) -> float:
        self.seen.add(len(self.seen))
        return len(self.seen)


@awkward
class RandomAttribute(Counting):
    def set_up(self) -> None:
        self.random, self.generator = random.Random(0), torch.Generator().manual_seed(0)

    def count(self) -> float:
        return 1 + self.random.random() + torch.rand((), generator=self.generator).item()


@awkward
class InOrder(Foreign):
    def step(self, closure: Any = None) -> None:
        for index, p in enumerate(self.param_groups[0]["params"]):
            p.sub_(index * self.param_groups[0]["lr"] * p.grad)


@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_what_is_kept_in_awkward_places_is_right_or_refused(kind: Kind) -> None:
    try:
        found = pure(kind, 4)
    except StatelessifyError:
        return
    assert_close(found, real(kind, 4), 1e-14)


@pytest.mark.parametrize("kind", [*DIFFERENTIABLE.values(), *AWKWARD.values()], ids=[*DIFFERENTIABLE, *AWKWARD])
def test_a_step_repeated_is_the_same_step(kind: Kind) -> None:
    """The state that went in is as it was, wherever it is kept."""
    with torch.no_grad():
        try:
            optimizer = optim.from_torch(kind)
            params, state = optimizer.step(start(), start(), optimizer.init(start()))
            first, _ = optimizer.step(params, start(), state)
        except StatelessifyError:
            return
        again, _ = optimizer.step(params, start(), state)
    assert_close(again, first, 0.0)


@EACH
def test_nothing_live_is_touched(kind: Kind) -> None:
    module = nn.Linear(2, 2)
    live = without_graph(kind)(module.parameters())
    gradients = gradients_for(module, 4)
    step(live, module, gradients[:2])
    for name, p in module.named_parameters():
        p.grad = gradients[2][name]
    before = copy.deepcopy({key: value for key, value in vars(live).items() if key not in ("state", "param_groups")})
    pure_optimizer = optim.from_torch(live, module=module)
    with untouched(live, module):
        params, state = pure_steps(pure_optimizer, module, gradients[2:])
        given = copy.deepcopy((params, gradients, state))
        pure_optimizer.step(params, gradients[0], state)
    assert_close((params, gradients, state), given, 0.0)
    assert_close({key: vars(live)[key] for key in before}, before, 0.0)


def test_a_live_optimizer_with_a_scheduler() -> None:
    """The scheduler has replaced the optimizer's `step` by one of its own."""
    module = nn.Linear(2, 2)
    live = without_graph(Foreign)(module.parameters())
    scheduler = StepLR(live, 1, gamma=0.5)
    gradients = gradients_for(module, 3)
    step(live, module, gradients[:1])
    scheduler.step()
    other = copy.deepcopy(module)
    reference = without_graph(Foreign)(other.parameters(), lr=0.05)
    step(reference, other, gradients[1:])
    with untouched(live, module):
        params, _ = pure_steps(optim.from_torch(live, module=module), module, gradients[1:])
    assert_close(params, {name: p.detach() for name, p in other.named_parameters()}, 1e-14)


@pytest.mark.parametrize(
    "own",
    [[{"special": True}, {}], [{}, {"kept": {"a": 1}}], [{"shape": [1, 2]}, {"shape": None}], [{"name": "x"}] * 2],
    ids=str,
)
def test_groups_may_hold_anything(own: list[dict[str, Any]]) -> None:
    """Keys that one group alone has (as those of Muon), and values that are containers."""
    module = nn.Linear(2, 2)
    kind = without_graph(Foreign)
    make = lambda module: kind([{"params": [p], **more} for p, more in zip(module.parameters(), own, strict=True)])
    round_trip(make, module, gradients_for(module, 6), before=2, pure=2)


def test_learned_hyperparameters_are_written_back() -> None:
    module = nn.Linear(2, 2)
    rate = torch.tensor(0.5, requires_grad=True)
    for lr in (0.5, rate, {"*": rate}, {"weight": rate, "bias": rate}, lambda step: 0.5, lambda step: {"*": rate}):
        live = without_graph(Foreign)(module.parameters())
        detour(live, module, gradients_for(module, 2), lr=lr)
        assert live.param_groups[0]["lr"] == 0.5
        assert not isinstance(live.param_groups[0]["lr"], dict)
        assert not getattr(live.param_groups[0]["lr"], "requires_grad", False)


def test_any_tree() -> None:
    trees: list[Any] = [
        torch.ones(2),
        [torch.ones(2), (torch.zeros(3),)],
        {"b": {"c": torch.ones(2)}, "a": [torch.ones(1)]},
    ]
    for tree in trees:
        optimizer = optim.from_torch(DIFFERENTIABLE["Momentum"], wd=0.0)
        expected = optim.sgd(lr=0.1, momentum=0.9)
        for each in (tree, tree):
            found, _ = optimizer.step(each, tree, optimizer.init(each))
            assert_close(found, expected.step(each, tree, expected.init(each))[0], 1e-14)


def test_a_state_is_a_tree_that_another_adapt_goes_on_from() -> None:
    for kind in DIFFERENTIABLE.values():
        optimizer, target = optim.from_torch(kind), TARGETS[0]
        with torch.no_grad():
            once = adapt(loss, start(), target, optimizer=optimizer, steps=2)
            twice = adapt(loss, once.params, target, optimizer=optimizer, steps=3, opt_state=once.opt_state)
        assert_close(twice.params, pure(kind, 5), 1e-14)
        assert twice.opt_state.step == 5


def test_a_parameter_without_gradient_counts_as_one_with_zero() -> None:
    optimizer = optim.from_torch(DIFFERENTIABLE["Momentum"])
    none, zero = ({**start(), "z": value} for value in (None, torch.zeros(2)))
    found, expected = (optimizer.step(start(), grads, optimizer.init(start())) for grads in (none, zero))
    assert_same(found[0], expected[0])
    assert stateless(nn.Linear(1, 1)).params.keys() == {"weight", "bias"}
