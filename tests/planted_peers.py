"""Defects of torch and of higher that raise no error, as a user meets them: code of one's own, given to a check."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from kit_properties import property_over
from torch import Tensor, nn

from statelessify.testing.checks import (
    check_grads,
    check_meta_grads,
    check_optimizer,
    check_over_tasks,
    check_stateless,
)
from statelessify.testing.strategies import inputs_for, modules, problems, tensors

PEERS: dict[str, str] = {}
"""Name of the property -> what is wrong."""


def peer(symptom: str, drawn: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    def register(holds: Callable[[Any, st.DataObject], None]) -> Callable[..., None]:
        PEERS[holds.__name__] = symptom
        return property_over({"any": drawn})(holds)

    return register


REGRESSIONS = problems(kind="regression", layers=("linear", "activation"), dtype=torch.float64, smooth=True)
POINTS = tensors((3, 4), dtype=torch.float64, min_value=-2, max_value=2)


def _task(problem: Any) -> tuple[Any, Any, Any, Any]:
    batches = (tuple(leaf[0] for leaf in batch) for batch in (problem.supports, problem.queries))
    return problem.loss, problem.params, *batches


PARAMS = st.builds(lambda w, b: {"w": w, "b": b}, POINTS, POINTS)


@peer("torch.optim.SGD(differentiable=True) detaches the first momentum buffer", PARAMS)
def torch_sgd(params: Any, data: st.DataObject) -> None:
    check_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, differentiable=True), params=params, entries=1)


@peer("torch.optim.Adam(differentiable=True) has a NaN meta-gradient where an inner gradient is zero", PARAMS)
def torch_adam(params: Any, data: st.DataObject) -> None:
    check_optimizer(lambda p: torch.optim.Adam(p, lr=0.1, eps=0.1, differentiable=True), params=params, entries=1)


@peer("torch differentiates vmap(grad(f)) through layer_norm wrongly", POINTS)
def torch_layer_norm(x: Tensor, data: st.DataObject) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (F.layer_norm(x * w, (4,), w, eps=0.1) ** 3).sum()

    def inner(w: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, x[:, None])

    check_grads(inner, torch.linspace(0.5, 1.5, 4, dtype=torch.float64), modes=("reverse",))


@peer("torch has a wrong third derivative of layer_norm", POINTS)
def torch_third_derivative(x: Tensor, data: st.DataObject) -> None:
    def slope(x: Tensor) -> Tensor:
        inner = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            value = (F.layer_norm(inner, (4,), eps=0.1) ** 3).sum()
            return torch.autograd.grad(value, inner, create_graph=True)[0]

    check_grads(slope, x, order=2, modes=("reverse",), entries=1)


@peer("torch.vmap looks at `padding_idx` for the first task only", st.lists(st.integers(0, 2), min_size=4, max_size=4))
def torch_padding(indices: list[int], data: st.DataObject) -> None:
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 3, 2)

    def embed(weight: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, weight, padding_idx=0)

    check_over_tasks(embed, weight, torch.tensor(indices).reshape(2, 2), in_dims=0, mapped=torch.vmap(embed))


@peer("functional_call writes into the buffers that it is given", modules(layers=("norm", "buffered"), training=True))
def torch_buffers(module: nn.Module, data: st.DataObject) -> None:
    def apply(params: Any, buffers: Any, *args: Any) -> Any:
        return torch.func.functional_call(module, (params, dict(buffers)), args), buffers

    check_stateless(module, *data.draw(inputs_for(module)), apply=apply)


class _Holder(nn.Module):
    """A loss as the forward of a module, as higher wants it."""

    def __init__(self, loss: Any, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.loss, self.names = loss, list(params)
        for index, p in enumerate(params.values()):
            self.register_parameter(f"p{index}", nn.Parameter(p.detach().clone()))

    def forward(self, batch: Any) -> Tensor:
        return self.loss({name: getattr(self, f"p{index}") for index, name in enumerate(self.names)}, batch)


@peer("higher with track_higher_grads=False gives no meta-gradient, in place of the first-order one", REGRESSIONS)
def higher_first_order(problem: Any, data: st.DataObject) -> None:
    import higher

    from statelessify import FirstOrder, optim

    loss, params, support, query = _task(problem)

    def grads(params: Any, support: Any, query: Any) -> Any:
        holder = _Holder(loss, params)
        sgd = torch.optim.SGD(holder.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with higher.innerloop_ctx(holder, sgd, copy_initial_weights=False, track_higher_grads=False) as (net, opt):
                opt.step(net(support))
                value = net(query)
        found = torch.autograd.grad(value, list(holder.parameters()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), found, strict=True)
        }

    check_meta_grads(
        loss, params, support, query, grads=grads, optimizer=optim.sgd(lr=0.1), steps=1, gradient=FirstOrder()
    )
