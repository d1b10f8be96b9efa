"""`check_optimizer`: steps against a reference, and their derivatives against differences."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..._tree import tree_flatten, tree_leaves, tree_map, tree_stack, tree_unstack
from ...errors import HyperparameterError
from ...optim import Optimizer, OptState
from ...optim._hyperparameters import has, is_schedule
from .._paste import paste
from ._closed import closed_over, moved
from ._complaint import Settings
from ._grads import check_settings
from ._inner import TorchOptimizer
from ._probe import Unwritten, copies, is_inexact, own_leaves, plain, widened
from ._real import RealFunction
from ._routes import Routes, assert_near, check_func
from ._say import optimizer_code
from ._steps import PureSteps, Steps, TorchSteps, each_step, gradients_like
from ._verify import verify

__all__ = ["check_optimizer"]

MANY = 2**24
"""Beyond so many steps a counter in float32 stands still."""


def check_optimizer(
    optimizer: Optimizer | TorchOptimizer,
    reference: Optimizer | TorchOptimizer | None = None,
    *,
    params: Any = None,
    steps: int = 5,
    order: Literal[1, 2] = 1,
    rtol: float | None = None,
    atol: float = 0.0,
    entries: int = 2,
    kinks: Literal["raise", "skip"] = "raise",
    seed: int = 0,
) -> None:
    """Assert that an optimizer steps as a reference does, is pure, and has the derivatives that differences say.

    It writes into nothing that it is given, goes on from a state as if it had not stopped, keeps structures, shapes
    and dtypes, makes no NaN of a zero gradient, and gives many tasks at once what it gives each, if it says that it is
    elementwise. The derivative of all its steps is taken by the parameters, the gradients of each step, the
    hyperparameters that are tensors, and the tensors that need a gradient and are read from a closure.

    Args:
        optimizer: an `optim.Optimizer`; or a class of torch.optim or ``lambda params: torch.optim.SGD(params, ...)``,
            whose derivatives are checked where it is made with ``differentiable=True``.
        reference: what it has to do, of the same kinds; its values alone are asked for.
        params: a tree of parameters. None: a matrix, a vector and a number.
        steps: how many.
        order: 2 checks second derivatives as well.
        rtol: what a derivative may be off, relative to its size. None: 1e-6 in float64, 1e-4 in float32.
        atol: what it may be off besides, per unit of input.
        entries: how many entries of each leaf are checked one by one, beside the whole leaf along random directions.
        kinks: ``"skip"`` passes over entries where the step has a kink.
        seed: of parameters, gradients and random directions.

    Raises:
        AssertionError: something of this does not hold. It names the step, the leaf, the worst entry and both values.
        HyperparameterError: arguments that do not fit together.

    Example:
        >>> import torch
        >>> from statelessify import optim
        >>> from statelessify.testing import check_optimizer
        >>> reference = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
        >>> check_optimizer(optim.sgd(lr=torch.tensor(0.1), momentum=0.9), reference)
    """
    check_settings(order, kinks, entries)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HyperparameterError(f"`steps={steps!r}` is too few to see what a state does; write an integer from 2 on")
    shown = [optimizer_code(optimizer), *([] if reference is None else [f"reference={optimizer_code(reference)}"])]
    shown += [] if params is None else [f"params={paste(params)}"]
    call = f"check_optimizer({', '.join(shown)}, steps={steps}, seed={seed})"
    settings = Settings(rtol, atol, seed, entries, kinks, call, grads="autograd")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        given = _some_params(seed) if params is None else tree_map(widened, params)
        check = _Check(_steps_of("optimizer", optimizer, given), given, steps, settings)
        if reference is not None:
            check.against(_steps_of("reference", reference, given))
        check.purity()
        check.resumption()
        check.zero_gradients()
        if isinstance(check.tested, PureSteps):
            check.counter(check.tested)
            if check.tested.optimizer.elementwise:
                check.elementwise(check.tested)
        if check.tested.differentiable:
            check.derivatives(order)


def _steps_of(name: str, optimizer: Any, params: Any) -> Steps:
    if isinstance(optimizer, Optimizer):
        return PureSteps(optimizer)
    if not callable(optimizer):
        raise HyperparameterError(
            f"`{name}` is {type(optimizer).__name__}; write an `optim.Optimizer`, a class of torch.optim, or "
            "`lambda params: torch.optim.SGD(params, lr=...)`"
        )
    return TorchSteps(cast("Any", optimizer), params)


def _some_params(seed: int) -> dict[str, Tensor]:
    shapes = {"matrix": (2, 3), "number": (), "vector": (3,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _times(params: Any, factor: int) -> Any:
    def other(leaf: Any) -> Any:
        return leaf * factor

    return tree_map(other, params)


def _without(grads: Any, count: int) -> Any:
    """Gradients of which the first are zero."""

    def cut(leaf: Any) -> Any:
        return torch.cat([torch.zeros_like(leaf[:count]), leaf[count:]])

    return tree_map(cut, grads)


class _Check:
    """One call of `check_optimizer`."""

    def __init__(self, tested: Steps, params: Any, count: int, settings: Settings) -> None:
        self.tested, self.count, self.settings = tested, count, settings
        self.note = f"reproduce: {settings.reproduce}"
        self.tree: dict[str, Any] = {"params": params}
        given = tested.hyperparameters(params)
        # A rate of 0.1 is another number in float32 than the reference's.
        self.narrow = any(is_inexact(leaf) and leaf.dtype != torch.float64 for leaf in tree_leaves(given))
        numbers = tree_map(widened, given)
        self.tree |= {"hyperparameters": numbers} if numbers else {}
        self.grads = gradients_like(params, count, settings.seed + 1)
        self.found = tested.run(own_leaves(self.tree), each_step(self.grads))
        self._check_kind()

    def _check_kind(self) -> None:
        """Each step returns parameters like those that it was given."""
        (leaves, spec), names = tree_flatten(self.tree["params"]), ("after", "before")
        for index, point in enumerate(self.found.points):
            now, other = tree_flatten(point)
            same = other == spec and all(
                a.shape == b.shape and a.dtype == b.dtype for a, b in zip(now, leaves, strict=True)
            )
            if not same:
                try:
                    assert_near(plain(point), plain(self.tree["params"]), names, self.note)
                except AssertionError as error:
                    raise AssertionError(f"step {index + 1} returns other parameters than it takes: {error}") from None

    def against(self, reference: Steps) -> None:
        """The parameters after each step are those of the reference."""
        expected = reference.run(own_leaves(self.tree), each_step(self.grads)).points
        names = ("the optimizer", "the reference")
        for index, (point, right) in enumerate(zip(self.found.points, expected, strict=True)):
            try:
                assert_near(plain(point), plain(right), names, self.note, 1e-6 if self.narrow else 1e-8)
            except AssertionError as error:
                hint = self._opposite(point, right) if index == 0 else ""
                words = f"after step {index + 1} of {self.count} the parameters are wrong{hint}"
                raise AssertionError(f"{words}: {error}") from None

    def _opposite(self, point: Any, right: Any) -> str:
        pairs = zip(*(tree_leaves(tree) for tree in (point, right, self.tree["params"])), strict=True)
        if all(torch.allclose(one - p, p - two) for one, two, p in pairs):
            return ", it moves in the opposite direction (`maximize`)"
        return ""

    def purity(self) -> None:
        """A step writes into nothing, and keeps nothing."""
        if not isinstance(self.tested, PureSteps):
            return
        tree, grads = own_leaves(self.tree), own_leaves(each_step(self.grads)[0])
        params, step = tree["params"], self.tested.optimizer.step
        watched = Unwritten(params=params)
        state: Any = self.tested.start(tree)
        watched.check("`init`", self.note)
        spec = tree_flatten(state)[1]
        for _ in range(2):
            given = Unwritten(params=params, grads=grads, state=state)
            with torch.no_grad():  # where it could
                params, new = step(params, grads, state)
            given.check("`step`", self.note)
            if tree_flatten(new)[1] != spec:
                raise AssertionError(f"`step` returns a state of another structure than it takes\n  {self.note}")
            state = new

    def resumption(self) -> None:
        """From the state half way the same steps lead to the same end, again and in between other steps."""
        grads, half = each_step(self.grads), self.count // 2
        begun = self.tested.run(own_leaves(self.tree), grads[:half])
        state = begun.state if isinstance(self.tested, TorchSteps) else copies(begun.state)
        other = _times(self.tree["params"], 2)
        self.tested.run({**self.tree, "params": other}, grads)
        rest = self.tested.run({**self.tree, "params": begun.points[-1]}, grads[half:], state)
        names = ("stopped and resumed", "at one go")
        try:
            assert_near(plain(rest.points[-1]), plain(self.found.points[-1]), names, self.note)
        except AssertionError as error:
            words = f"{half} and then {self.count - half} steps are not {self.count} steps"
            lost = "some of the state is lost, or kept elsewhere"
            raise AssertionError(f"{words}, {lost}: {error}") from None

    def zero_gradients(self) -> None:
        """Neither values nor derivatives become NaN where gradients are zero, at all steps or at the first."""
        kinds = {
            "at all steps": _without(self.grads, self.count),
            "at the first step": _without(self.grads, 1),
        }
        for when, stacked in kinds.items():
            tree = own_leaves({**self.tree, "grads": stacked})
            run = self.tested.run(tree, each_step(tree["grads"]))
            tensors = [*tree_leaves(run.points), *self.tested.kept(run.state)]
            if not all(bool(t.isfinite().all()) for t in tensors):
                raise AssertionError(f"gradients that are zero {when} give NaN or infinity\n  {self.note}")
            if not self.tested.differentiable:
                continue
            found = Routes(self._value, {}).autograd(tree)
            for part, grads in found.items():
                for leaf in tree_leaves(grads):
                    if is_inexact(leaf) and not bool(leaf.isfinite().all()):
                        raise AssertionError(
                            f"gradients that are zero {when} make the derivative by `{part}` NaN or infinite; a root "
                            f"of zero has no slope, add a small number below it or give it a gradient of zero\n  "
                            f"{self.note}"
                        )

    def counter(self, tested: PureSteps) -> None:
        """The number of steps is still right after many of them."""
        state = tested.optimizer.init(self.tree["params"])
        if not isinstance(state, OptState) or has(state.hyperparameters, is_schedule):  # it would go all the way
            return
        step = cast("Any", state.step)
        if not isinstance(step, Tensor):
            raise AssertionError(f"`OptState.step` is {type(step).__name__}, not a 0-dim tensor\n  {self.note}")
        state = state._replace(step=torch.full_like(step, MANY))
        after = tested.optimizer.step(self.tree["params"], each_step(self.grads)[0], state)[1].step
        if int(after) != MANY + 1:
            raise AssertionError(
                f"after {MANY} steps `OptState.step` goes on with {int(after)}: it is counted in "
                f"{str(after.dtype).removeprefix('torch.')}; write `torch.zeros((), dtype=torch.int64)`\n  {self.note}"
            )

    def elementwise(self, tested: PureSteps) -> None:
        """Three tasks at once get what each gets."""
        tasks = [_times(self.tree["params"], 1 + k) for k in range(3)]
        drawn = [gradients_like(self.tree["params"], self.count, self.settings.seed + 10 + k) for k in range(3)]
        each = [
            tested.run({**self.tree, "params": params}, each_step(grads)).points[-1]
            for params, grads in zip(tasks, drawn, strict=True)
        ]
        rows = zip(*(each_step(grads) for grads in drawn), strict=True)
        together = tested.run({**self.tree, "params": tree_stack(tasks)}, [tree_stack(row) for row in rows])
        names = ("all tasks at once", "alone")
        for index, (found, alone) in enumerate(zip(tree_unstack(together.points[-1]), each, strict=True)):
            try:
                assert_near(plain(found), plain(alone), names, self.note)
            except AssertionError as error:
                words = f"it says `elementwise=True`, but task {index} is stepped otherwise among others than alone"
                raise AssertionError(f"{words}: {error}") from None

    def _value(self, tree: Any) -> Tensor:
        """One number of the last parameters and the state, on which every entry has a bearing of its own."""
        run = self.tested.run(tree, each_step(tree["grads"]))
        total: Any = 0.0
        for position, leaf in enumerate([*tree_leaves(run.points[-1]), *self.tested.kept(run.state)]):
            real = (torch.view_as_real(leaf) if leaf.is_complex() else leaf).reshape(-1)
            weights = torch.linspace(0.5, 1.5 + 0.25 * position, real.numel(), dtype=torch.float64, device=real.device)
            total = total + (real * weights.to(real.dtype)).sum()
        return total

    def derivatives(self, order: int) -> None:
        tree = {**self.tree, "grads": self.grads}
        leaves = own_leaves(tree)
        closed = closed_over(lambda: self._value(leaves), tree_leaves(leaves))
        routes = Routes(self._value, closed)

        def value(tree: Any) -> Tensor:
            with moved(closed, tree.get("closed", closed)):
                return self._value({name: part for name, part in tree.items() if name != "closed"})

        moving = {**tree, **({"closed": closed} if closed else {})}
        verify(RealFunction(value, moving, "optimizer"), 1, ("reverse",), routes.autograd, self.settings)
        check_func(routes, tree, False, self.note)
        if order == 2:
            verify(RealFunction(self._value, tree, "optimizer"), 2, ("reverse",), None, self.settings)
