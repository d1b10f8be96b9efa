"""Hyperparameters of the compatibility layer: derivatives, overrides, what is learned and written back, and helpers."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from higher_oracle import EACH, KINDS, real, square
from optimizers import SWITCHES, VALUES, steps_of, with_each
from problems import assert_close
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statelessify.compat import higher as ours

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::UserWarning")]
SGD, Adam = torch.optim.SGD, torch.optim.Adam
get, apply = ours.optim.get_trainable_opt_params, ours.optim.apply_trainable_opt_params
# torch adds the first accumulator to the state, which is no number any more.
NUMBERS = {rule: {k: v for k, v in VALUES[rule].items() if k != "initial_accumulator_value"} for rule in KINDS}
NUMBERS["muon"]["eps"] = 4.0  # felt by some of the steps below


def leaf(value: float, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.full(shape, value, requires_grad=True)


def start(rule: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3), (3, 2)] if rule == "muon" else [(2, 3), (), (3,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def unrolled(diffopt: Any, params: Any, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after steps towards targets that differ, and what the state has on the graph."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        targets = [torch.randn(p.shape, generator=generator) for p in params]
        params = diffopt.step(square([p - t for p, t in zip(params, targets, strict=True)]), params=params)
    state = [value for own in diffopt.state[0].values() for value in own.values() if isinstance(value, Tensor)]
    return params, [value for value in state if value.requires_grad]


def check_derivatives(rule: str, learned: dict[str, Any], **fixed: Any) -> None:
    """By each number, and by the initial weights; and that none is zero."""
    spec = torch.utils._pytree.tree_structure(learned)
    count, source = spec.num_leaves, KINDS[rule](start(rule), lr=0.1)
    fixed |= {"muon": {"dtype": None, "ns_steps": 2}}.get(rule, {})  # finite differences need more than bfloat16

    def outcome(*inputs: Tensor) -> Tensor:
        values = torch.utils._pytree.tree_unflatten(inputs[:count], spec)
        override = {name: [value] for name, value in {**fixed, **values}.items()}
        diffopt = ours.get_diff_optim(source, source.param_groups[0]["params"], override=override)
        params, state = unrolled(diffopt, inputs[count:], steps_of(rule))
        return torch.cat([tensor.flatten() for tensor in [*params, *state]])

    inputs = [*tree_leaves(learned), *start(rule)]
    assert torch.autograd.gradcheck(outcome, inputs)
    assert all(g.abs().max() > 1e-9 for g in torch.autograd.grad((outcome(*inputs) ** 3).sum(), inputs))


@EACH
@pytest.mark.parametrize("shape", [(), (1,)])
def test_every_number_learns(rule: str, shape: Any) -> None:
    check_derivatives(rule, {name: with_each(value, lambda v: leaf(v, shape)) for name, value in NUMBERS[rule].items()})


@pytest.mark.parametrize(("rule", "switch"), [(rule, switch) for rule in KINDS for switch in SWITCHES[rule]])
def test_every_number_learns_with_a_switch_on(rule: str, switch: str) -> None:
    numbers = {name: value for name, value in NUMBERS[rule].items() if (name, switch) != ("dampening", "nesterov")}
    check_derivatives(rule, {name: with_each(value, leaf) for name, value in numbers.items()}, **{switch: True})


@pytest.mark.parametrize("rule", ["sgd", "rmsprop"])
def test_momentum_learns_from_zero(rule: str) -> None:
    check_derivatives(rule, {"momentum": leaf(0.0)})
    params = start(rule)
    optimizers = [ours.create_diff_optim(KINDS[rule], {"lr": 0.1, "momentum": m}, params) for m in (0.5, 0.0)]
    optimizers[0].param_groups[0]["momentum"] = leaf(0.0)
    assert_close(*(unrolled(diffopt, params, 3)[0] for diffopt in optimizers))


def test_rates_for_each_entry_are_as_in_higher() -> None:
    """Meta-SGD: a group for each parameter, a tensor of its shape as the rate."""
    found = []
    for library in (ours, real):
        torch.manual_seed(0)
        net, x = nn.Linear(3, 2), torch.randn(4, 3)
        rates = [torch.full_like(p, 0.1).requires_grad_() for p in net.parameters()]
        opt = SGD([{"params": [p]} for p in net.parameters()], lr=1.0, momentum=0.9)
        with library.innerloop_ctx(net, opt, copy_initial_weights=False, override={"lr": rates}) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step((fmodel(x) ** 3).sum())
        found.append(torch.autograd.grad((fmodel(x) ** 2).sum(), [*net.parameters(), *rates]))
    assert_close(*found)


# Where higher's numbers are wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adam", "adadelta", "adagrad", "adamax", "asgd", "rmsprop", "rprop"])
def test_maximize_goes_up(rule: str) -> None:
    w = leaf(0.5, (2,))
    diffopt = ours.create_diff_optim(KINDS[rule], {"lr": 0.1, "maximize": True}, [w])
    assert (diffopt.step(square([w]), params=[w])[0] > w).all()


def test_adam_adds_eps_after_the_bias_correction() -> None:
    """The first step is ``lr g / (|g| + eps)`` with ``g = 2 w``, whose derivative is exact at zero too."""
    w = torch.tensor([1.0, 0.0], requires_grad=True)
    (new,) = ours.create_diff_optim(Adam, {"lr": 0.1, "eps": 0.5}, [w]).step(square([w]), params=[w])
    assert_close(new.detach(), torch.tensor([1 - 0.1 * 2 / 2.5, 0.0]))
    assert_close(torch.autograd.grad(new.sum(), w)[0], 1 - 0.2 * 0.5 / torch.tensor([2.5, 0.5]) ** 2)


@pytest.mark.parametrize("rule", ["adam", "adamw", "nadam", "radam", "adamax", "adagrad", "rmsprop", "adadelta"])
def test_a_zero_gradient_leaves_the_identity(rule: str) -> None:
    """Where nothing has been seen the derivative is 1, not NaN, also of second order."""
    w = torch.tensor([0.5, -1.0], requires_grad=True)
    diffopt, new = ours.create_diff_optim(KINDS[rule], {"lr": 0.1, "weight_decay": 0.0}, [w]), [w]
    for _ in range(2):
        new = diffopt.step(0 * square(new), params=new)
    (first,) = torch.autograd.grad(square(new), w, create_graph=True)
    assert_close((new[0].detach(), first.detach()), (w.detach(), 2 * w.detach()))
    assert_close(torch.autograd.grad(first.sum(), w)[0], torch.tensor([2.0, 2.0]))


# Overrides, and tensors in the source -------------------------------------------------------------------------------


def test_overrides() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = SGD([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)
    diffopt = ours.get_diff_optim(opt, [a, b], override={"lr": [0.3, 0.4], "novel": ["x"]})
    assert [(g["lr"], g["novel"]) for g in diffopt.param_groups] == [(0.3, "x"), (0.4, "x")]
    diffopt.step(square([a, b]), params=[a, b], override={"lr": [9.0]})
    new = diffopt.step(square([a, b]), params=[a, b])  # that of a step stays
    assert_close([p.detach() for p in new], [torch.full((2,), -17.0), torch.full((3,), -17.0)])
    diffopt.param_groups[1]["lr"] = 0.5  # as a schedule does
    assert_close(diffopt.step(square([a, b]), params=[a, b])[1].detach(), torch.zeros(3))
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.2]
    for wrong in ([], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="lr"):
            ours.get_diff_optim(opt, [a, b], override={"lr": wrong})
        with pytest.raises(ValueError, match="lr"):
            diffopt.step(square([a, b]), params=[a, b], override={"momentum": [0.9], "lr": wrong})
        assert [(g["lr"], g["momentum"]) for g in diffopt.param_groups] == [(9.0, 0), (0.5, 0)]


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_tensor_in_the_source_learns(rule: str, is_leaf: bool) -> None:
    """And what becomes of it later does not change what has been computed."""
    made = []
    for later in (1.0, 10.0):
        whole, params = leaf(0.2), start(rule)
        rate = whole if is_leaf else whole / 2
        opt = KINDS[rule](params, lr=rate)
        diffopt = ours.get_diff_optim(opt, params)
        new, _ = unrolled(diffopt, params, 2)
        assert (opt.param_groups[0]["lr"] is rate, len(opt.state)) == (True, 0)
        with torch.no_grad():
            rate.mul_(later)
        new, _ = unrolled(diffopt, new, 1)
        made.append([*new, *torch.autograd.grad(square(new), [whole, *params])])
    assert made[0][len(new)] != 0
    assert_close(*made)


# Learned, and written back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "options"), [*((r, {}) for r in KINDS), ("sgd", {"momentum": 0.9, "nesterov": True})])
def test_all_that_can_be_learned_can_be_used(rule: str, options: dict[str, Any]) -> None:
    params = start(rule)
    opt = KINDS[rule](params, lr=0.1, **options)
    plain, _ = unrolled(ours.get_diff_optim(opt, params), params, 3)
    override = get(opt)
    learned, _ = unrolled(ours.get_diff_optim(opt, params, override=override), params, 3)
    assert_close([p.detach() for p in learned], [p.detach() for p in plain], 1e-9 if rule != "muon" else 0.05)
    assert torch.autograd.grad(square(learned), override["lr"])[0] != 0


@EACH
def test_learned_numbers_are_those_of_higher_without_switches(rule: str) -> None:
    params = start(rule)
    opt = KINDS[rule]([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=0.1)
    opt.param_groups[0]["kept"] = opt.param_groups[1]["kept"] = {"a": [1, 2.5], "b": (0.5,)}
    opt.param_groups[0]["mixed"] = opt.param_groups[1]["mixed"] = (1.0, None)
    before = copy.deepcopy(opt.state_dict()["param_groups"])
    found, expected = get(opt), real.optim.get_trainable_opt_params(opt)
    switches = {name for name, value in before[0].items() if isinstance(value, bool)}
    assert isinstance(found, collections.defaultdict)
    assert "lr" not in get(SGD([torch.zeros(1)], lr=torch.tensor(0.1)))  # a tensor already
    assert not switches & found.keys()
    for name in expected.keys() - switches - {"ns_steps"}:  # a count
        assert_close(found[name], expected[name])
    assert all(t.ndim == 0 and t.requires_grad and t.is_leaf for t in tree_leaves(dict(found)))
    assert all(t.is_meta for t in tree_leaves(dict(get(opt, device="meta"))))
    apply(opt, found)
    assert str(opt.state_dict()["param_groups"]) == str(before)  # the types too


Pair = collections.namedtuple("Pair", ["low", "high"])


@pytest.mark.parametrize(
    ("old", "given", "new"),
    [
        (0.5, torch.tensor(2.0), 2.0),
        (3, torch.tensor(4.0), 4),
        (3, torch.tensor(4.5), 4.5),  # higher cuts it
        (True, torch.tensor(0.0), False),
        ((1.0, 2.0), (torch.tensor(3.0), torch.tensor(4.0)), (3.0, 4.0)),
        ([1, {"x": 2.0}], [torch.tensor(3.0), {"x": torch.tensor(4.0)}], [3, {"x": 4.0}]),
        ({1.0, 2.0}, {torch.tensor(3.0), torch.tensor(4.0)}, {3.0, 4.0}),
        (Pair(1.0, 2.0), Pair(torch.tensor(3.0), torch.tensor(4.0)), Pair(3.0, 4.0)),
    ],
    ids=str,
)
def test_what_is_written_back(old: Any, given: Any, new: Any) -> None:
    opt = SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=0.1)
    for group in opt.param_groups:
        group["value"] = old
    apply(opt, {"value": [given], "lr": [torch.tensor(0.25), torch.tensor(0.75)]})
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.75]
    assert all(g["value"] == new and type(g["value"]) is type(new) for g in opt.param_groups)
    assert list(map(type, tree_leaves(opt.param_groups[0]["value"]))) == list(map(type, tree_leaves(new)))


def test_a_tensor_is_written_into_the_tensor() -> None:
    """Which stays the object that an outer optimizer may hold, apart from the learned one."""
    rate, learned = leaf(0.1), leaf(0.5)
    opt = SGD([torch.zeros(1)], lr=rate)
    apply(opt, {"lr": [learned]})
    with torch.no_grad():
        learned.mul_(2)
    assert_close(opt.param_groups[0]["lr"].detach(), torch.tensor(0.5))
    assert opt.param_groups[0]["lr"] is rate
    assert rate.requires_grad


@pytest.mark.parametrize(
    "wrong", [{"lr": [leaf(1.0)] * 3}, {"lr": []}, {"betas": [leaf(1.0)]}, {"lr": [1.0]}, {"betas": [(leaf(1.0),)]}]
)
def test_what_cannot_be_written_back_changes_nothing(wrong: Any) -> None:
    opt = Adam([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=0.1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=next(iter(wrong))):
        apply(opt, {"eps": [leaf(0.5)], **wrong})
    assert opt.state_dict() == before


@pytest.mark.parametrize("form", ["list", "iterator", "groups", "patched", "both"])
def test_made_of_a_type(form: str) -> None:
    a, b = leaf(1.0, (2,)), leaf(1.0, (3,))
    fmodel = ours.monkeypatch(nn.ParameterList([a, b])) if form in ("patched", "both") else None
    given: Any = {"list": [a, b], "iterator": iter([a, b]), "both": [a, b]}.get(form)
    if form == "groups":
        given = [{"params": a}, {"params": (p for p in [b]), "lr": 0.5}]
    seen = []
    diffopt = ours.create_diff_optim(
        SGD, {"lr": 0.25}, given, fmodel, grad_callback=lambda gradients: seen.append(1) or gradients
    )
    params = None if fmodel is not None else [a, b]
    new = diffopt.step(square(params or fmodel.parameters()), params=params)
    assert_close([p.detach() for p in new], [torch.full((2,), 0.5), torch.full((3,), 0.0 if form == "groups" else 0.5)])
    assert_close((a.detach(), b.detach()), (torch.ones(2), torch.ones(3)))
    assert seen == [1]
    with pytest.raises(ValueError, match="params="):
        ours.create_diff_optim(SGD, {"lr": 0.25})
    with pytest.raises(ValueError, match="register_optim"):
        ours.create_diff_optim(torch.optim.LBFGS, {}, [a])


class Halver(torch.optim.SGD): ...


class DifferentiableHalver(ours.optim.DifferentiableOptimizer):
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for g, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for i, (p, grad) in enumerate(zip(group["params"], grads, strict=True)):
                if grad is not None and i == 0:  # what is not written stays
                    own = self.state[g][i]
                    own["seen"] = own.get("seen", 0) + grad + 0 * p
                    group["params"][i] = p - 0.5 * group["lr"] * own["seen"]


@pytest.mark.parametrize("track", [True, False])
def test_an_optimizer_of_ones_own(track: bool) -> None:
    params = [leaf(1.0, (2,)), leaf(1.0, (3,))]
    opt = Halver(params, lr=0.5)
    with pytest.raises(ValueError, match="register_optim"):  # a subclass is another type
        ours.get_diff_optim(opt, params)
    try:
        for kind in (ours.optim.DifferentiableSGD, DifferentiableHalver):  # the later one holds
            ours.register_optim(Halver, kind)
            diffopt = ours.get_diff_optim(opt, params, track_higher_grads=track)
            assert type(diffopt) is kind
        new = diffopt.step(square(params), params=params)
        new = diffopt.step(square(new), params=new)
        assert_close(new[0].detach(), torch.full((2,), 1 - 0.5 - 0.25 * 3))
        assert new[0].is_leaf is (not track)
        assert diffopt.state[0][0]["seen"].requires_grad is track
        assert (new[1] is params[1]) is track
    finally:
        ours.optim._opt_mapping.pop(Halver, None)


# Helpers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [3, [], [1, (2, [3], {})], {"b": [1], "a": ({"c": None},)}, {1, 2}, [{3}], "text"])
def test_trees_are_walked_as_in_higher(tree: Any) -> None:
    for name, more in [("flatten", ()), ("_is_container", ()), ("_recursive_map", (str,))]:
        assert getattr(ours.utils, name)(tree, *more) == getattr(real.utils, name)(tree, *more)


def test_copies_of_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight, net[0].bias.requires_grad = net[0].weight, False
    assert ours.utils._get_param_mapping(net, [], []) == real.utils._get_param_mapping(net, [], []) == [0, 1, 0, 2]
    params = list(net.parameters())
    assert ours.utils._find_param_in_list(net[1].weight, params) == 0
    assert ours.utils._find_param_in_list(params[0] * 1, params) is None
    for safe in (True, False):
        for p, own in zip(params, ours.utils.get_func_params(net, safe_copy=safe), strict=True):
            assert_close(own.detach(), p.detach())
            assert (own.requires_grad, own.is_leaf, type(own)) == (p.requires_grad, True, Tensor)
            assert (own.data_ptr() == p.data_ptr()) is not safe
    assert all(p.is_meta for p in ours.utils.get_func_params(net, "meta", False))
    (held,) = ours.utils._recursive_copy_and_cast({"a": params[:1], "b": 1}, None)["a"]
    assert held.requires_grad
    assert held.data_ptr() != params[0].data_ptr() == ours.utils._copy_tensor(params[0], False).data_ptr()


def test_private_names_that_authors_use() -> None:
    """`_add` and the rest compute what higher's do; a mask keeps gradients from where a value is zero."""
    x, y, z = (torch.randn(3) for _ in range(3))
    for name, args in [("_add", (x, y)), ("_add", (x, 0.5, y)), ("_addcdiv", (x, 0.5, y, z)), ("_addcmul", (x, y, z))]:
        assert_close(getattr(ours.optim, name)(*args), getattr(real.optim, name)(*args))
    v = torch.tensor([0.0, 4.0], requires_grad=True)
    w = v * 1
    ours.optim._maybe_mask(w, w == 0)
    assert_close(torch.autograd.grad(w.sqrt().sum(), v)[0], torch.tensor([0.0, 0.25]))
    assert_close(ours.optim._get_mask_closure(v == 0)(torch.ones(2)), torch.tensor([0.0, 1.0]))
