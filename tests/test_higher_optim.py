"""Differentiable optimizers of the compatibility layer: real higher where it is right, torch.optim, each promise."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from higher_oracle import EACH, KINDS, cases, real, run, square
from hypothesis import given, settings
from hypothesis import strategies as st
from live import CLASSES, untouched
from optim_naive import SPECS, configs, numbers
from problems import assert_close
from torch import Tensor, nn

from statelessify.compat import higher as ours
from statelessify.errors import DerivativeError

# Rprop and RMSprop warn when they are made, and so does each place where the layer differs on purpose.
pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore::UserWarning")]
FEW = settings(max_examples=max(settings().max_examples // 4, 5))
REAL_ONLY = ("muon", "adafactor")

# Against real higher ------------------------------------------------------------------------------------------------


@given(cases())
def test_weights_and_meta_gradients_are_those_of_higher(case: Any) -> None:
    (new, gradients), (expected, meta) = run(ours, case), run(real, case)
    assert_close(new, expected)
    for found, right in zip(gradients, meta, strict=True):
        scale = 1 + float(right.abs().max())
        assert_close(found / scale, right / scale)


@FEW
@given(cases(frozen=False))  # which higher thaws
def test_weights_without_tracking_are_those_of_higher(case: Any) -> None:
    assert_close(run(ours, case, False)[0], run(real, case, False)[0])


# Against torch.optim ------------------------------------------------------------------------------------------------


def leaves(rule: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = {"muon": [(2, 3), (3, 2), (2, 2)], "adafactor": [(2, 3), (), (4,)]}.get(rule, [(2, 3), (), (0,)])
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def pull(params: Any, targets: Any, reached: Any) -> Tensor:
    """Its gradient is twice the distance, and None where a parameter is not reached."""
    pairs = [(p, t) for p, t, is_reached in zip(params, targets, reached, strict=True) if is_reached]
    return torch.stack([((p - t).abs() ** 2).sum() for p, t in pairs]).sum()


def torch_step(opt: Any, params: Any, targets: Any, reached: Any) -> None:
    opt.zero_grad()
    pull(params, targets, reached).backward()
    opt.step()


def compare(rule: str, opt: Any, params: Any, reached: Any, warm: int, tolerance: Any, **kwargs: Any) -> None:
    """Steps of a live optimizer, then as many of both; the source stays as it is meanwhile."""
    targets = [[torch.randn_like(p) for p in params] for _ in reached]
    for step in range(warm):
        torch_step(opt, params, targets[step], reached[step])
    diffopt = ours.get_diff_optim(opt, params, **kwargs)
    current: Any = [p.detach().clone().requires_grad_() for p in params]
    with untouched(opt, nn.ParameterList(params)):
        for step in range(warm, len(reached)):
            current = diffopt.step(pull(current, targets[step], reached[step]), params=current)
    for step in range(warm, len(reached)):
        torch_step(opt, params, targets[step], reached[step])
    torch.testing.assert_close(current, [p.detach() for p in params], rtol=tolerance, atol=tolerance)
    assert [p.dtype for p in current] == [p.dtype for p in params]
    for group, own in zip(opt.param_groups, diffopt.state, strict=True):
        for index, p in enumerate(group["params"]):
            for slot, value in opt.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and slot not in ("mu", "step"):
                    torch.testing.assert_close(own[index][slot], value, rtol=tolerance, atol=tolerance)
            if "step" in opt.state.get(p, {}):
                assert int(own[index]["step"]) == int(opt.state[p]["step"])


@EACH
@FEW
@given(st.data())
def test_values_and_state_are_those_of_torch(rule: str, data: st.DataObject) -> None:
    options = data.draw(configs(rule))
    if rule == "muon":  # what torch's does not have
        del options["dtype"], options["maximize"]
    params = leaves(rule)
    split = data.draw(st.integers(0, 2))
    rate = data.draw(numbers(SPECS[rule].numbers["lr"]))
    groups = [{"params": params[:split]}, {"params": params[split:], "lr": rate}] if split else [{"params": params}]
    some = st.lists(st.booleans(), min_size=3, max_size=3).filter(any)
    reached = data.draw(st.lists(some, min_size=3, max_size=8))
    opt = KINDS[rule](groups, **options, **({} if rule in REAL_ONLY else {"foreach": data.draw(st.booleans())}))
    track = data.draw(st.booleans())
    compare(rule, opt, params, reached, data.draw(st.integers(0, 3)), 1e-10, track_higher_grads=track)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex128])
def test_every_dtype_is_that_of_torch(rule: str, dtype: torch.dtype) -> None:
    if dtype.is_complex and rule in REAL_ONLY:
        pytest.skip("no complex parameters")
    params = leaves(rule, dtype)
    coarse = dtype is torch.float16 and "eps" in SPECS[rule].numbers and rule not in REAL_ONLY
    opt = KINDS[rule](params, lr=0.1, **({"eps": 1e-3} if coarse else {}))
    bits = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.complex128: 1e-10}
    compare(rule, opt, params, [[True] * 3] * 4, 1, bits[dtype])


@pytest.mark.parametrize("rule", ["sgd", "adam", "adagrad", "adadelta"])
def test_sparse_gradients_are_as_dense_ones(rule: str) -> None:
    """Which higher refuses; the meta-gradient too."""
    index, found = torch.tensor([0, 2, 2]), []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Embedding(4, 2, sparse=sparse)
        opt = KINDS[rule](net.parameters(), lr=0.1, weight_decay=0.1)
        with ours.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(2):
                (new,) = diffopt.step((fmodel(index) ** 3).sum())
        (meta,) = torch.autograd.grad((new**2).sum(), net.weight)
        assert new.layout is torch.strided
        found.append((new, meta.to_dense()))
    assert_close(*found)


def test_names() -> None:
    for cls in CLASSES:
        params = leaves(cls.__name__.lower())
        opt, kind = cls(params), getattr(ours.optim, f"Differentiable{cls.__name__}")
        assert issubclass(kind, ours.optim.DifferentiableOptimizer)
        assert type(ours.get_diff_optim(opt, params)) is kind
        assert kind(opt, params).param_groups[0].keys() == opt.param_groups[0].keys()


# The step, sentence by sentence -------------------------------------------------------------------------------------


def one_group(cls: Any = torch.optim.SGD, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Two parameters, and an optimizer of the second."""
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    return a, b, cls([b], **{"lr": 0.1, **options})


