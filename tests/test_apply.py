"""`apply` in plain eager code: right, pure, strict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from zoo import Member, fingerprint, members, ordinary, perturbed, seeded, tensors_in, total
from zoo_modules import MLP, Buffers, EmptySlots, Fails, Frozen, Handles, Norms, Rotating, Structured
from zoo_refused import WritesParameter

from statelessify import errors, stateless

pytestmark = pytest.mark.usefixtures("float64")

modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def gradients(out: Any, wanted: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(total(out), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


# ---------------------------------------------------------------- right


@members()
@modes
def test_agrees_with_the_module(member: Member, training: bool) -> None:
    """Outputs, gradients and buffers, for the module's values and for others, one call after another."""
    apply, params, buffers = stateless(member.make(training), params="detach", buffers="detach", **member.split)
    for own in (params, perturbed(params), params):
        x = member.inputs().requires_grad_()
        module = ordinary(member, own, buffers, training)
        names = dict(module.named_parameters())
        expected = seeded(module, x, **member.kwargs)
        out, new_buffers = seeded(apply, own, buffers, x, **member.kwargs)
        assert type(out) is type(expected)
        assert_close(tensors_in(out), tensors_in(expected))
        assert_close(gradients(out, [*own.values(), x]), gradients(expected, [*(names[n] for n in own), x]))
        after = dict(module.named_buffers()) | {n: p for n, p in names.items() if n in buffers}
        assert_close(new_buffers, {name: after[name] for name in new_buffers})
        assert set(new_buffers) == set(after)


@members()
@modes
def test_touches_nothing(member: Member, training: bool) -> None:
    module = member.make(training)
    apply, params, buffers = stateless(module, **member.split)
    mine, theirs = perturbed(params), perturbed(buffers)
    x, results = member.inputs(), []
    passed = [params, buffers, mine, theirs, x]
    before, given = fingerprint(module), fingerprint(passed)
    for _ in range(3):
        apply(params, buffers, x, **member.kwargs)
        out, _ = seeded(apply, mine, theirs, x, **member.kwargs)
        gradients(out, list(mine.values()))
        results.append(out)
    assert fingerprint(module) == before
    assert fingerprint(passed) == given
    for other in results[1:]:
        assert_close(tensors_in(other), tensors_in(results[0]), rtol=0, atol=0)


def survives_pickling(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(module))(*args, **kwargs)
    except Exception:
        return False
    return True


@members()
def test_pickles_and_deep_copies_whenever_the_module_does(member: Member) -> None:
    module = member.make()
    apply, params, buffers = stateless(module, **member.split)
    x = member.inputs()
    expected = tensors_in(seeded(apply, params, buffers, x, **member.kwargs)[0])
    copies = [copy.deepcopy(apply)]
    if survives_pickling(module, x, **member.kwargs):
        copies.append(pickle.loads(pickle.dumps(apply)))
    for other in copies:
        for _ in range(2):
            assert_close(tensors_in(seeded(other, params, buffers, x, **member.kwargs)[0]), expected)


def test_raising_leaves_no_trace() -> None:
    module = Fails()
    apply, params, buffers = stateless(module)
    x, before = torch.randn(4, 3), fingerprint(module)
    expected = Fails.forward(ordinary(Member(Fails), params, buffers, True), x)
    for _ in range(3):
        with pytest.raises(KeyError, match="asked to fail"):
            apply(params, buffers, x, fail=True)
        assert fingerprint(module) == before
        assert_close(apply(params, buffers, x)[0], expected)


def test_a_gradient_reaches_the_module_itself_under_alias() -> None:
    module = MLP()
    apply, params, buffers = stateless(module)
    for _ in range(2):
        total(apply(params, buffers, torch.ones(4, 3))[0]).backward()
    assert all(p.grad is not None and params[n] is p for n, p in module.named_parameters())


def test_what_the_caller_does_to_an_output_is_not_seen_by_the_next_call() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.extras = torch.zeros(2), {}

        def forward(self) -> Any:
            return self.scale, self.extras

    apply, params, buffers = stateless(Shares())
    for _ in range(3):
        (scale, extras), _ = apply(params, buffers)
        assert scale.tolist() == [0.0, 0.0]
        assert extras == {}
        scale.add_(1.0)
        extras["left"] = 1


def test_a_weight_in_a_plain_list_is_right_or_a_named_error() -> None:
    apply, params, buffers = stateless(Handles())
    x = torch.ones(4, 3)
    for own in (params, perturbed(params), params):
        try:
            out, _ = apply(own, buffers, x)
        except errors.StatelessifyError:
            continue
        assert_close(out, x[0] @ own["linear.weight"].T)


def test_order_of_a_dict_is_state_too() -> None:
    apply, params, buffers = stateless(Rotating())
    x = torch.ones(3)
    assert_close(apply(params, buffers, x)[0], apply(params, buffers, x)[0])


