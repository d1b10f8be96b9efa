"""One property for each check of the kit, over whatever its strategies draw.

A property has strata, each with its share of the examples: hypothesis draws many that are much alike, and of 100
modules from all families few have a batch norm in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from optim_naive import SPECS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from statelessify import Implicit, Unroll, adapt, adapt_tasks, implicit, optim
from statelessify import stateless as make_stateless
from statelessify.errors import ConvergenceError
from statelessify.testing.checks import (
    assert_trees_close,
    check_grads,
    check_meta_grads,
    check_modes,
    check_optimizer,
    check_over_tasks,
    check_stateless,
)
from statelessify.testing.strategies import inputs_for, modules, optimizers, problems

Strata = Mapping[str, st.SearchStrategy[Any]]

PROPERTIES: dict[str, dict[str, Callable[[], None]]] = {}
"""Name of a property -> its strata, each a test without arguments."""


SHARES: dict[str, int] = {}
"""How many strata share the examples of a property: fewer than there are, where an example is cheap."""


def property_over(
    strata: Strata, shares: int | None = None
) -> Callable[[Callable[[Any, st.DataObject], None]], Callable[..., None]]:
    """Register a property ``holds(drawn, data)`` under its name, for each stratum."""

    def register(holds: Callable[[Any, st.DataObject], None]) -> Callable[..., None]:
        PROPERTIES[holds.__name__] = {name: given(drawn, st.data())(holds) for name, drawn in strata.items()}
        SHARES[holds.__name__] = shares or len(strata)
        return holds

    return register


def run(name: str, stratum: str, examples: int, *, seed: int | None = None, **options: Any) -> int:
    """Try a stratum's share of the examples of a property; how many it is."""
    strata = PROPERTIES[name]
    share = -(-examples // SHARES[name])
    test = settings(max_examples=share, deadline=None, suppress_health_check=list(HealthCheck), **options)(
        strata[stratum]
    )
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    test()
    return share


# Functions that are called by name ---------------------------------------------------------------------------------


def _positive(x: Tensor) -> Tensor:
    return F.softplus(x) + 0.1


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "attention": F.scaled_dot_product_attention,
    "causal attention": partial(F.scaled_dot_product_attention, is_causal=True),
    "gaussian_nll_loss": lambda a, b, c: F.gaussian_nll_loss(a, b, _positive(c)),
    "layer_norm": lambda a, b, c: F.layer_norm(a, a.shape[-1:], b[0, 0], c[0, 0], eps=0.1),
    "batch_norm": lambda a, b, c: F.batch_norm(a[0], None, None, b[0, 0], c[0, 0], training=True, eps=0.1),
    "instance_norm": lambda a, b, c: F.instance_norm(a, eps=0.1) * b + c,
    "normalize": lambda a, b, c: F.normalize(a, dim=-1) * F.cosine_similarity(b, c, dim=-1)[..., None],
    "cross_entropy": lambda a, b, c: F.cross_entropy(a, b.softmax(-1)) + F.mse_loss(b, c),
    "kl_div": lambda a, b, c: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum") * F.softplus(c),
    "linear": lambda a, b, c: F.linear(a, b[0], c[0, :, 0]),
    "baddbmm": torch.baddbmm,
}
"""Of three tensors ``(size, size, size)``."""


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
def calls(draw: st.DrawFn, function: Callable[..., Tensor]) -> tuple[nn.Module, Tensor]:
    """A module that calls a function by name, and its input."""
    size = draw(st.integers(2, 3))
    first = draw(st.sampled_from(["input", "weight", "held"]))
    rest = draw(st.lists(st.sampled_from(["input", "weight", "held", "the one before"]), min_size=2, max_size=2))
    module = Calls(function, [first, *rest], size).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(size, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return module, x


# Modules -------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "any": {},
    "norms in training": {"layers": ("norm", "linear"), "training": True},
    "norms": {"layers": ("norm", "conv")},
    "dropout": {"layers": ("dropout", "linear"), "training": True},
    "buffers": {"layers": ("buffered", "activation", "residual"), "training": True},
    "embeddings": {"layers": ("embedding",)},
    "recurrent": {"layers": ("recurrent",), "max_depth": 1},
    "attention": {"layers": ("attention",), "max_depth": 1},
    "tied and shared": {"layers": ("tied", "shared", "parametrized")},
}
"""Options of `modules`, for layers about which the library does something of its own."""