def test_what_it_is_made_of() -> None:
    a, b, opt = one_group(torch.optim.Adam)
    square([b]).backward()
    opt.step()
    with untouched(opt, nn.ParameterList([a, b])):
        diffopt = ours.get_diff_optim(opt, iter([a, b]), surplus=1)
        assert diffopt.param_groups[0]["params"] == [None]
        assert isinstance(diffopt.state, list)
        own = diffopt.state[0][0]
        assert diffopt.state[0][7] == {}  # a defaultdict
        for slot, value in opt.state[b].items():
            assert_close(own[slot], value)
            assert own[slot].data_ptr() != value.data_ptr()
        own["exp_avg"].add_(1)
        new = diffopt.step(square([a, b]), params=(p for p in (a, b)), surplus=1)
    assert diffopt.param_groups[0]["params"][0] is new[1]  # as in higher; some programs read it
    assert type(new) is list
    assert new[0] is a  # not held
    assert new[1] is not b
    with pytest.raises(TypeError):
        ours.optim.DifferentiableOptimizer(opt, [a, b])
    meta = ours.get_diff_optim(opt, [a, b], device="meta").state[0][0]
    assert meta["exp_avg"].is_meta


def test_every_parameter_has_to_be_among_the_references() -> None:
    a, b, opt = one_group()
    for reference in ([a], [a, b.detach().clone()], []):
        with pytest.raises(ValueError, match="reference_params"):
            ours.get_diff_optim(opt, reference)