def test_arguments_may_have_any_name() -> None:
    apply, params, buffers = stateless(Structured())
    out, _ = apply(params, buffers, torch.ones(4, 3), params=3.0, buffers=torch.tensor(2.0), module=5)
    assert out.extras["none"] == 5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_recording(context: Any) -> None:
    module = Norms()
    apply, params, buffers = stateless(module)
    x = torch.randn(4, 3, 5)
    expected = ordinary(Member(Norms), params, buffers, True)(x)
    with context():
        for _ in range(2):
            out, new_buffers = apply(params, buffers, x)
            apply(params, new_buffers, x)
    assert not out.requires_grad
    assert_close(out, expected, check_stride=False)


# ---------------------------------------------------------------- new_buffers


def test_unwritten_buffers_are_the_same_objects() -> None:
    apply, params, buffers = stateless(Buffers())
    for _ in range(2):
        _, new_buffers = apply(params, buffers, torch.ones(4, 3))
        same = {name for name in buffers if new_buffers[name] is buffers[name]}
        assert same == {"untouched"}
        assert list(new_buffers) == list(buffers)


@pytest.mark.parametrize("fill", [0.5, float("nan"), float("inf")])
def test_unwritten_buffers_are_the_same_objects_whatever_they_hold(fill: float) -> None:
    module = MLP()
    module.register_buffer("flat", torch.full((3,), fill))
    module.register_buffer("square", torch.full((3, 3), fill))
    apply, params, buffers = stateless(module)
    _, new_buffers = apply(params, buffers, torch.ones(4, 3))
    assert all(new_buffers[name] is buffers[name] for name in buffers)


def test_frozen_parameters_pass_through() -> None:
    module = Frozen()
    apply, params, buffers = stateless(module)
    assert sorted(buffers) == ["body.bias", "body.weight"]
    for _ in range(2):
        _, new_buffers = apply(params, buffers, torch.ones(4, 3))
        assert all(new_buffers[name] is getattr(module.body, name[5:]) for name in buffers)


def test_an_empty_slot_that_the_call_fills_appears() -> None:
    apply, params, buffers = stateless(EmptySlots())
    x = torch.full((4, 3), 2.0)
    assert buffers == {}
    assert list(params) == ["linear.weight"]
    _, once = apply(params, buffers, x)
    assert {name: value.item() for name, value in once.items()} == {"cache": 2.0}
    _, twice = apply(params, once, x)
    assert (once["cache"].item(), twice["cache"].item()) == (2.0, 4.0)
    _, again = apply(params, buffers, x)
    assert again["cache"].item() == 2.0


def test_a_buffer_that_the_call_empties_may_stay_away() -> None:
    class Empties(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            out = x if self.cache is None else x + self.cache
            self.cache = None
            return out

    apply, params, buffers = stateless(Empties())
    out, emptied = apply(params, buffers, torch.zeros(2))
    assert (out.tolist(), emptied) == ([1.0, 1.0], {})
    assert apply(params, emptied, torch.zeros(2))[0].tolist() == [0.0, 0.0]


def test_a_buffer_may_grow() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = torch.cat([self.seen, x])
            return self.seen.sum()

    apply, params, buffers = stateless(Grows())
    _, buffers = apply(params, buffers, torch.ones(2, 3))
    out, buffers = apply(params, buffers, torch.ones(2, 3))
    assert (out.item(), buffers["seen"].shape) == (12.0, (4, 3))


def test_a_name_may_stand_in_either_dict() -> None:
    apply, params, buffers = stateless(Norms())
    x = torch.randn(4, 3, 5)
    expected, new_buffers = apply(params, buffers, x)
    out, nothing = apply({**params, **buffers}, {}, x)
    assert_close(out, expected)
    assert nothing == {}
    out, everything = apply({}, {**buffers, **params}, x)
    assert_close(out, expected)
    assert_close({name: everything[name] for name in new_buffers}, new_buffers)
    assert all(everything[name] is params[name] for name in params)
    assert_close(apply(MappingProxyType(params), MappingProxyType(buffers), x)[0], expected)


# ---------------------------------------------------------------- strict


@pytest.mark.parametrize(
    ("change", "error", "builtin", "words"),
    [
        (lambda p, b: (p | {"0.wieght": p["0.weight"]}, b), errors.NamesError, KeyError, ["did you mean `0.weight`"]),
        (lambda p, b: (p, b | {"zzz": torch.ones(1)}), errors.NamesError, KeyError, ["`buffers`", "`zzz`"]),
        (lambda p, b: ({"2.bias": p["2.bias"]}, b), errors.NamesError, KeyError, ["`0.weight`", "combine"]),
        (lambda p, b: (p, {"0.bias": p["0.bias"]}), errors.NamesError, KeyError, ["0.bias", "both"]),
        (lambda p, b: (p | {"0.bias": torch.ones(1)}, b), errors.ShapeError, ValueError, ["0.bias", "(1,)", "(4,)"]),
        (lambda p, b: (p | {"0.bias": torch.ones(5, 4)}, b), errors.ShapeError, ValueError, ["over_tasks"]),
        (lambda p, b: (p | {"0.bias": None}, b), errors.DtypeError, TypeError, ["0.bias", "NoneType"]),
        (lambda p, b: (list(p.values()), b), errors.DtypeError, TypeError, ["`params`", "list"]),
        (lambda p, b: (p, None), errors.DtypeError, TypeError, ["`buffers`", "NoneType"]),
    ],
)
def test_names_and_shapes_are_checked_first(change: Any, error: Any, builtin: Any, words: list[str]) -> None:
    class Untouchable(MLP):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("forward has run")

    module = Untouchable()
    apply, params, buffers = stateless(module)
    before, given = fingerprint(module), change(dict(params), dict(buffers))
    for call in (lambda: apply(*given, torch.ones(4, 3)), lambda: apply.bind(*given)):
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, builtin)
        assert [word for word in words if word not in str(caught.value)] == []
        assert fingerprint(module) == before


