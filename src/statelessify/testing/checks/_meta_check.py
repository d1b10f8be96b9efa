"""What `check_meta_grads` does: the values of a loop, then its gradient by one way after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._adapt import adapt as library_adapt
from ..._adapt import check_loop
from ..._forward_mode import ForwardMode
from ..._loop import Gradient
from ..._tree import tree_leaves, tree_map
from ..._unroll import FirstOrder, Unroll
from ...errors import HyperparameterError, StatelessifyError
from ._closed import closed_over, moved
from ._complaint import Settings
from ._inner import (
    Inner,
    Promised,
    TorchOptimizer,
    hyperparameters_of,
    is_exact,
    plain_loop,
    pure,
    torch_loop,
)
from ._probe import own_leaves, plain, widened
from ._real import RealFunction, check_repeatable
from ._routes import Routes, anew, assert_near, check_func, near, silent
from ._verify import verify

__all__: list[str] = []

Adapt = Callable[[Any, Any], Any]
"""``adapt(params, support) -> adapted params``."""


class MetaCheck:
    """One call of `check_meta_grads`."""

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        optimizer: Any,
        steps: int | None,
        adapt: Adapt | None,
        gradient: Gradient | None,
        grads: Callable[[Any, Any, Any], Any] | None,
        order: int,
    ) -> None:
        self.loss, self.steps, self.adapt, self.grads, self.order = loss, steps, adapt, grads, order
        self.optimizer, self.make = (None, None) if optimizer is None else pure(optimizer)
        self.mode: Gradient = Unroll() if gradient is None else gradient
        self.exact = is_exact(self.mode)
        self._check_arguments(optimizer, gradient)

    def _check_arguments(self, optimizer: Any, gradient: Any) -> None:
        if optimizer is None and self.adapt is None:
            raise HyperparameterError(
                "`check_meta_grads` needs an inner loop: write `optimizer=optim.sgd(lr=...), steps=...`, or `adapt=` "
                "with a function of your own"
            )
        if (optimizer is None) != (self.steps is None):
            raise HyperparameterError("`optimizer` and `steps` go together; write both, or none beside `adapt=`")
        if self.optimizer is None and not (self.exact and (self.adapt or self.grads)):
            raise HyperparameterError(
                "this needs an optimizer that is a pure function; write `optim.sgd(lr=...)` and the like, or a class "
                "of torch.optim"
            )
        if self.optimizer is not None:
            check_loop(self.optimizer, self.steps, self.mode)
        if self.order == 2 and not (self.exact and not isinstance(self.mode, ForwardMode)):
            raise HyperparameterError(f"the meta-gradient of `{self.mode!r}` has no derivative; leave `order=2` out")

    @property
    def inner(self) -> Inner | None:
        if self.optimizer is None or self.steps is None:
            return None
        return Inner(self.loss, self.optimizer, self.steps)

    # What is tested --------------------------------------------------------------------------------------------------

    def adapted(self, tree: Any) -> Any:
        """The adapted parameters, by the code under test."""
        if self.adapt is not None:
            found = self.adapt(tree["params"], tree["support"])
            return getattr(found, "params", found)
        assert self.inner is not None
        loss = self.loss if self.exact else anew(self.loss)
        return library_adapt(loss, tree["params"], tree["support"], **self.inner.options(tree, self.mode)).params

    def value(self, tree: Any) -> Tensor:
        with silent(not self.exact):
            return self.judged(self.adapted(tree), tree)

    def judged(self, params: Any, tree: Any) -> Tensor:
        return self.loss(params, tree.get("query", tree["support"]))

    # The check -------------------------------------------------------------------------------------------------------

    def run(self, tree: Any, settings: Settings) -> None:
        tree = self._complete(self._widened(tree))
        note = f"reproduce: {settings.reproduce}"
        what = "adapt" if self.grads is None or self.adapt else "loss"
        if self.grads is None or self.adapt is not None:
            function = RealFunction(self.value, tree, what)
            check_repeatable(function, function.point())
            self._check_values(tree, note)
        closed = self._closed(tree)
        routes = Routes(self.value, closed)
        moving = {**tree, **({"closed": closed} if closed else {})}
        promise = self._promise(tree)

        def expected(tree: Any) -> Tensor:
            with moved(closed, tree.get("closed", closed)):
                return promise(tree)

        settings = settings._replace(hint=lambda: self._hint(tree, routes))
        if self.grads is not None:
            self._check_given(tree, expected, settings)
            return
        named = settings._replace(grads="autograd")
        verify(RealFunction(expected, moving, "loss"), 1, ("reverse",), routes.autograd, named)
        check_func(routes, tree, self.adapt is None and type(self.mode) is Unroll, note)
        if self.order == 2:
            verify(RealFunction(self.value, tree, "loss"), 2, ("reverse",), None, named)

    def _widened(self, tree: Any) -> Any:
        """The tree in float64, if the code under test takes that."""
        found: Any = tree_map(widened, tree)
        if self.grads is not None and self.adapt is None:
            return found
        try:
            value = self.value(own_leaves(found))
        except StatelessifyError:
            raise
        except Exception:  # such as a product with a float32 constant
            return tree
        return found if value.dtype == torch.float64 else tree

    def _complete(self, tree: Any) -> Any:
        """The tree with the hyperparameters."""
        if self.optimizer is None or self.adapt is not None:
            return tree
        found = hyperparameters_of(self.optimizer.init(tree["params"]))
        return {**tree, "hyperparameters": found} if found else tree

    def _closed(self, tree: Any) -> dict[str, Tensor]:
        if self.grads is not None:
            return {}
        tree = own_leaves(tree)

        def run() -> None:
            if self.adapt is not None:
                self.value(tree)
            else:
                assert self.inner is not None
                self.judged(plain_loop(self.inner, tree)[0], tree)

        return closed_over(run, tree_leaves(tree))

    def _promise(self, tree: Any) -> Callable[[Any], Tensor]:
        """The value whose differences the meta-gradient must be."""
        inner = self.inner
        if self.adapt is not None and self.exact:
            return self.value
        if inner is None:
            return lambda tree: self.judged(torch_loop(self._torch(), self.loss, tree, self.steps or 0), tree)
        if self.exact:
            return lambda tree: self.judged(plain_loop(inner, tree)[0], tree)
        promised = Promised(inner, self.mode, tree)
        return lambda tree: self.judged(promised(tree)[0], tree)

    def _torch(self) -> TorchOptimizer:
        assert self.make is not None
        return self.make

    def _arrived(self, tree: Any, steps: int) -> Any:
        if self.make is not None:
            return torch_loop(self.make, self.loss, tree, steps)
        assert self.inner is not None
        return plain(plain_loop(self.inner._replace(steps=steps), tree)[0])

    def _check_values(self, tree: Any, note: str) -> None:
        if self.steps is None:
            return
        found = plain(self.adapted(own_leaves(tree)))
        expected = self._arrived(tree, self.steps)
        names = ("adapt", "a plain loop")
        try:
            assert_near(found, expected, names, note, 1e-6)  # a rate of 0.1 may be one of float32
        except AssertionError as error:
            for other in (self.steps + 1, self.steps - 1):
                if other >= 0 and near(found, self._arrived(tree, other)):
                    words = f"it has taken {other} steps, not {self.steps}"
                    raise AssertionError(f"the adapted parameters are wrong: {words}\n  {error}") from None
            raise AssertionError(f"the adapted parameters are wrong: {error}") from None

    def _check_given(self, tree: Any, expected: Callable[[Any], Tensor], settings: Settings) -> None:
        assert self.grads is not None
        rest, grads = {name: part for name, part in tree.items() if name != "params"}, self.grads

        def value(params: Any) -> Tensor:
            return expected({**rest, "params": params})

        def given(params: Any) -> Any:
            return grads(params, rest["support"], rest.get("query", rest["support"]))

        verify(RealFunction(value, tree["params"], "loss"), self.order, ("reverse",), given, settings)

    def _hint(self, tree: Any, routes: Routes) -> str:
        """Whether the gradient is that of the first order."""
        inner = self.inner
        if inner is None or not self.exact:
            return ""
        promised = Promised(inner, FirstOrder(), tree)

        def of_first_order(tree: Any) -> Tensor:
            return self.judged(promised(tree)[0], tree)

        other = Routes(of_first_order, {})
        if self.grads is not None:
            query = tree.get("query", tree["support"])
            found = self.grads(own_leaves(tree)["params"], tree["support"], query)
        else:
            found = routes.autograd(tree)["params"]
        if near(plain(found), plain(other.autograd(tree)["params"])):
            return "it equals the first-order gradient: what inner gradients depend on is lost"
        return ""