def test_the_references_give_the_order() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    opt = torch.optim.SGD([{"params": [b], "lr": 0.5}, {"params": [a], "lr": 0.25}])
    new = ours.get_diff_optim(opt, [a, b]).step(square([a, b]), params=[a, b])
    assert_close([p.detach() for p in new], [torch.full((2,), 0.5), torch.zeros(3)])


def test_callbacks_see_a_tuple_of_all_gradients() -> None:
    a, b, opt = one_group()
    frozen, unused, seen = torch.ones(2), torch.ones(2, requires_grad=True), []

    def keep(gradients: Any) -> Any:
        seen.append(gradients)
        return [None if g is None else 0 * g for g in gradients]

    def refuse(gradients: Any) -> Any:
        raise ZeroDivisionError

    params = [a, frozen, b, unused]
    diffopt = ours.get_diff_optim(opt, params, grad_callback=refuse)
    new = diffopt.step(square([a, frozen, b]), params=params, grad_callback=keep)  # the step's wins
    assert type(seen[0]) is tuple
    assert [g is None for g in seen[0]] == [False, True, False, True]
    assert seen[0][0] is not None  # also of what the optimizer does not hold
    assert_close(seen[0][0].detach(), 2 * a.detach())
    assert_close(new[2].detach(), b.detach())
    with pytest.raises(ZeroDivisionError):  # for that step only
        diffopt.step(square(params), params=params)


def test_weights_that_are_passed_win() -> None:
    net = nn.Linear(2, 1)
    with ours.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
        other = [torch.ones(1, 2, requires_grad=True), torch.ones(1, requires_grad=True)]
        new = diffopt.step(square(other), params=other)
    assert_close([p.detach() for p in new], [torch.full((1, 2), 0.8), torch.full((1,), 0.8)])
    assert [a is b for a, b in zip(fmodel.parameters(), new, strict=True)] == [True, True]
    assert len(fmodel._fast_params) == 2


def test_without_weights() -> None:
    a, b, opt = one_group(momentum=0.5)
    for fmodel in (None, ours.patch.make_functional(nn.ParameterList([a, b]))):
        diffopt = ours.get_diff_optim(opt, [a, b], fmodel)
        with pytest.raises(ValueError, match="params="):
            diffopt.step(square([a, b]), override={"lr": [9.0]})
        assert diffopt.param_groups[0]["lr"] == 0.1  # an error changes nothing


def test_without_tracking() -> None:
    """Detached, nothing earlier is kept alive, and frozen weights stay frozen."""
    a, b, frozen = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True), torch.ones(1)
    rate = torch.tensor(0.1, requires_grad=True)
    opt = torch.optim.SGD([a, frozen], lr=0.1, momentum=0.9, weight_decay=0.1)
    diffopt = ours.get_diff_optim(opt, [a, frozen, b], track_higher_grads=False, override={"lr": [rate]})
    params: Any = [a, frozen, b]
    seen = []
    for _ in range(3):
        loss = square(params)
        params = diffopt.step(loss, params=params)
        seen.append(weakref.ref(params[0]))
        assert [p.requires_grad for p in params] == [True, False, True]
        assert params[0].is_leaf
        assert params[2] is b
        assert not diffopt.state[0][0]["momentum_buffer"].requires_grad
    del loss
    assert [ref() is None for ref in seen] == [True, True, False]
    assert_close(params[1], torch.ones(1))
    assert "FirstOrder" in ours.innerloop_ctx.__doc__
    assert torch.autograd.grad(square(params), a, allow_unused=True) == (None,)


