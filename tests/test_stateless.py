"""`stateless`: names, policies, moves, lazy modules, what it refuses; `load_`."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import Member, fingerprint, members, perturbed, tensors_in
from zoo_modules import MLP, EmptySlots, Frozen, Norms, Tied
from zoo_numerics import Complex

from statelessify import Stateless, errors, load_, stateless

pytestmark = pytest.mark.usefixtures("float64")

POLICIES = ["alias", "clone", "detach"]


# ---------------------------------------------------------------- the two dicts


@members(lambda m: not m.lazy)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_two_dicts_hold_every_tensor_once(member: Member, policy: Any) -> None:
    module = member.make()
    before = fingerprint(module)
    _, params, buffers = stateless(module, params=policy, buffers=policy)
    assert fingerprint(module) == before
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    others = frozen | dict(module.named_buffers())
    assert list(params) == list(trainable)
    assert list(buffers) == list(others)
    for name, new in {**params, **buffers}.items():
        old = {**trainable, **others}[name]
        assert new.requires_grad == old.requires_grad
        assert_close(new.detach(), old.detach(), rtol=0, atol=0)
        assert (new is old) is (policy == "alias")
        if policy != "alias":
            assert not isinstance(new, nn.Parameter)
            assert new.data_ptr() != old.data_ptr()
    assert type(stateless(module)) is Stateless
    assert (type(params), type(buffers)) == (dict, dict)


def test_training_the_aliases_trains_the_module() -> None:
    module = MLP()
    apply, params, buffers = stateless(module)
    x, before = torch.randn(4, 3), module(torch.ones(3)).detach()
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    tensors_in(apply(params, buffers, x)[0])[0].sum().backward()
    optimizer.step()
    assert not torch.allclose(module(torch.ones(3)), before)
    assert_close(apply(params, buffers, torch.ones(3))[0], module(torch.ones(3)))


def test_clones_stay_in_the_graph_of_the_module() -> None:
    module = Tied()
    apply, params, buffers = stateless(module, params="clone")
    apply(params, buffers, torch.ones(2, 3))[0].sum().backward()
    twin = copy.deepcopy(module)
    twin.zero_grad()
    twin(torch.ones(2, 3)).sum().backward()
    assert_close([p.grad for p in module.parameters()], [p.grad for p in twin.parameters()])


def test_detached_copies_are_new_leaves() -> None:
    module = MLP()
    apply, params, buffers = stateless(module, params="detach")
    apply(params, buffers, torch.ones(2, 3))[0].sum().backward()
    assert all(p.grad is not None for p in params.values())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("make", [Norms, Complex, Frozen])
def test_a_move_is_part_of_the_same_pass(make: Any) -> None:
    module = make()
    before = fingerprint(module)
    apply, params, buffers = stateless(module, params="detach", buffers="clone", dtype=torch.float32)
    real = {t.dtype for t in (*params.values(), *buffers.values())} - {torch.int64, torch.complex64}
    assert real <= {torch.float32}
    x = torch.randn(4, 3, 5, dtype=torch.float32) if make is Norms else torch.randn(4, 3, dtype=torch.float32)
    out, new_buffers = apply(params, buffers, x)
    assert out.dtype == torch.float32
    twin = make()  # `Module.float` would leave a complex parameter as it is
    load_(twin, {n: p.double() if not p.is_complex() else p for n, p in params.items()}, buffers)
    assert_close(out.double(), twin(x.double()), rtol=1e-4, atol=1e-4)
    assert {n: b.dtype for n, b in new_buffers.items()} == {n: b.dtype for n, b in buffers.items()}
    moved = stateless(module, params="detach", buffers="detach", device="meta")
    assert {t.device.type for t in (*moved.params.values(), *moved.buffers.values())} == {"meta"}
    assert fingerprint(module) == before


@pytest.mark.parametrize("options", [{"params": "clone"}, {"buffers": "clone"}, {}])
def test_alias_with_a_move_is_refused(options: Any) -> None:
    module = Norms()
    before = fingerprint(module)
    with pytest.raises(errors.PolicyError, match=r'"alias".*"clone"') as caught:
        stateless(module, dtype=torch.float32, **options)
    assert isinstance(caught.value, ValueError)
    assert fingerprint(module) == before


# ---------------------------------------------------------------- lazy modules


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.known = nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2)
        self.norm.eval()
        self.calls = 0
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x.mean() if self.cache is None else self.cache + 1
        return self.known(self.norm(self.linear(x))) * self.calls + self.cache


def test_a_lazy_module_is_given_its_shapes_by_one_call_of_a_copy() -> None:
    module = Lazy()
    before = fingerprint(module)
    apply, params, buffers = stateless(module, example_args=(torch.ones(2, 3),))
    assert fingerprint(module) == before
    assert params["linear.weight"].shape == (4, 3)
    assert params["known.weight"] is module.known.weight
    assert sorted(buffers) == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    x = torch.randn(5, 3)
    out, new_buffers = apply(params, buffers, x)
    hidden = x @ params["linear.weight"].T + params["linear.bias"]
    hidden = hidden / (1 + module.norm.eps) ** 0.5  # it was in evaluation mode, and stays so
    assert_close(out, module.known(hidden) + x.mean())  # nor is the example call one of its calls
    assert_close(new_buffers["cache"], x.mean())


def test_example_args_change_nothing_for_other_modules() -> None:
    module = MLP()
    assert stateless(module, example_args=(torch.ones(1, 3),)).params["0.weight"] is module[0].weight


# ---------------------------------------------------------------- what is refused


def scripted() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        return torch.jit.script(nn.Linear(2, 2))


def distributed() -> nn.Module:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (scripted, errors.ModuleError, ["ScriptModule"]),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), errors.ModuleError, ["DataParallel", "`.module`"]),
        (distributed, errors.ModuleError, ["DistributedDataParallel", "`.module`"]),
        (lambda: torch.compile(nn.Linear(2, 2), backend="eager"), errors.ModuleError, ["compiled", "`._orig_mod`"]),
        (lambda: nn.LazyLinear(2), errors.LazyModuleError, ["lazy", "example_args", "LazyLinear"]),
    ],
    ids=["script", "data parallel", "distributed", "compiled", "lazy"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside"])
@pytest.mark.parametrize("call", [stateless, load_])
def test_modules_without_a_pure_form_are_refused_by_name(
    make: Any, error: Any, words: list[str], inside: bool, call: Any
) -> None:
    module = make()
    with pytest.raises(error) as caught:
        call(nn.Sequential(nn.Tanh(), nn.ModuleDict({"part": module})) if inside else module)
    assert isinstance(caught.value, TypeError)
    assert error is not errors.LazyModuleError or isinstance(caught.value, ValueError)
    assert [word for word in [*words, "`1.part`" if inside else "`module`"] if word not in str(caught.value)] == []


class OptimizedModule(nn.Module):
    """Has the name of what `torch.compile` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Wrapper(nn.Module):
    """Holds its part under the name that `torch.compile` gives to one."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize("make", [OptimizedModule, Wrapper])
def test_modules_that_look_compiled_are_not_refused(make: Any) -> None:
    module, x = make(), torch.randn(4, 3)
    apply, params, buffers = stateless(module)
    assert_close(apply(params, buffers, x)[0], module(x))


@pytest.mark.parametrize("wrong", [nn.Linear, lambda x: x, {"weight": torch.ones(1)}, None])
@pytest.mark.parametrize("options", [{}, {"example_args": (torch.ones(1),)}])
def test_only_modules_are_modules(wrong: Any, options: Any) -> None:
    with pytest.raises(errors.ModuleError, match=r"not a torch\.nn\.Module"):
        stateless(wrong, **options)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3), torch.ones(2), 3.0, {"x": torch.ones(2, 3)}])
def test_example_args_are_a_tuple(wrong: Any) -> None:
    with pytest.raises(errors.StatelessifyError, match="example_args"):
        stateless(nn.LazyLinear(2), example_args=wrong)


# ---------------------------------------------------------------- load_


@members(lambda m: not m.lazy)
def test_load_undoes_stateless(member: Member) -> None:
    module, other = member.make(), member.make()
    apply, params, buffers = stateless(module)
    mine = perturbed(params)
    _, new_buffers = apply(mine, buffers, member.inputs(), **member.kwargs)
    before = {id(p) for p in other.parameters()}
    load_(other, mine, new_buffers)
    found = stateless(other)
    assert_close(found.params, mine)
    assert_close({n: b.detach() for n, b in found.buffers.items()}, {n: b.detach() for n, b in new_buffers.items()})
    assert {id(p) for p in other.parameters()} == before
    assert all(t.is_leaf and t.grad_fn is None for t in (*other.parameters(), *other.buffers()))


def test_load_leaves_what_is_none() -> None:
    module = Norms()
    _, params, buffers = stateless(module, params="detach", buffers="detach")
    load_(module, perturbed(params))
    assert_close(dict(module.named_buffers()), buffers)
    changed = {n: p.detach().clone() for n, p in module.named_parameters()}
    load_(module, buffers=perturbed(buffers))
    assert_close({n: p.detach() for n, p in module.named_parameters()}, changed)
    assert not torch.allclose(module.batch.running_mean, buffers["batch.running_mean"])
    load_(module)


def test_load_fills_empty_slots() -> None:
    module = EmptySlots()
    load_(module, buffers={"cache": torch.tensor(3.0)})
    assert module.cache.item() == 3.0
    assert [n for n, _ in module.named_buffers()] == ["cache"]


def test_load_may_exchange_the_modules_own_tensors() -> None:
    module = nn.Module()
    module.one, module.two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    load_(module, {"one": module.two, "two": module.one})
    assert (module.one.tolist(), module.two.tolist()) == ([1.0, 1.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda p, b: ({k: v for k, v in p.items() if k != "2.bias"}, b), errors.NamesError, ["`2.bias`"]),
        (lambda p, b: ({**p, "2.bais": p["2.bias"]}, b), errors.NamesError, ["did you mean `2.bias`"]),
        (lambda p, b: (p, {**b, "zz": torch.ones(1)}), errors.NamesError, ["`buffers`", "`zz`"]),
        (lambda p, b: (p, {"2.bias": p["2.bias"]}), errors.NamesError, ["both"]),
        (lambda p, b: ({**p, "2.bias": torch.ones(1)}, b), errors.ShapeError, ["2.bias", "(1,)", "(2,)"]),
        (lambda p, b: ({**p, "2.bias": None}, b), errors.DtypeError, ["2.bias", "NoneType"]),
        (lambda p, b: ({**p, "2.bias": 1.0}, b), errors.DtypeError, ["2.bias", "float"]),
        (lambda p, b: (list(p.values()), b), errors.DtypeError, ["`params`", "list"]),
    ],
)
def test_load_writes_nothing_where_something_is_wrong(change: Any, error: Any, words: list[str]) -> None:
    module = MLP()
    _, params, buffers = stateless(module, params="detach")
    before, given = fingerprint(module), change(perturbed(params), buffers)
    with pytest.raises(error) as caught:
        load_(module, *given)
    assert [word for word in words if word not in str(caught.value)] == []
    assert fingerprint(module) == before
