"""The rules of attention: every derivative, many tasks, and still the fast kernel where it is enough."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import (
    Call,
    Kernels,
    Make,
    check_as_torch,
    check_second_order,
    check_tasks,
    close,
    flags,
    gradients,
    ruled,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

MATH = SDPBackend.MATH
attention = F.scaled_dot_product_attention
MASKS = ["none", "bool", "shared bool", "nothing in a row", "float", "minus infinity", "shared float"]


class Case(NamedTuple):
    call: Call
    make: Make


@st.composite
def attentions(draw: st.DrawFn) -> Case:
    dims, kind = draw(st.integers(2, 4)), draw(st.sampled_from(MASKS))
    long, wide, width, width_out = (draw(st.integers(1, 4)) for _ in range(4))
    grouped = dims == 4 and draw(st.booleans())
    heads, own_heads = (4, draw(st.sampled_from([1, 2]))) if grouped else (2, 2)
    front, own_front = {2: ((), ()), 3: ((2,), (2,)), 4: ((2, heads), (2, own_heads))}[dims]
    strided = draw(st.booleans())
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3])), "enable_gqa": grouped}
    options["is_causal"] = kind == "none" and draw(st.booleans())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if strided else torch.randn(shape)

    def make() -> tuple[Tensor, ...]:
        inputs = (normal(*front, long, width), normal(*own_front, wide, width), normal(*own_front, wide, width_out))
        mask = torch.rand((1, wide) if "shared" in kind else (long, wide)) > 0.4
        mask[..., 0] = True
        if kind == "nothing in a row":
            mask[0] = False
        if kind == "minus infinity":
            return *inputs, torch.where(mask, 0.0, -math.inf)
        return *inputs, torch.randn(mask.shape) if "float" in kind else mask

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, None if kind == "none" else mask, **options)

    return Case(call, make)


@given(attentions(), flags(4))
def test_attention(case: Case, mapped: list[bool]) -> None:
    args = case.make()
    check_as_torch(case.call, args)
    check_tasks(case.call, case.make, mapped)
    close(gradients(ruled(case.call, "always"), args), gradients(case.call, args), 0.0)  # the same kernel


@given(attentions())
def test_second_order(case: Case) -> None:
    """By `torch.func` against differences, and by `create_graph=True` against torch's kernel that has it."""
    args = case.make()
    if any(a.is_floating_point() and a.isinf().any() for a in args):
        return
    check_second_order(case.call, args)
    both = []
    for call, kernel in ((ruled(case.call, "always"), contextlib.nullcontext()), (case.call, sdpa_kernel(MATH))):
        leaves = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
        with kernel:
            _, *first = gradients_of(call, leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        total = sum((g.sin().sum() for g in first), torch.zeros(()))
        both.append([*first, *torch.autograd.grad(total, wanted, materialize_grads=True, allow_unused=True)])
    close(both[0], both[1])


def gradients_of(call: Call, leaves: list[Tensor]) -> list[Tensor]:
    out = call(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    slopes = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True, allow_unused=True, materialize_grads=True)
    return [out, *slopes]


RELATED = {
    "one for all": lambda x: (x, x, x, None),
    "key from query": lambda x: (x, x @ MATRIX, x.sin(), None),
    "value from key": lambda x: (lambda k: (x, k, k @ MATRIX, None))(x @ MATRIX),
    "mask from query": lambda x: (x.sin(), x, x, x.sum(-1, keepdim=True)),
}
MATRIX = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)


@pytest.mark.parametrize("name", RELATED)
@pytest.mark.parametrize("when", ["always", "transforms"])
def test_arguments_that_depend_on_each_other(name: str, when: Any) -> None:
    """Each argument's slope is by itself alone, whatever else it is made of, or stands for."""
    call = lambda x: attention(*RELATED[name](x))
    x = torch.randn(2, 3, 4)
    plain = gradients(call, [x])
    close(gradients(ruled(call, when), [x]), plain)
    close(gradients(ruled(call, when), [x], create_graph=True), plain)
    point = x.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(ruled(call, when), point)


def test_third_order() -> None:
    inputs = tuple(torch.randn(1, 1, 2, 2, requires_grad=True) for _ in range(3))

    def second(*inputs: Tensor) -> Any:
        _, *first = gradients_of(ruled(attention, "always"), list(inputs))
        return torch.autograd.grad(sum((g**2).sum() for g in first), inputs, create_graph=True)

    assert torch.autograd.gradcheck(second, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "float32"])