def test_the_graph_of_the_loss_stays_only_with_tracking() -> None:
    a, b, opt = one_group()
    for track in (True, False):
        loss = square([a, b])
        ours.get_diff_optim(opt, [a, b], track_higher_grads=track).step(loss, params=[a, b])
        with contextlib.nullcontext() if track else pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_no_grad_around_a_step() -> None:
    a, b, opt = one_group(torch.optim.Adam)
    diffopt, loss = ours.get_diff_optim(opt, [a, b]), square([a, b])
    with torch.no_grad():
        new = diffopt.step(loss, params=[a, b])
        assert new[1].is_leaf
        assert not diffopt.state[0][0]["exp_avg"].requires_grad
        with pytest.raises(RuntimeError):  # from autograd: the loss has no graph
            diffopt.step(square(new), params=new)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_a_step_inside_a_transform_is_refused_and_changes_nothing(transform: Any) -> None:
    a, b, opt = one_group(momentum=0.9)
    diffopt = ours.get_diff_optim(opt, [a, b])
    with pytest.raises(DerivativeError):
        transform(lambda w: diffopt.step(square([w, w]), params=[w, w], override={"lr": [9.0]})[0].sum())(torch.ones(1))
    assert diffopt.param_groups[0]["lr"] == 0.1
    assert not diffopt.state[0]


@pytest.mark.parametrize("how", ["override", "callback"])
def test_an_error_in_one_group_leaves_all_as_they_were(how: str) -> None:
    def fail(gradients: Any) -> Any:
        raise ZeroDivisionError

    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    net = nn.ParameterList([a, b])
    opt = torch.optim.SGD([{"params": [net[0]]}, {"params": [net[1]]}], lr=0.1, momentum=0.9)
    with ours.innerloop_ctx(net, opt) as (fmodel, diffopt):
        diffopt.step(square(fmodel.parameters()))
        before, held = list(fmodel.parameters()), diffopt.state[0][0]["momentum_buffer"].clone()
        given = {"override": {"lr": [0.2, -1.0]}} if how == "override" else {"grad_callback": fail}
        with pytest.raises((ValueError, ZeroDivisionError)):
            diffopt.step(square(before), **given)
        assert [x is y for x, y in zip(before, fmodel.parameters(), strict=True)] == [True, True]
        assert_close(diffopt.state[0][0]["momentum_buffer"], held)
        assert [group["lr"] for group in diffopt.param_groups] == [0.1, 0.1]


# innerloop_ctx ------------------------------------------------------------------------------------------------------


def test_both_stay_usable_and_errors_pass_through() -> None:
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), ours.innerloop_ctx(net, opt) as (fmodel, diffopt):
        raise ZeroDivisionError
    assert isinstance(fmodel, nn.Linear)
    assert type(diffopt) is ours.optim.DifferentiableSGD
    new = diffopt.step(fmodel(torch.ones(2)).sum())
    assert_close(new[0].detach(), net.weight.detach() - 0.1)
    assert fmodel(torch.ones(2)).requires_grad
    with pytest.raises(ValueError, match="reference_params"), ours.innerloop_ctx(nn.Linear(2, 1), opt):
        pass


def test_gradients_of_several_contexts_add_up() -> None:
    net = nn.Linear(1, 1, bias=False)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with ours.innerloop_ctx(net, opt, copy_initial_weights=False) as (first, inner):
        with ours.innerloop_ctx(net, opt, copy_initial_weights=False) as (second, other):
            inner.step(first(torch.ones(1)).sum())
            other.step(second(torch.ones(1)).sum())
            first(torch.ones(1)).sum().backward()
        second(torch.ones(1)).sum().backward()
    assert_close(net.weight.grad, torch.tensor([[2.0]]))


def test_its_arguments_reach_both() -> None:
    net, given = nn.Linear(2, 1), []

    def callback(gradients: Any) -> Any:
        given.append(gradients)
        return gradients

    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    flags = {"override": {"lr": [0.5]}, "track_higher_grads": False, "grad_callback": callback}
    with ours.innerloop_ctx(net, opt, None, False, **flags) as (fmodel, diffopt):
        new = diffopt.step(fmodel(torch.ones(2)).sum())
    assert (len(given), len(fmodel._fast_params), new[0].is_leaf) == (1, 1, True)
    assert_close(new[1].detach(), net.bias.detach() - 0.5)
    with ours.innerloop_ctx(net, opt, device="meta") as (fmodel, diffopt):
        assert diffopt.step(fmodel(torch.ones(2, device="meta")).sum())[0].is_meta