@pytest.mark.parametrize("how", ["add_", "data", "rebind", "in training"])
def test_writing_into_a_parameter_is_an_error_before_the_callers_tensor_is_touched(how: str) -> None:
    module = WritesParameter(how).eval()
    apply, params, buffers = stateless(module)
    if how == "in training":
        apply(params, buffers, torch.ones(3))  # a call that does not write says nothing about the other mode
    before = fingerprint(module)
    for _ in range(2):
        with pytest.raises(errors.MutationError, match="`weight`") as caught:
            apply.train()(params, buffers, torch.ones(3))
        assert isinstance(caught.value, RuntimeError)
        assert fingerprint(module) == before


# ---------------------------------------------------------------- modes


def test_modes_are_explicit() -> None:
    module = Norms()
    module.plain.eval()
    apply, params, buffers = stateless(module)
    x, before = torch.randn(4, 3, 5), fingerprint(module)
    mixed, trained, evaluated = apply, apply.train(), apply.eval()
    for purely, mode in ((mixed, None), (trained, True), (evaluated, False), (evaluated.train(), True)):
        twin = ordinary(Member(Norms), params, buffers, True)
        twin.plain.eval()
        if mode is not None:
            twin.train(mode)
        out, new_buffers = purely(params, buffers, x)
        assert_close(out, twin(x))
        assert_close(new_buffers, dict(twin.named_buffers()))
    assert fingerprint(module) == before
    module.eval()
    assert_close(apply(params, buffers, x)[0], mixed(params, buffers, x)[0])


def test_a_cache_of_weights_is_refused() -> None:
    """It would outlive the call, and give the next one the weights of this one."""
    apply, params, buffers = stateless(parametrizations.weight_norm(nn.Linear(3, 2)))
    with parametrize.cached(), pytest.raises(errors.ModuleError, match="outside"):
        apply(params, buffers, torch.ones(3))
    with parametrize.cached():
        stateless(MLP()).apply(*stateless(MLP())[1:], torch.ones(3))
    apply(params, buffers, torch.ones(3))


class Doubles(nn.Module):
    """Hangs a hook on its parameter in each call, which doubles the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.register_hook(lambda grad: 2 * grad)
        return x * self.weight


@pytest.mark.parametrize("policy", ["alias", "detach"])
def test_hooks_that_forward_hangs_on_parameters_are_of_one_call(policy: Any) -> None:
    apply, params, buffers = stateless(Doubles(), params=policy)
    x = torch.randn(3)
    for _ in range(4):
        (grad,) = torch.autograd.grad(apply(params, buffers, x)[0].sum(), params["weight"])
        assert_close(grad, 2 * x)
    assert not params["weight"]._backward_hooks


class Keeping(nn.Module):
    """Keeps something of each call, so that little is known of it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        self.count = len(x)
        return self.norm(x)


@pytest.mark.parametrize("wrap", [lambda norm: norm, nn.Sequential, Keeping], ids=["alone", "inside", "own code"])
def test_strided_weights_of_batch_norms(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Columns of a matrix, as a hypernetwork makes them: torch's gradient by the input is wrong on CPUs."""
    apply, params, buffers = stateless(wrap(nn.BatchNorm1d(3)).double())
    table, x = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    strided = {name: table[:, 0] if name.endswith("weight") else p for name, p in params.items()}
    for _ in range(2):  # the first call clones what it is given
        found, expected = (
            torch.autograd.grad(apply(given, buffers, x)[0].sin().sum(), x)[0]
            for given in (strided, {name: p.contiguous() for name, p in strided.items()})
        )
        assert torch.equal(found, expected)
