"""`apply` of every member of the zoo under derivatives, vmap, and over tasks, against ordinary modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention
from ordinary import twice_derived
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import Member, fingerprint, members, ordinary, perturbed, seeded, tensors_in, total
from zoo_detours import DETOURS
from zoo_refused import REFUSED

from statelessify import adapt_tasks, errors, optim, over_tasks, stateless, tree_stack, tree_unstack

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch loops over some kernels by itself, which is slow and right
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

vmapped = members(lambda m: m.blocked is None)
looped = members(lambda m: m.blocked is not None)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def close(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=1e-9, atol=1e-10, check_stride=False)


def filled(grads: Any, wanted: Any) -> list[Tensor]:
    """Gradients, with zeros for what is not reached."""
    return [torch.zeros_like(t) if g is None else g.to_dense() for t, g in zip(wanted, grads, strict=True)]


def bounded(grad: Tensor) -> Tensor:
    """Not linear, and well-conditioned for gradients of thousands, as some members have: sin(g) would lose digits."""
    return (grad / 100).sin()


def second_order(value: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """The derivative of a function of all first derivatives."""
    first = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
    reached = [g for g in first if g is not None and g.requires_grad]
    second = torch.autograd.grad(total([bounded(g) for g in reached]), wanted, allow_unused=True) if reached else first
    return [*filled(first, wanted), *filled(second, wanted)]


# The only kernel of attention on the CPU whose derivative has a derivative.


def randomness(member: Member) -> Any:
    return "same" if member.random else "error"


# ---------------------------------------------------------------- derivatives


@members(lambda m: m.once is None)
@modes
def test_second_derivatives_are_those_of_the_module(member: Member, training: bool) -> None:
    apply, params, buffers = stateless(member.make(training), params="detach", buffers="detach", **member.split)
    own, x = perturbed(params), member.inputs().requires_grad_()
    module = ordinary(member, own, buffers, training)
    held = dict(module.named_parameters())
    with twice_derived():
        expected = second_order(total(seeded(module, x, **member.kwargs)) ** 2, [*(held[name] for name in own), x])
    found = second_order(total(seeded(apply, own, buffers, x, **member.kwargs)[0]) ** 2, [*own.values(), x])
    close(found, expected)


@members(lambda m: m.once is None and m.blocked is None)
def test_functional_second_derivatives_are_those_of_the_module(member: Member) -> None:
    """``grad(grad)``, as `torch.func` takes it."""
    apply, params, buffers = stateless(member.make(), params="detach", buffers="detach", **member.split)
    own, x = perturbed(params), member.inputs()
    module = ordinary(member, own, buffers, True)
    held = dict(module.named_parameters())
    wanted = [held[name] for name in own]
    with twice_derived():
        expected = second_order(total(seeded(module, x, **member.kwargs)) ** 2, wanted)

    def slopes(params: Any) -> Any:
        first = grad(lambda p: total(seeded(apply, p, buffers, x, **member.kwargs)[0]) ** 2)(params)
        return total([bounded(g) for g in first.values()]), first

    second, first = grad(slopes, has_aux=True)({name: tensor.detach() for name, tensor in own.items()})
    close([*first.values(), *second.values()], expected)


# ---------------------------------------------------------------- vmap


@vmapped
@modes
def test_vmap_equals_a_loop_of_ordinary_modules(member: Member, training: bool) -> None:
    """An ensemble on one batch, its buffers shared on the way in; then with inputs and buffers of their own."""
    module = member.make(training)
    apply, params, buffers = stateless(module, **member.split)
    ensemble = [perturbed(params) for _ in range(3)]
    x, before, given = member.inputs(), fingerprint(module), fingerprint(buffers)

    def call(params: Any, buffers: Any, x: Tensor) -> Any:
        out, new_buffers = seeded(apply, params, buffers, x, **member.kwargs)
        return tensors_in(out), new_buffers

    def one(params: Any, buffers: Any, x: Tensor) -> Any:
        module = ordinary(member, params, buffers, training)
        with torch.no_grad():
            out = tensors_in(seeded(module, x, **member.kwargs))
        frozen = {name: p for name, p in module.named_parameters() if name not in params}
        return out, {name: tensor.detach() for name, tensor in (frozen | dict(module.named_buffers())).items()}

    random = randomness(member)
    outs, new_buffers = vmap(call, in_dims=(0, None, None), randomness=random)(tree_stack(ensemble), buffers, x)
    rows = [one(own, buffers, x) for own in ensemble]
    close([tensors_in(outs), new_buffers], [tree_stack([r[0] for r in rows]), tree_stack([r[1] for r in rows])])
    floating = {k: v for k, v in new_buffers.items() if v.is_floating_point()}  # counters stay shared inside
    fixed = {k: v for k, v in rows[0][1].items() if k not in floating}
    xs = member.inputs(3)
    again = lambda params, own, x: call(params, {**own, **fixed}, x)
    outs, newer = vmap(again, randomness=random)(tree_stack(ensemble), floating, xs)
    owns = tree_unstack(floating) if floating else [{}] * 3
    rows = [one(p, {**b, **fixed}, each) for p, b, each in zip(ensemble, owns, xs, strict=True)]
    close([tensors_in(outs), newer], [tree_stack([r[0] for r in rows]), tree_stack([r[1] for r in rows])])
    assert (fingerprint(module), fingerprint(buffers)) == (before, given)


@vmapped
def test_gradients_per_task_are_those_of_ordinary_modules(member: Member) -> None:
    apply, params, buffers = stateless(member.make(), params="detach", buffers="detach", **member.split)
    xs = member.inputs(3)

    def loss(params: Any, x: Tensor) -> Any:
        out, new_buffers = seeded(apply, params, buffers, x, **member.kwargs)
        return total(out), new_buffers

    found, new_buffers = vmap(grad(loss, has_aux=True), in_dims=(None, 0), randomness=randomness(member))(params, xs)
    statistics = tree_unstack(new_buffers) if new_buffers else [{}] * 3
    for grads, after, x in zip(tree_unstack(found), statistics, xs, strict=True):
        module = ordinary(member, params, buffers, True)
        held = dict(module.named_parameters())
        wanted = [held[name] for name in params]
        value = total(seeded(module, x, **member.kwargs))
        close(list(grads.values()), filled(torch.autograd.grad(value, wanted, allow_unused=True), wanted))
        held |= dict(module.named_buffers())
        close(after, {name: held[name].detach() for name in after})


# ---------------------------------------------------------------- over tasks


def gradients_of_tasks(member: Member, backend: Any) -> tuple[Any, Any]:
    """Outputs and gradients of three tasks through `over_tasks`, and those of ordinary modules, one by one."""
    apply, params, buffers = stateless(member.make(), params="detach", buffers="detach", **member.split)
    xs = member.inputs(3)
    loss = lambda params, x: total(seeded(apply, params, buffers, x, **member.kwargs)[0])
    random = "same" if member.random else "different"
    values = over_tasks(loss, randomness=random, backend=backend)(params, xs)
    wanted = list(params.values())
    found = [values, *filled(torch.autograd.grad(values.sin().sum(), wanted, allow_unused=True), wanted)]
    one_by_one, grads = [], [torch.zeros_like(p) for p in wanted]
    for x in xs:
        module = ordinary(member, params, buffers, True)
        held = dict(module.named_parameters())
        value = total(seeded(module, x, **member.kwargs))
        own = [held[name] for name in params]
        more = filled(torch.autograd.grad(value.sin(), own, allow_unused=True), own)
        one_by_one.append(value.detach())
        grads = [g + m for g, m in zip(grads, more, strict=True)]
    return found, [torch.stack(one_by_one), *grads]


@vmapped
def test_tasks_of_what_vmaps_are_batched(member: Member) -> None:
    close(*gradients_of_tasks(member, "vmap"))


@looped
def test_tasks_of_what_torch_cannot_batch_run_in_a_loop(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning that names a module, and the same numbers; `backend="vmap"` says so instead."""
    monkeypatch.setattr("statelessify._tasks._warned", set())
    with pytest.warns(UserWarning, match="torch.vmap cannot batch") as caught:
        close(*gradients_of_tasks(member, "auto"))
    assert len([w for w in caught if "torch.vmap cannot batch" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(*gradients_of_tasks(member, "loop"))
    with pytest.raises(errors.VmapError, match='backend="loop"'):
        gradients_of_tasks(member, "vmap")


def meta_gradient(member: Member, apply: Any, buffers: Any, params: Any, xs: Tensor, tasks: Callable[..., Any]) -> Any:
    # small slopes: steep ones would amplify rounding from step to step
    loss = lambda params, x: (total(seeded(apply, params, buffers, x, **member.kwargs)[0]) / 10).sin()
    value = tasks(loss, params, xs)
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    return [value, *filled(grads, params.values())]


@members(lambda m: m.once is None)
@pytest.mark.filterwarnings("ignore:torch.vmap cannot batch:UserWarning")
def test_meta_gradients_over_tasks_are_those_of_a_loop(member: Member) -> None:
    """Two steps for each of three tasks at once, against plain autograd through one task after another."""
    apply, params, buffers = stateless(member.make(), params="detach", buffers="detach", **member.split)
    xs, rate, random = member.inputs(3), 0.05, "same" if member.random else "different"

    def together(loss: Any, params: Any, xs: Tensor) -> Tensor:
        adapted = adapt_tasks(loss, params, xs, optimizer=optim.sgd(lr=rate), steps=2, randomness=random)
        return over_tasks(loss, in_dims=0, randomness=random)(adapted.params, xs).sum()

    def one_by_one(loss: Any, params: Any, xs: Tensor) -> Tensor:
        values = []
        for x in xs:
            own = dict(params)
            for _ in range(2):
                grads = torch.autograd.grad(loss(own, x), list(own.values()), create_graph=True, allow_unused=True)
                steps = zip(own.items(), grads, strict=True)
                own = {name: p if g is None else p - rate * g for (name, p), g in steps}
            values.append(loss(own, x))
        return torch.stack(values).sum()

    found, expected = (meta_gradient(member, apply, buffers, params, xs, way) for way in (together, one_by_one))
    close(found, expected)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(("member", "name"), [pytest.param(*each, id=name) for name, each in REFUSED.items()])
@modes
def test_what_writes_into_its_parameters_is_refused_by_name(member: Member, name: str, training: bool) -> None:
    module = member.make(training)
    apply, params, buffers = stateless(module)
    other, x = perturbed(params), member.inputs()
    given = (module, params, buffers, other, x)
    before = fingerprint(given)
    for own in (params, other, params):
        with pytest.raises(errors.MutationError, match=f"`{name}`"):
            apply(own, buffers, x)
        assert fingerprint(given) == before
    with pytest.raises(errors.MutationError, match=f"`{name}`"):
        over_tasks(lambda p, x: apply(p, buffers, x)[0], backend="loop")(params, member.inputs(2))
    assert fingerprint(given) == before


# ---------------------------------------------------------------- right or refused

detours = pytest.mark.parametrize("member", [pytest.param(member, id=name) for name, member in DETOURS.items()])


def of_module(member: Member, params: Any, buffers: Any, x: Tensor) -> list[Tensor]:
    """What an ordinary module gives, and its gradients."""
    module = ordinary(member, params, buffers, True)
    held = dict(module.named_parameters())
    wanted = [held[name] for name in params]
    value = total(module(x))
    return [value.detach(), *filled(torch.autograd.grad(value, wanted, allow_unused=True), wanted)]


@detours
def test_a_detour_is_right_or_refused_by_name(member: Member) -> None:
    """Whatever a module does to reach its weights or to keep its state: no wrong number, and no trace."""
    try:
        apply, params, buffers = stateless(member.make(), params="detach", buffers="detach")
    except errors.StatelessifyError:
        return
    for own in (params, perturbed(params), params):
        x, before = member.inputs(), [(p.requires_grad, p.grad) for p in own.values()]
        try:
            out, _ = apply(own, buffers, x)
            value = total(out)
            grads = torch.autograd.grad(value, list(own.values()), allow_unused=True)
            again, _ = apply(own, buffers, x)
        except errors.StatelessifyError:
            continue
        close([value, *filled(grads, own.values())], of_module(member, own, buffers, x))
        close(again, out)
        assert [(p.requires_grad, p.grad) for p in own.values()] == before


@detours
@pytest.mark.filterwarnings("ignore:torch.vmap cannot batch:UserWarning")
def test_a_detour_of_many_tasks_is_right_or_refused_by_name(member: Member) -> None:
    try:
        apply, params, buffers = stateless(member.make(), params="detach", buffers="detach")
        ensemble, xs = [perturbed(params) for _ in range(3)], member.inputs(3)
        stacked = tree_stack(ensemble)
        values = over_tasks(lambda p, x: total(apply(p, buffers, x)[0]), in_dims=0)(stacked, xs)
        grads = torch.autograd.grad(values.sum(), list(stacked.values()), allow_unused=True)
    except errors.StatelessifyError:
        return
    rows = [of_module(member, own, buffers, x) for own, x in zip(ensemble, xs, strict=True)]
    close([values, *filled(grads, stacked.values())], [torch.stack(entries) for entries in zip(*rows, strict=True)])


def test_each_member_is_made_the_same_each_time() -> None:
    for member in [m.values[0] for m in members().args[1]]:
        first, second = member.make(), member.make()
        if not member.lazy:
            assert_close(dict(first.state_dict()), dict(second.state_dict()), rtol=0, atol=0)
        assert isinstance(first, nn.Module)
