"""One property for each check of the kit, over whatever its strategies draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kit_interim import inputs_for, modules
from torch import Tensor, nn

from statelessify import implicit
from statelessify import stateless as make_stateless
from statelessify.testing import check_grads, check_stateless

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
@given(st.one_of(calls()))
def module_grads(drawn: tuple[nn.Module, Tensor]) -> None:
    module, x = drawn
    apply, params, buffers = make_stateless(module, params="detach")
    check_grads(
        lambda tree: apply(tree["params"], buffers, tree["x"])[0],
        {"params": params, "x": x},
        order=2,
        modes=("reverse",),
        entries=1,
    )


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