def test_low_precision(dtype: torch.dtype, kind: str) -> None:
    inputs = [torch.randn(2, 2, 5, 8).to(dtype).requires_grad_() for _ in range(3)]
    mask = {"none": None, "bool": torch.rand(5, 5) > 0.3, "float": torch.randn(5, 5).to(dtype)}.get(kind)
    if kind == "float32":
        mask = torch.randn(5, 5, dtype=torch.float32)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5}[dtype]
    call = lambda *inputs: attention(*inputs, mask)
    plain = gradients(call, inputs)
    for when, again in (("always", False), ("always", True), ("transforms", False)):
        close(gradients(ruled(call, when), inputs, create_graph=again), plain, tolerance)  # and of one dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    inputs = [torch.randn(2, 2, 5, 8, dtype=torch.float32) for _ in range(3)]

    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return attention(*inputs)

    plain = gradients(call, inputs)
    close(gradients(ruled(call, "always"), inputs), plain, 0.0)
    close(gradients(ruled(call, "always"), inputs, create_graph=True), plain, 2e-2)


def test_dropout_draws_what_torch_draws() -> None:
    inputs = [torch.randn(2, 2, 5, 4) for _ in range(3)]

    def call(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(*inputs, dropout_p=0.4)

    close(gradients(ruled(call, "always"), inputs), gradients(call, inputs))
    check_second_order(call, inputs)


# ---------------------------------------------------------------- as a citizen of autograd


FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


def test_first_order_runs_the_fused_kernels() -> None:
    inputs = [torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3)]
    for again in (False, True):
        with Kernels() as forward:
            out = ruled(attention, "always")(*inputs)
        with Kernels() as backward:
            torch.autograd.grad(out.sum(), inputs, create_graph=again)
        assert forward.names.count(FORWARD) == 1
        assert backward.names.count(FORWARD) == 0
        assert backward.names.count(FORWARD + "_backward") == (0 if again else 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_nothing_is_to_be(mode: Any) -> None:
    inputs = [torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3)]
    with mode():
        out = ruled(attention, "always")(*inputs)
        assert torch.equal(out, attention(*inputs))
    assert not out.requires_grad
    for index in range(3):  # some inputs only
        some = [t.detach().requires_grad_(i == index) for i, t in enumerate(inputs)]
        both = [torch.autograd.grad(call(*some).sum(), some[index]) for call in (ruled(attention, "always"), attention)]
        close(both[0], both[1], 0.0)
    assert not ruled(attention, "always")(*(t.detach() for t in inputs)).requires_grad


def test_backward_several_times_with_hooks_and_batches() -> None:
    inputs = [torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3)]
    out, plain = ruled(attention, "always")(*inputs), attention(*inputs)
    seen: list[Tensor] = []
    inputs[0].register_hook(seen.append)
    first, again = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    close(first, again, 0.0)
    close(seen, [first[0]] * 2, 0.0)
    cotangents = torch.randn(3, *out.shape)
    many = lambda out, **kw: torch.autograd.grad(
        out, inputs, cotangents, is_grads_batched=True, retain_graph=True, **kw
    )
    rows = [torch.autograd.grad(plain, inputs, each, retain_graph=True) for each in cotangents]
    expected = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    close(many(out), expected)
    close(many(out, create_graph=True), expected)


def test_saved_tensors_on_their_way_to_elsewhere() -> None:
    inputs = [torch.randn(2, 2, 3, 4) for _ in range(3)]

    def call(*inputs: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return ruled(attention, "always")(*inputs)

    for again in (False, True):
        close(gradients(call, inputs, create_graph=again), gradients(attention, inputs))


@pytest.mark.parametrize("what", ["input", "output"])
def test_writing_in_place_is_noticed(what: str) -> None:
    inputs = [torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3)]
    for again in (False, True):
        query = inputs[0] * 1
        out = ruled(attention, "always")(query, *inputs[1:])
        total = (out * 1).sum()
        with torch.no_grad() if what == "input" else contextlib.nullcontext():
            (query if what == "input" else out).mul_(2)
        if what == "output" and again:  # then nothing reads the output
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total if what == "input" else out.sum(), inputs, create_graph=again)


def test_backward_in_another_thread() -> None:
    inputs = [torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3)]
    out, found = ruled(attention, "always")(*inputs), []
    run = lambda: found.append(torch.autograd.grad(out.sum(), inputs, create_graph=True))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    close(found[0], torch.autograd.grad(attention(*inputs).sum(), inputs))


class Marked(Tensor):
    pass


def test_tensors_of_another_kind_are_left_to_torch() -> None:
    inputs = [torch.randn(2, 2, 3, 4).as_subclass(Marked) for _ in range(3)]
    assert type(ruled(attention, "always")(*inputs)) is Marked
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)], layout=torch.jagged)
    assert ruled(attention, "always")(*[nested.transpose(1, 2)] * 3).is_nested