def of_families(**options: Any) -> dict[str, st.SearchStrategy[nn.Module]]:
    return {name: modules(**{**family, **options}) for name, family in FAMILIES.items()}


CALLS = {name: calls(function) for name, function in FUNCTIONS.items()}


@property_over(of_families())
def stateless(module: nn.Module, data: st.DataObject) -> None:
    check_stateless(module, *data.draw(inputs_for(module)))


@property_over(CALLS)
def module_grads(drawn: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    module, x = drawn
    apply, params, buffers = make_stateless(module, params="detach")

    def call(tree: dict[str, Any]) -> Any:
        return apply(tree["params"], buffers, tree["x"])[0]

    check_grads(call, {"params": params, "x": x}, order=2, modes=("reverse",), entries=1)


# Tasks ---------------------------------------------------------------------------------------------------------------

Rows = list[tuple[Tensor, ...]]


@st.composite
def rows_of_module(draw: st.DrawFn, made: st.SearchStrategy[nn.Module]) -> tuple[nn.Module, Rows]:
    """A module and its inputs for each of some tasks."""
    module, tasks = draw(made), draw(st.sampled_from([2, 3, 1]))
    one = draw(inputs_for(module))
    return module, [one, *(draw(inputs_for(module, batch=one[0].shape[0])) for _ in range(tasks - 1))]


@st.composite
def rows_of_call(draw: st.DrawFn) -> tuple[nn.Module, Rows]:
    """The same for a function that is called by name."""
    module, x = draw(st.sampled_from(list(CALLS.values())).flatmap(lambda made: made))
    return module, [(x * scale,) for scale in (1.0, -0.5, 2.0)[: draw(st.sampled_from([2, 3, 1]))]]


def _for_tasks(tree: dict[str, Tensor], tasks: int, own: bool) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The tree with values of its own for each task if `own`, and its `in_dims`; counters are shared in any case."""
    factors = 1 + 0.25 * torch.arange(tasks)
    dims = {name: 0 if own and value.is_floating_point() else None for name, value in tree.items()}
    varied = {name: torch.stack([tree[name] * factor for factor in factors]) for name in tree if dims[name] == 0}
    return {**tree, **varied}, dims


_ROWS = {name: rows_of_module(made) for name, made in of_families(dtype=torch.float64).items()}


@property_over({"functions": rows_of_call(), **_ROWS}, 6)
def over_tasks(drawn: tuple[nn.Module, Rows], data: st.DataObject) -> None:
    module, rows = drawn
    apply, params, buffers = make_stateless(module, params="detach", buffers="detach")
    tasks = len(rows)
    own_params, own_buffers = data.draw(st.tuples(st.booleans(), st.booleans()))
    randomness: Any = data.draw(st.sampled_from(["different", "same"]))
    params, params_dims = _for_tasks(params, tasks, own_params)
    buffers, buffers_dims = _for_tasks(buffers, tasks, own_buffers)
    inputs: list[Tensor] = []
    dims: list[int] = []
    for column in zip(*rows, strict=True):
        dims.append(data.draw(st.integers(-column[0].ndim - 1, column[0].ndim)))
        inputs.append(torch.stack(column, dims[-1]))
    in_dims = (params_dims, buffers_dims, *dims)
    check_over_tasks(apply, params, buffers, *inputs, in_dims=in_dims, randomness=randomness)


# Inner loops ---------------------------------------------------------------------------------------------------------

_TRANSFORMS = st.sampled_from([None, None, optim.clip_by_global_norm(0.5), optim.normalize(0.1)])


def _of_task(batch: Any, task: int) -> Any:
    return tuple(leaf[task] for leaf in batch)


_PROBLEMS = {
    "norms in training": {"layers": ("norm", "linear"), "training": True},
    "other norms": {"layers": ("norm", "activation", "linear")},
    "recurrent": {"layers": ("recurrent", "linear"), "max_depth": 1},
    "any": {},
}
"""Options of `problems`."""


def of_problems(max_tasks: int) -> Strata:
    return {
        name: problems(dtype=torch.float64, smooth=True, max_tasks=max_tasks, **options)
        for name, options in _PROBLEMS.items()
    }


def rebuilt(optimizer: optim.Optimizer, **others: Any) -> optim.Optimizer:
    """The same optimizer, save for some options."""
    rule: Any = optimizer.init.__self__  # type: ignore[attr-defined]
    return getattr(optim, rule.name)(**{**rule.hyperparameters, **rule.switches, **rule.choices, **others})


def is_inside(optimizer: optim.Optimizer) -> bool:
    """Whether no learned number is zero: at the end of its range it has differences to one side only."""
    rule: Any = optimizer.init.__self__  # type: ignore[attr-defined]
    return all(float(leaf.detach()) > 0 for leaf in tree_leaves(rule.hyperparameters) if isinstance(leaf, Tensor))


def is_gentle(optimizer: optim.Optimizer) -> bool:
    """Whether the root of a gradient near zero bends slowly enough for differences, which it does within `eps`."""
    rule: Any = optimizer.init.__self__  # type: ignore[attr-defined]
    return all(float(leaf) >= 0.1 for leaf in tree_leaves(rule.hyperparameters.get("eps", 1.0)))


def warm(state: optim.OptState) -> optim.OptState:
    """A state in which nothing is nearly zero: Adam's root of an average that is rounding alone has no slope."""
    return state._replace(slots=tree_map(lambda slot: slot + 0.1 if slot.is_floating_point() else slot, state.slots))


def slowing(step: Any) -> Any:
    """A learning rate for each step, a number or a tensor as the step is."""
    return 0.3 / (1 + step)


@property_over(of_problems(3))
def adapt_many(problem: Any, data: st.DataObject) -> None:
    loss, params, supports, _, _ = problem
    steps, transform = data.draw(st.integers(0, 3)), data.draw(_TRANSFORMS)
    optimizer = data.draw(optimizers(smooth=True, params=params))
    if data.draw(st.sampled_from([False, False, True])):
        optimizer = rebuilt(optimizer, lr=slowing)
    options: Any = {"optimizer": optimizer, "steps": steps, "grad_transform": transform}
    chunk_size = data.draw(st.sampled_from([None, 1, 2]))
    resumed = data.draw(st.booleans())

    def one(params: Any, batch: Any, state: Any = None) -> Any:
        adapted = adapt(loss, params, batch, opt_state=state, **options)
        return adapted.params, adapted.losses, adapted.opt_state.slots

    def many(params: Any, batches: Any, state: Any = None) -> Any:
        in_dims = (0, 0) if resumed else (None, 0)
        adapted = adapt_tasks(loss, params, batches, opt_state=state, chunk_size=chunk_size, in_dims=in_dims, **options)
        return adapted.params, adapted.losses, adapted.opt_state.slots

    mapped = data.draw(st.sampled_from([many, None]))
    if resumed:
        first = adapt_tasks(loss, params, supports, optimizer=optimizer, steps=2)
        check_over_tasks(one, first.params, supports, warm(first.opt_state), in_dims=0, mapped=mapped)
    else:
        check_over_tasks(one, params, supports, mapped=mapped)


@property_over(of_problems(1))
def meta_grads(problem: Any, data: st.DataObject) -> None:
    loss, params, supports, queries, _ = problem
    steps, transform = data.draw(st.integers(1, 3)), data.draw(_TRANSFORMS)
    order = data.draw(st.sampled_from([1, 1, 1, 2]))
    # The roots of the others bend too much where a gradient is nearly zero: RMSprop's, which is centered, at order 1.
    rules = ("sgd",) if order == 2 else ("sgd", "adam", "adamw", "nadam", "radam", "adagrad", "adadelta", "asgd")
    kind = data.draw(st.sampled_from([None, "numbers", "tensors"]))
    optimizer = data.draw(optimizers(smooth=True, params=params, rules=rules, hyperparameters=kind))
    assume(is_inside(optimizer) and is_gentle(optimizer))
    # Of a gradient that is rounding alone, as norms of one entry have it, a recomputed step makes another one.
    normed = any("Norm" in type(part).__name__ for part in problem.module.modules())
    gradient = Unroll(checkpoint_every=None if normed else data.draw(st.sampled_from([None, 1, 2])))
    options: Any = {"optimizer": optimizer, "steps": steps, "gradient": gradient}
    task = _of_task(supports, 0), _of_task(queries, 0)
    if transform is None:
        check_meta_grads(loss, params, *task, order=order, entries=1, **options)
        return

    def clipped(params: Any, support: Any) -> Any:
        return adapt(loss, params, support, grad_transform=transform, **options).params

    # Clipping has a kink where the norm is the limit: no derivative there, in any library.
    check_meta_grads(loss, params, *task, adapt=clipped, order=order, entries=1, kinks="skip")


_LOSSES = ("its own", "closing", "drawing", "settled")
_ONE_TASK = problems(dtype=torch.float64, smooth=True, max_tasks=1)


@property_over({kind: st.tuples(st.just(kind), _ONE_TASK) for kind in _LOSSES})
def modes(drawn: Any, data: st.DataObject) -> None:
    kind, (loss, params, supports, queries, _) = drawn
    steps, settled = data.draw(st.integers(1, 3)), kind == "settled"
    learned = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    anchor = {name: (value + 0.1).requires_grad_() for name, value in params.items()}

    def closing(params: Any, batch: Any) -> Tensor:
        apart = torch.stack([(value - anchor[name]).square().sum() for name, value in params.items()]).sum()
        return loss(params, batch) + learned.exp() * apart

    def drawing(params: Any, batch: Any) -> Tensor:
        return closing(params, batch) * (0.5 + torch.rand((), dtype=torch.float64))

    chosen = {"its own": loss, "drawing": drawing}.get(kind, closing)
    support, query = _of_task(supports, 0), _of_task(queries, 0)

    def fresh(step: int, params: Any) -> Any:
        return (query, support)[step % 2]

    if settled:
        optimizer: Any = optim.sgd(lr=0.001)  # stays where the curvature is that of the proximal term, more or less
        kinds: Any = [Implicit(solve=implicit.dense)]
    else:
        optimizer, kinds = data.draw(optimizers(smooth=True, params=params)), None
    batch = data.draw(st.sampled_from([support, support, fresh]))
    options: Any = {"optimizer": optimizer, "steps": steps, "modes": kinds, "tasks": 2}
    try:
        check_modes(chosen, params, batch, query, **options)
    except ConvergenceError:  # there is no strict minimum near
        reject()


# Optimizers ----------------------------------------------------------------------------------------------------------


def _of(spec: Any, name: str) -> Any:
    """What a specification says of a parameter."""
    if isinstance(spec, tuple):
        return tuple(_of(each, name) for each in spec)
    return spec[name] if isinstance(spec, dict) else spec


def by_equations(optimizer: optim.Optimizer, rates: Callable[[int], float] | None = None) -> optim.Optimizer:
    """The rule of an optimizer as its equations say it, with the same numbers, one parameter after the other."""
    rule: Any = optimizer.init.__self__  # type: ignore[attr-defined]
    naive = SPECS[rule.name].naive
    constants = {**rule.switches, **rule.choices}

    def init(params: dict[str, Tensor]) -> Any:
        return optim.OptState(torch.tensor(0), dict(rule.hyperparameters), {name: {} for name in params})

    def step(params: dict[str, Tensor], grads: dict[str, Tensor], state: Any) -> Any:
        t, new, slots = int(state.step) + 1, {}, {}
        known = dict(state.hyperparameters)
        if rule.name == "sgd" and isinstance(known["momentum"], (int, float)) and not known["momentum"]:
            known["dampening"] = 0  # without a buffer there is none
        specs = {**constants, **known, **({} if rates is None else {"lr": rates(t - 1)})}
        for name, p in params.items():
            slots[name] = dict(state.slots[name])
            new[name] = naive(p, grads[name], slots[name], {key: _of(spec, name) for key, spec in specs.items()}, t)
        return new, optim.OptState(state.step + 1, state.hyperparameters, slots)

    return optim.Optimizer(init, step)


def check_slots(optimizer: optim.Optimizer, reference: optim.Optimizer, params: dict[str, Tensor], steps: int) -> None:
    """What both remember under one name is the same."""
    ours, theirs = optimizer.init(params), reference.init(params)
    generator, other = torch.Generator().manual_seed(0), params
    for _ in range(steps):
        grads = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
        params, ours = optimizer.step(params, grads, ours)
        other, theirs = reference.step(other, grads, theirs)
    for name, slots in theirs.slots.items():
        common = {slot: value for slot, value in slots.items() if slot in ours.slots and name in ours.slots[slot]}
        found = {slot: ours.slots[slot][name] for slot in common if isinstance(common[slot], Tensor)}
        expected = {slot: common[slot] for slot in found}
        alike = {slot for slot in found if found[slot].shape == expected[slot].shape}
        assert_trees_close({s: found[s] for s in alike}, {s: expected[s] for s in alike}, rtol=1e-7, atol=1e-9)


def some_params(data: st.DataObject) -> dict[str, Tensor]:
    """Parameters; often several of one shape, which are updated as one."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    names = {"w": (2,), "b": (2,), "c": (2,), "d": (2,), "m": (2, 3)}
    kept = list(names)[: data.draw(st.sampled_from([1, 2, 4]))]
    return {name: torch.randn(names[name], generator=generator, dtype=torch.float64) for name in kept}


RULES = tuple(name for name in SPECS if name not in ("muon", "adafactor", "rprop", "adamax"))
"""Those that train parameters of any shape, and whose equations have no corner in their values."""


@property_over({rule: st.just(rule) for rule in RULES}, 5)
def optimizer(rule: str, data: st.DataObject) -> None:
    params = some_params(data)
    kind = data.draw(st.sampled_from(["numbers", "tensors", None]))
    smooth = rule not in ("lion",)  # which is a sign
    drawn = data.draw(optimizers(rules=(rule,), params=params, hyperparameters=kind, smooth=smooth))
    made: Any = drawn.init.__self__  # type: ignore[attr-defined]
    assume(is_inside(drawn))
    if data.draw(st.booleans()) and "amsgrad" in made.switches:
        drawn = rebuilt(drawn, amsgrad=True)
    # Kinks are skipped below: RAdam changes its formula at a step that depends on its betas, ASGD's average at `t0`.
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/radam.py and asgd.py beside it have these branches.
    table = data.draw(st.sampled_from([None, [0.1, 0.3, 0.05, 0.2, 0.1, 0.4, 0.2]]))
    steps = data.draw(st.sampled_from([2, 6, 3]))
    if table is not None:
        scheduled = rebuilt(drawn, lr=lambda step: table[min(int(step), 6)])
        reference = by_equations(drawn, lambda step: table[min(step, 6)])
        check_optimizer(scheduled, reference, params=params, steps=steps, entries=1, kinks="skip")
        return
    check_optimizer(drawn, by_equations(drawn), params=params, steps=steps, entries=1, kinks="skip")
    check_slots(drawn, by_equations(drawn), params, steps)
    if data.draw(st.booleans()):  # the numbers are those of the state, whatever optimizer has made it
        other = rebuilt(drawn, lr=0.05)
        mixed = optim.Optimizer(other.init, drawn.step)
        check_optimizer(mixed, by_equations(other), params=params, steps=2, entries=0, kinks="skip")


# Solves --------------------------------------------------------------------------------------------------------------


def _matrix(theta: Tensor) -> Tensor:
    """A symmetric matrix with eigenvalues between 0.6 and 1.4, for which all solves converge."""
    bounded = torch.tanh(theta)
    return torch.eye(len(theta), dtype=theta.dtype) + 0.2 * (bounded + bounded.T) / len(theta)


SOLVES = {solve.__name__: st.just(solve) for solve in (implicit.cg, implicit.neumann, implicit.dense)}


@property_over(SOLVES)
def solves(solve: Callable[..., Any], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    b = {f"b{index}": numbers(size) for index, size in enumerate(sizes)}
    tree: dict[str, Any] = {"b": b, "theta": numbers(sum(sizes), sum(sizes))}
    if data.draw(st.booleans()):
        tree["ridge"] = numbers().sigmoid() / 4
    fixed_point = "ridge" not in tree and data.draw(st.booleans())

    def times(theta: Tensor, x: dict[str, Tensor]) -> dict[str, Tensor]:
        product = _matrix(theta) @ torch.cat(list(x.values()))
        return dict(zip(x, product.split(sizes), strict=True))

    def solved(tree: dict[str, Any]) -> Any:
        options: dict[str, Any] = {name: tree[name] for name in ("ridge",) if name in tree}
        if solve is not implicit.dense:  # the others stop where a second derivative would show it
            options["tol"] = 1e-13
        return solve(partial(times, tree["theta"]), tree["b"], **options)

    def optimality(x: dict[str, Tensor], theta: Tensor, b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p + 0.1 * p.sin() - b[name] for name, p in times(theta, x).items()}

    def root(tree: dict[str, Any]) -> Any:
        @implicit.custom_root(optimality, solve=implicit.dense)
        def find(x: Any, theta: Tensor, b: Any) -> Any:
            for _ in range(60):
                x = {name: x[name] - moved for name, moved in optimality(x, theta, b).items()}
            return x

        return find(tree["b"], tree["theta"], tree["b"])

    order = data.draw(st.sampled_from([1, 2]))
    check_grads(root if fixed_point else solved, tree, order=order, modes=("reverse",), entries=1)


CHECKS = tuple(PROPERTIES)
"""The properties of this file, of code that is right."""
