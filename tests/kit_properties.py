"""One property for each check of the kit, over whatever its strategies draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from statelessify import Implicit, adapt, adapt_tasks, implicit, optim
from statelessify import stateless as make_stateless
from statelessify.testing.checks import check_grads, check_meta_grads, check_modes, check_over_tasks, check_stateless
from statelessify.testing.strategies import inputs_for, modules, optimizers, problems

PROPERTIES: dict[str, Callable[[], None]] = {}


def property_of(test: Callable[[], None]) -> Callable[[], None]:
    PROPERTIES[test.__name__] = test
    return test


# Functions that are called by name ---------------------------------------------------------------------------------


def _positive(x: Tensor) -> Tensor:
    return F.softplus(x) + 0.1


FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    F.scaled_dot_product_attention,
    partial(F.scaled_dot_product_attention, is_causal=True),
    lambda a, b, c: F.gaussian_nll_loss(a, b, _positive(c)),
    lambda a, b, c: F.layer_norm(a, a.shape[-1:], b[0, 0], c[0, 0], eps=0.1),
    lambda a, b, c: F.batch_norm(a[0], None, None, b[0, 0], c[0, 0], training=True, eps=0.1),
    lambda a, b, c: F.instance_norm(a, eps=0.1) * b + c,
    lambda a, b, c: F.normalize(a, dim=-1) * F.cosine_similarity(b, c, dim=-1)[..., None],
    lambda a, b, c: F.cross_entropy(a, b.softmax(-1)) + F.mse_loss(b, c),
    lambda a, b, c: (
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum") * F.binary_cross_entropy_with_logits(c, c.sigmoid())
    ),
    lambda a, b, c: F.linear(a, b[0], c[0, :, 0]),
    lambda a, b, c: torch.baddbmm(a, b.mT @ b if b.shape[1] == a.shape[1] else a, c),
)
"""Of three tensors ``(batch, length, width)`` with batch = length = width, whose gradients must not be mixed up."""


class Calls(nn.Module):
    """Calls a function of three tensors: each is the input, a parameter, a buffer, or depends on another one."""

    held: Tensor

    def __init__(self, function: Callable[..., Tensor], sources: Sequence[str], size: int) -> None:
        super().__init__()
        self.function, self.sources = function, tuple(sources)
        self.weight = nn.Parameter(torch.zeros(size, size, size))
        self.other = nn.Parameter(torch.zeros(size, size))
        self.register_buffer("held", torch.zeros(size, size, size))

    def forward(self, x: Tensor) -> Tensor:
        known = {"input": x, "weight": self.weight, "held": self.held}
        arguments: list[Tensor] = []
        for source in self.sources:
            arguments.append(known[source] if source in known else torch.tanh(arguments[-1] @ self.other))
        return self.function(*arguments)


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A module that calls a function by name, and its input."""
    size = draw(st.integers(2, 3))
    first = draw(st.sampled_from(["input", "weight", "held"]))
    rest = draw(st.lists(st.sampled_from(["input", "weight", "held", "the one before"]), min_size=2, max_size=2))
    module = Calls(draw(st.sampled_from(FUNCTIONS)), [first, *rest], size).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(size, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return module, x


# Properties ----------------------------------------------------------------------------------------------------------


@property_of
@given(modules(), st.data())
def stateless(module: nn.Module, data: st.DataObject) -> None:
    check_stateless(module, *data.draw(inputs_for(module)))


@property_of
@given(calls())
def module_grads(drawn: tuple[nn.Module, Tensor]) -> None:
    module, x = drawn
    apply, params, buffers = make_stateless(module, params="detach")

    def call(tree: dict[str, Any]) -> Any:
        return apply(tree["params"], buffers, tree["x"])[0]

    check_grads(call, {"params": params, "x": x}, order=2, modes=("reverse",), entries=1)


@st.composite
def many_tasks(draw: st.DrawFn) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A module and its inputs for each of some tasks."""
    if draw(st.booleans()):
        module, x = draw(calls())
        return module, [(x * scale,) for scale in draw(_SCALES)]
    module = draw(modules())
    one = draw(inputs_for(module))
    batch = one[0].shape[0]
    return module, [one, *(draw(inputs_for(module, batch=batch)) for _ in range(draw(st.integers(0, 2))))]


_SCALES = st.lists(st.sampled_from([1.0, -0.5, 2.0]), min_size=1, max_size=3)


def _varied(tree: dict[str, Tensor], tasks: int) -> dict[str, Tensor]:
    """Values for each task, the first ones as given."""
    factors = 1 + 0.25 * torch.arange(tasks)
    return {name: torch.stack([(value * factor).to(value.dtype) for factor in factors]) for name, value in tree.items()}


@property_of
@given(many_tasks(), st.booleans(), st.booleans(), st.sampled_from(["different", "same"]), st.data())
def over_tasks(
    drawn: tuple[nn.Module, list[tuple[Tensor, ...]]],
    own_params: bool,
    own_buffers: bool,
    randomness: Any,
    data: st.DataObject,
) -> None:
    module, rows = drawn
    apply, params, buffers = make_stateless(module, params="detach", buffers="detach")
    tasks = len(rows)
    params, buffers = (
        _varied(tree, tasks) if own else dict(tree) for tree, own in ((params, own_params), (buffers, own_buffers))
    )
    inputs: list[Tensor] = []
    dims: list[int] = []
    for column in zip(*rows, strict=True):
        dims.append(data.draw(st.integers(-column[0].ndim - 1, column[0].ndim)))
        inputs.append(torch.stack(column, dims[-1]))
    in_dims = (0 if own_params and params else None, 0 if own_buffers and buffers else None, *dims)
    check_over_tasks(apply, params, buffers, *inputs, in_dims=in_dims, randomness=randomness)


# Inner loops ---------------------------------------------------------------------------------------------------------

_TRANSFORMS = st.sampled_from([None, None, optim.clip_by_global_norm(0.5), optim.normalize(0.1)])


def _of_task(batch: Any, task: int) -> Any:
    return tuple(leaf[task] for leaf in batch)


@property_of
@given(problems(dtype=torch.float64, smooth=True, max_tasks=3), st.integers(0, 3), _TRANSFORMS, st.data())
def adapt_many(problem: Any, steps: int, transform: Any, data: st.DataObject) -> None:
    loss, params, supports, _, _ = problem
    optimizer = data.draw(optimizers(smooth=True, params=params))
    options: Any = {"optimizer": optimizer, "steps": steps, "grad_transform": transform}

    def one(params: Any, batch: Any) -> Any:
        adapted = adapt(loss, params, batch, **options)
        return adapted.params, adapted.losses, adapted.opt_state.slots

    def many(params: Any, batches: Any) -> Any:
        adapted = adapt_tasks(loss, params, batches, chunk_size=chunk_size, **options)
        return adapted.params, adapted.losses, adapted.opt_state.slots

    chunk_size = data.draw(st.sampled_from([None, 1, 2]))
    mapped = data.draw(st.sampled_from([many, None]))
    check_over_tasks(one, params, supports, mapped=mapped)


@property_of
@given(problems(dtype=torch.float64, smooth=True, max_tasks=1), st.integers(1, 3), _TRANSFORMS, st.data())
def meta_grads(problem: Any, steps: int, transform: Any, data: st.DataObject) -> None:
    loss, params, supports, queries, _ = problem
    optimizer = data.draw(optimizers(smooth=True, params=params))
    order = data.draw(st.sampled_from([1, 1, 2]))
    options: Any = {"optimizer": optimizer, "steps": steps}
    if transform is not None:

        def clipped(params: Any, support: Any) -> Any:
            return adapt(loss, params, support, grad_transform=transform, **options).params

        check_meta_grads(
            loss, params, _of_task(supports, 0), _of_task(queries, 0), adapt=clipped, order=order, entries=1
        )
        return
    check_meta_grads(loss, params, _of_task(supports, 0), _of_task(queries, 0), order=order, entries=1, **options)


@property_of
@given(problems(dtype=torch.float64, smooth=True, max_tasks=1), st.integers(1, 3), st.booleans(), st.data())
def modes(problem: Any, steps: int, settled: bool, data: st.DataObject) -> None:
    loss, params, supports, queries, _ = problem
    learned = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    anchor = {name: (value + 0.1).requires_grad_() for name, value in params.items()}

    def closing(params: Any, batch: Any) -> Tensor:
        apart = torch.stack([(value - anchor[name]).square().sum() for name, value in params.items()]).sum()
        return loss(params, batch) + learned.exp() * apart

    chosen = data.draw(st.sampled_from([loss, closing]))
    if settled:
        optimizer: Any = optim.sgd(lr=0.1)
        kinds: Any = [Implicit(solve=implicit.dense)]
    else:
        optimizer, kinds = data.draw(optimizers(smooth=True, params=params)), None
    check_modes(
        closing if settled else chosen,
        params,
        _of_task(supports, 0),
        _of_task(queries, 0),
        optimizer=optimizer,
        steps=steps,
        modes=kinds,
        tasks=2,
    )


# Solves --------------------------------------------------------------------------------------------------------------


def _matrix(theta: Tensor) -> Tensor:
    """A symmetric matrix with eigenvalues between 0.6 and 1.4, for which all solves converge."""
    bounded = torch.tanh(theta)
    return torch.eye(len(theta), dtype=theta.dtype) + 0.2 * (bounded + bounded.T) / len(theta)


@property_of
@given(st.data())
def solves(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b = {f"b{index}": numbers(size) for index, size in enumerate(sizes)}
    tree: dict[str, Any] = {"b": b, "theta": numbers(sum(sizes), sum(sizes))}
    if data.draw(st.booleans()):
        tree["ridge"] = numbers().square() / 4
    solve = data.draw(st.sampled_from([implicit.cg, implicit.neumann, implicit.dense]))
    fixed_point = "ridge" not in tree and data.draw(st.booleans())

    def times(theta: Tensor, x: dict[str, Tensor]) -> dict[str, Tensor]:
        product = _matrix(theta) @ torch.cat(list(x.values()))
        return dict(zip(x, product.split(sizes), strict=True))

    def solved(tree: dict[str, Any]) -> Any:
        matvec, options = partial(times, tree["theta"]), {name: tree[name] for name in ("ridge",) if name in tree}
        return solve(matvec, tree["b"], **options)

    def optimality(x: dict[str, Tensor], theta: Tensor, b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p + 0.1 * p.sin() - b[name] for name, p in times(theta, x).items()}

    def root(tree: dict[str, Any]) -> Any:
        @implicit.custom_root(optimality, solve=implicit.dense)
        def find(x: Any, theta: Tensor, b: Any) -> Any:
            for _ in range(60):
                x = {name: x[name] - moved for name, moved in optimality(x, theta, b).items()}
            return x

        return find(tree["b"], tree["theta"], tree["b"])

    check_grads(root if fixed_point else solved, tree, order=2, modes=("reverse",), entries=1)
