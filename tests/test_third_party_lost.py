"""Every way in which a third-party step may lose a derivative is refused: an error by name, never a number."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import (
    Foreign,
    Kind,
    adapted,
    by_autograd,
    inputs,
    loss,
    made,
    pure,
    real,
    refused_or_right,
    start,
    total,
    without_graph,
)
from problems import assert_close
from torch import Tensor, nn

from statelessify import FirstOrder, adapt, optim
from statelessify.errors import DerivativeError

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def scripted_detach(x: Tensor) -> Tensor:
        return x.detach()

    @torch.jit.script
    def scripted_scale_(x: Tensor, factor: Tensor) -> None:
        x.mul_(factor)


def under(context: Callable[[], Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any) -> Any:
        with context():
            return compute(*args)

    return inside


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_a_thread(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def elsewhere(x: Tensor) -> Tensor:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(compute, x).result()

    return elsewhere


def copied_into(x: Tensor, hidden: Callable[[Tensor], Tensor]) -> Tensor:
    new = torch.zeros_like(x)
    hidden(new).copy_(x)
    return new


def on_storage(x: Tensor) -> Tensor:
    return torch.empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride()).clone()


# The same values without their derivative --------------------------------------------------------------------------

LOSES: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "tolist": lambda x: torch.tensor(x.tolist()),
    "item": lambda x: torch.tensor([each.item() for each in x.reshape(-1)]).view_as(x),
    "float": lambda x: torch.tensor([float(each) for each in x.reshape(-1)]).view_as(x),
    "math": lambda x: torch.tensor([math.copysign(each, each) for each in x.reshape(-1)]).view_as(x),
    "no_grad": under(torch.no_grad, lambda x: x * 1),
    "no_grad, a view": under(torch.no_grad, lambda x: x.view_as(x).clone()),
    "inference_mode": lambda x: under(torch.inference_mode, lambda x: x * 1)(x).clone(),
    "set_grad_enabled": under(lambda: torch.set_grad_enabled(False), torch.clone),
    "no_grad, foreach": under(torch.no_grad, lambda x: torch._foreach_mul([x], 1.0)[0]),
    "no_grad, out=": under(torch.no_grad, lambda x: torch.mul(x, 1, out=torch.empty_like(x))),
    "no_grad, into a new one": under(torch.no_grad, lambda x: torch.zeros_like(x).add_(x)),
    "torch.tensor": lambda x: torch.tensor(x),
    "torch.tensor of a list": lambda x: torch.tensor(list(x.reshape(-1))).view_as(x),
    "torch.tensor, requires_grad": lambda x: torch.tensor(x, requires_grad=True),
    "asarray": lambda x: torch.asarray(x, requires_grad=False, copy=True),
    "new_tensor": lambda x: x.new_tensor(x),
    "new_tensor of a list": lambda x: x.new_tensor(list(x.reshape(-1))).view_as(x),
    "type as a constructor": lambda x: torch.DoubleTensor(list(x.reshape(-1))).view_as(x),
    "Parameter": lambda x: nn.Parameter(x).clone(),
    "Parameter without gradient": lambda x: nn.Parameter(x, requires_grad=False).clone(),
    "copy.copy": lambda x: copy.copy(x).clone(),
    "numpy": lambda x: torch.from_numpy(x.numpy(force=True).copy()),
    "bits": lambda x: x.view(torch.int64).view(torch.float64),
    "into data of a new one": lambda x: copied_into(x, lambda new: new.data),
    "into a detached new one": lambda x: copied_into(x, lambda new: new.detach()),
    "a script": scripted_detach,
}
FAR_FETCHED: dict[str, Callable[[Tensor], Any]] = {  # past all that torch shows to Python
    "storage": on_storage,
    "dlpack": lambda x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)).clone(),
    "save and load": saved,
    "a thread": in_a_thread(torch.Tensor.detach),
    "words": lambda x: torch.tensor([float(f"{each:.17g}") for each in x.reshape(-1)]).view_as(x),
    "without torch functions": under(torch._C.DisableTorchFunction, torch.Tensor.detach),
}


def of_gradient(lose: Callable[[Tensor], Tensor]) -> Kind:
    return made(lambda p, g, group, state: p.sub_(group["lr"] * (0.5 * g + 0.5 * lose(g) + group["wd"] * p)))


def of_parameter(lose: Callable[[Tensor], Tensor]) -> Kind:
    return made(lambda p, g, group, state: p.sub_(group["lr"] * (g + group["wd"] * lose(p))))


def of_hyperparameter(lose: Callable[[Tensor], Tensor]) -> Kind:
    return made(lambda p, g, group, state: p.sub_(group["lr"] * (g + lose(torch.as_tensor(group["wd"])) * p)))


def of_state(lose: Callable[[Tensor], Tensor]) -> Kind:
    def one(p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        state["m"] = g + (0.9 * lose(state["m"]) if "m" in state else 0)
        p.sub_(group["lr"] * state["m"])

    return made(one)


@pytest.mark.parametrize("way", [*LOSES, *FAR_FETCHED])
def test_a_value_without_its_derivative(way: str) -> None:
    lose = {**LOSES, **FAR_FETCHED}[way]
    for place in (of_gradient, of_parameter, of_hyperparameter, of_state):
        kind = place(lose)
        assert_close(pure(kind, 3), real(kind, 3), 1e-12)
        refused_or_right(partial(by_autograd, kind), kind)


@pytest.mark.parametrize("way", ["detach", "data", "item", "no_grad"])
def test_the_error_says_where_and_what_to_do(way: str) -> None:
    with pytest.raises(
        DerivativeError,
        match=r"the step of Made cuts the graph \(`.*` at test_third_party_lost.py:\d+\).*rule of `statelessify.optim`",
    ):
        adapted(of_gradient(LOSES[way]))(*inputs())


# In place ----------------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {  # the first times the second
    "no_grad": under(torch.no_grad, lambda p, f: p.mul_(f)),
    "no_grad, operator": under(torch.no_grad, lambda p, f: p.__imul__(f)),
    "no_grad, copy_": under(torch.no_grad, lambda p, f: p.copy_(p * f)),
    "no_grad, item": under(torch.no_grad, lambda p, f: p.__setitem__(..., p * f)),
    "no_grad, out=": under(torch.no_grad, lambda p, f: torch.mul(p, f, out=p)),
    "no_grad, foreach": under(torch.no_grad, lambda p, f: torch._foreach_mul_([p], [f])),
    "no_grad, set_": lambda p, f: under(torch.no_grad, lambda new: p.set_(new))(p * f),
    "no_grad, an overload": under(torch.no_grad, lambda p, f: torch.ops.aten.mul_.Tensor(p, f)),
    "no_grad, a script": under(torch.no_grad, scripted_scale_),
    "inference_mode": under(torch.inference_mode, lambda p, f: p.mul_(f)),
    "data": lambda p, f: p.data.mul_(f.data),
    "data of one": lambda p, f: p.data.mul_(f),
    "setting data": lambda p, f: setattr(p, "data", p * f),
    "setting detached data": lambda p, f: setattr(p, "data", p.detach() * f.detach()),
    "detach": lambda p, f: p.detach().mul_(f),
    "vector_to_parameters": lambda p, f: nn.utils.vector_to_parameters(p.reshape(-1) * f, [p]),
    "numpy": lambda p, f: p.numpy(force=True).__imul__(f.numpy(force=True)),
    "storage": lambda p, f: p.untyped_storage().copy_((p * f).untyped_storage()),
    "a thread": lambda p, f: in_a_thread(under(torch.no_grad, lambda p: p.mul_(f)))(p),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_without_its_derivative(write: Any) -> None:
    def one(p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        write(p, torch.as_tensor(1 - group["lr"] * group["wd"]))
        p.sub_(group["lr"] * g)

    assert_close(pure(made(one), 3), real(made(one), 3), 1e-14)
    refused_or_right(partial(by_autograd, made(one)), made(one))


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "relu in place": under(torch.no_grad, lambda p, g: F.relu(p, inplace=True)),
    "hardtanh in place": under(torch.no_grad, lambda p, g: F.hardtanh(p, -0.5, 0.5, inplace=True)),
    "renewed": lambda p, g: nn.init.constant_(p, 0.3),
    "clip_grad_norm_": lambda p, g: nn.utils.clip_grad_norm_([p], 0.1),
    "clip_grad_value_": lambda p, g: nn.utils.clip_grad_value_([p], 0.1),
    "fused": lambda p, g: torch._fused_sgd_(
        *([p], [g], []),
        **{"weight_decay": 0.1, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False},
        is_first_step=True,
    ),
    "zero_": under(torch.no_grad, lambda p, g: p.zero_()),
    "normal_": under(torch.no_grad, lambda p, g: p.normal_(generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_another_write(write: Any) -> None:
    def one(p: Tensor, g: Tensor, group: Any, state: Any) -> None:
        p.sub_(0.5 * group["lr"] * g)
        write(p, p.grad)
        p.sub_(group["lr"] * p.grad)

    assert_close(pure(made(one), 3), real(made(one), 3), 1e-14)
    refused_or_right(partial(by_autograd, made(one)), made(one))


# Only some derivative is asked for, or lost ------------------------------------------------------------------------


@pytest.mark.parametrize("asked", range(5), ids=["z", "a", "target", "lr", "wd"])
def test_a_single_derivative_that_is_asked_for(asked: int) -> None:
    given = [value if index == asked else value.detach() for index, value in enumerate(inputs())]
    with pytest.raises(DerivativeError):
        adapted(without_graph(Foreign))(*given)
    for kind in (of_gradient(LOSES["detach"]), of_parameter(LOSES["item"])):
        with pytest.raises(DerivativeError):
            adapted(kind)(*given)


@pytest.mark.parametrize("attribute", [False, True])
def test_a_derivative_that_only_the_state_carries(attribute: bool) -> None:
    class Remembers(Foreign):
        def set_up(self) -> None:
            self.kept: dict[str, Tensor] = {}

        def keep(self, p: Tensor) -> Any:
            return self.kept if attribute else self.state[p]

        def one(self, p: Tensor, g: Tensor, group: Any, state: Any) -> None:
            kept = self.keep(p)
            kept["m"] = g + (0.9 * self.seen(kept["m"]) if "m" in kept else 0)
            p.sub_(group["lr"] * kept["m"])

        def seen(self, m: Tensor) -> Tensor:
            return m

    class Forgets(Remembers):
        def seen(self, m: Tensor) -> Tensor:
            return m.detach()

    plain, g = {"w": torch.ones(2)}, torch.ones(2, requires_grad=True)
    right, wrong = optim.from_torch(Remembers), optim.from_torch(Forgets)
    _, state = right.step(plain, {"w": g}, right.init(plain))
    new, _ = right.step(plain, plain, state)
    assert_close(torch.autograd.grad(new["w"].sum(), g)[0], torch.full((2,), -0.09), 1e-12)
    state = state._replace(hyperparameters=wrong.init(plain).hyperparameters)
    with pytest.raises(DerivativeError):
        wrong.step(plain, plain, state)


def test_a_derivative_lost_for_one_parameter_of_several() -> None:
    class Partly(Foreign):
        def step(self, closure: Any = None) -> None:
            first, second = self.param_groups[0]["params"]
            first.sub_(0.1 * first.grad)
            with torch.no_grad():
                second.sub_(0.1 * second.grad)

    assert_close(pure(Partly, 3), real(Partly, 3), 1e-14)
    refused_or_right(partial(by_autograd, Partly), Partly)


# Under transforms --------------------------------------------------------------------------------------------------


def all_of(way: str) -> Kind:
    if way in LOSES:
        return of_parameter(LOSES[way])
    return made(lambda p, g, group, state: (WRITES[way](p, group["wd"] * torch.ones(())), p.sub_(0.1 * g)))


@pytest.mark.parametrize("way", [*LOSES, *WRITES])
def test_under_torch_func_grad_it_is_never_a_wrong_number(way: str) -> None:
    """Nor where the tensors below the transform require a gradient themselves, as those of a module do."""
    meta = torch.func.grad(total(all_of(way)), tuple(range(5)))
    for given in ([value.detach() for value in inputs()], inputs()):
        refused_or_right(partial(meta, *given), all_of(way), (RuntimeError, TypeError))


@pytest.mark.parametrize("way", [*LOSES, *WRITES])
def test_under_vmap_it_is_never_a_wrong_number(way: str) -> None:
    given = inputs()

    def compute() -> Any:
        mapped = torch.vmap(total(all_of(way)), (None, None, 0, None, None))
        both = mapped(*given[:2], torch.stack([given[2]] * 2), *given[3:])
        return torch.autograd.grad(both.mean(), given, allow_unused=True, materialize_grads=True)

    refused_or_right(compute, all_of(way), (RuntimeError, TypeError))


def test_first_order_asks_for_less() -> None:
    """Without a gradient on the parameters nothing is asked for, and a step that records nothing is right."""
    optimizer = optim.from_torch(without_graph(Foreign))
    found = adapt(loss, start(), torch.tensor([0.5, 2.0]), optimizer=optimizer, steps=3, gradient=FirstOrder())
    assert_close(found.params, real(Foreign, 3), 1e-14)
    params = {name: value.requires_grad_() for name, value in start().items()}
    with pytest.raises(DerivativeError):
        adapt(loss, params, torch.tensor([0.5, 2.0]), optimizer=optimizer, steps=3, gradient=FirstOrder())
