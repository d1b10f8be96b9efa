"""The registry of rules: each is needed still, and the decorator does what it says, wherever functions are run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import close
from rule_probes import PROBES
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from statelessify import adapt, adapt_tasks, errors, optim, over_tasks, stateless
from statelessify.rules import RULES, rule
from statelessify.rules._registry import FUNCTIONS, MODULES, Rules, Watched, rules

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]


# ---------------------------------------------------------------- every rule is needed

TARGETS = {name: target for each in RULES for name, target in zip(each.names, each.targets, strict=True)}


def test_every_rule_has_a_probe() -> None:
    assert {*PROBES} == {*TARGETS.values()}


@pytest.mark.parametrize("name", TARGETS)
def test_a_rule_that_torch_has_made_unnecessary_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS[name]
    PROBES[target]()
    for table in (MODULES, *FUNCTIONS.values()):
        monkeypatch.delitem(table, target, raising=False)
    torch.manual_seed(0)
    try:
        PROBES[target]()
    except Exception:  # plain torch raises, gives another number, or warns that it runs a loop of its own
        return
    pytest.fail(f"torch has mended this: remove the rule of {name}")


def test_every_rule_says_why_and_where() -> None:
    for each in RULES:
        assert each.why
        assert each.upstream.startswith("https://")
        assert each.when in FUNCTIONS
        assert all(name.startswith("torch.") and "<" not in name for name in each.names)


# ---------------------------------------------------------------- modules of one's own


class Branches(nn.Module):
    """``|w x|`` by a branch on a value, which no transform can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x
        return y if bool(y > 0) else -y


class Inherits(Branches):
    pass


class Overrides(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def no_branch(module: Branches, x: Tensor) -> Tensor:
    return (module.weight * x).abs()


XS = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", [Branches, Inherits])
def test_a_rule_holds_wherever_functions_are_run(kind: type[Branches]) -> None:
    rule(Branches, why="it branches on a value")(no_branch)
    apply, params, buffers = stateless(nn.ModuleDict({"inner": kind()})["inner"], params="detach")
    call = lambda p, x: apply(p, buffers, x)[0]
    expected, slopes = 2 * XS.abs(), XS.abs()
    leaf = {name: p.detach() for name, p in params.items()}
    close(vmap(call, (None, 0))(params, XS), expected)
    close(vmap(lambda x: apply.bind(params, buffers)(x))(XS), expected)
    close(over_tasks(call, backend="vmap")(params, XS), expected)
    close(grad(lambda p: vmap(call, (None, 0))(p, XS).sum())(leaf)["weight"], slopes.sum())
    close(vmap(grad(call), (None, 0))(leaf, XS)["weight"], slopes)
    close(vmap(lambda x: jvp(lambda p: call(p, x), (leaf,), (leaf,))[1])(XS), expected)
    run: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 1}
    adapted = adapt_tasks(call, params, XS, backend="vmap", **run).params["weight"]
    close(adapted, 2 - 0.1 * slopes)
    close(torch.stack([adapt(call, params, x, **run).params["weight"] for x in XS]), adapted)
    for again in (pickle.loads(pickle.dumps(apply)), copy.deepcopy(apply), apply.eval()):
        close(vmap(lambda x, again=again: again(params, buffers, x)[0])(XS), expected)


@pytest.mark.usefixtures("registry")
def test_a_subclass_that_overrides_forward_has_none() -> None:
    rule(Branches, why="it branches on a value")(no_branch)
    apply, params, buffers = stateless(Overrides())
    close(apply(params, buffers, XS[0])[0], torch.tensor(4.0))
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda x: apply(params, buffers, x)[0])(XS)
    own = Branches()
    own.forward = lambda x: own.weight * x + 7  # and neither has an instance with its own
    apply, params, buffers = stateless(own)
    close(vmap(lambda x: apply(params, buffers, x)[0])(XS), 2 * XS + 7)
    rule(Overrides, why="it branches on a value")(lambda self, x: no_branch(self, x) + 1)
    apply, params, buffers = stateless(Overrides())
    close(vmap(lambda x: apply(params, buffers, x)[0])(XS), torch.tensor([4.0, 2.0, 5.0]))


OCCASIONS = {"transforms": {"vmap"}, "gradients": {"vmap", "adapt"}, "always": {"vmap", "adapt", "eager"}}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("when", OCCASIONS)
@pytest.mark.parametrize("kind", ["module", "function", "function beside a module"])
def test_when_a_rule_holds(when: Any, kind: str) -> None:
    """In plain eager code, in the inner steps of `adapt`, under transforms."""
    heard: set[str] = set()
    now = ""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * torch.special.erf(x)

    def of_module(module: Part, x: Tensor) -> Tensor:
        heard.add(now)
        return Part.forward(module, x)

    def of_function(x: Tensor) -> Tensor:
        heard.add(now)
        return torch.special.erf(x)

    rule(*{"module": (Part,)}.get(kind, (torch.special.erf,)), why="to see it", when=when)(
        of_module if kind == "module" else of_function
    )
    apply, params, buffers = stateless(Part(), params="detach")
    call = lambda p, x: apply(p, buffers, x)[0]
    if kind == "function beside a module":
        call = lambda p, x: p["weight"] * torch.special.erf(x)
    for now in ("eager", "vmap", "adapt", "eager"):
        if now == "vmap":
            over_tasks(call, backend="vmap")(params, XS)
        elif now == "adapt":
            adapt(call, params, XS[0], optimizer=optim.sgd(lr=0.1), steps=2)
        else:
            call(params, XS[0])
    nobodys = {"eager"} if kind == "function beside a module" else set()  # outside of all, rules do not hold
    assert heard == OCCASIONS[when] - nobodys


@pytest.mark.usefixtures("registry")
def test_a_later_rule_replaces_an_earlier_one() -> None:
    for value in (1.0, 2.0):
        rule(Branches, torch.special.erf, why="to see it")(lambda *args, value=value: args[-1] * 0 + value)
    apply, params, buffers = stateless(Branches())
    close(vmap(lambda x: apply(params, buffers, x)[0])(XS), torch.full((3,), 2.0))
    close(over_tasks(lambda _, x: torch.special.erf(x), backend="vmap")(XS[0], XS), torch.full((3,), 2.0))


@pytest.mark.usefixtures("registry")
def test_a_later_rule_of_fewer_occasions_leaves_nothing_of_the_earlier() -> None:
    rule(torch.special.erf, why="to see it", when="always")(lambda x: x * 0)
    rule(torch.special.erf, why="to see it")(lambda x: x * 0 + 1)
    with Rules("always"):
        close(torch.special.erf(XS), XS.erf())
    with Rules("transforms"):
        close(torch.special.erf(XS), torch.ones(3))


@pytest.mark.usefixtures("registry")
def test_one_function_for_two_rules() -> None:
    class Other(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return x

    nothing = lambda module, x: x * 0
    rule(Branches, why="to see it", when="always")(nothing)
    rule(Other, why="to see it")(nothing)
    for kind, expected in ((Branches, 0.0), (Other, 2.0)):
        apply, params, buffers = stateless(kind())
        close(apply(params, buffers, XS[2])[0], torch.tensor(expected))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("bound", [False, True])
def test_functions_in_a_rule_of_a_module_follow_their_own_rules(bound: bool) -> None:
    """A norm, whose fused kernel would give a wrong number."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x * self.weight, (4,), self.weight)

    rule(Normed, why="to see it")(lambda self, x: F.layer_norm(x * self.weight, (4,), self.weight))
    apply, _, buffers = stateless(Normed())
    xs, weight = torch.randn(3, 5, 4), torch.rand(4) + 0.5

    def inner(w: Tensor, x: Tensor) -> Tensor:
        params = {"weight": w}
        return ((apply.bind(params, buffers)(x) if bound else apply(params, buffers, x)[0]).sin() ** 2).sum()

    slope = lambda w, x: (grad(inner)(w, x) ** 2).sum()
    found = grad(lambda w: vmap(slope, (None, 0))(w, xs).sum())(weight)
    close(found, grad(lambda w: sum(slope(w, x) for x in xs))(weight))


@pytest.mark.usefixtures("registry")
def test_inside_a_rule_its_target_is_torchs_own() -> None:
    calls: list[int] = []

    @rule(torch.special.erf, why="to see it", when="always")
    def _(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.special.erf(x) + 1

    @rule(Branches, why="to see it", when="always")
    def _(self: Branches, x: Tensor) -> Tensor:
        return Branches.forward(self, torch.special.erf(x))

    apply, params, buffers = stateless(Branches())
    close(apply(params, buffers, XS[2])[0], 2 * (XS[2].erf() + 1))
    assert calls == [1]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "target", [3, None, "torch.sin", object(), int, Tensor, nn.Linear(2, 2)], ids=lambda target: type(target).__name__
)
def test_what_no_rule_can_replace_is_refused(target: Any) -> None:
    with pytest.raises(errors.ModuleError, match="a rule replaces functions or subclasses"):
        rule(torch.sin, target, why="")


@pytest.mark.usefixtures("registry")
def test_an_occasion_that_is_none_is_refused() -> None:
    for target in (torch.sin, Branches):
        with pytest.raises(errors.StatelessifyError, match="sometimes"):
            rule(target, why="", when="sometimes")(no_branch)


# ---------------------------------------------------------------- compiled


def compiled(module: nn.Module, *args: Tensor) -> tuple[Tensor, Tensor]:
    torch.compiler.reset()
    apply, params, buffers = stateless(module)
    call = lambda p, *args: apply(p, buffers, *args)[0]
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(params, *args)
    return found, functional_call(module, params, args)


@pytest.mark.usefixtures("registry")
def test_compiled_code_follows_a_rule_in_one_graph() -> None:
    rule(Branches, why="it branches on a value")(no_branch)
    found, expected = compiled(Branches(), XS[0])
    close(found, expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_transformer_is_one_graph(training: bool) -> None:
    module = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True).train(training)
    found, expected = compiled(module, torch.randn(2, 3, 4))
    close(found, expected)
    both = [torch.autograd.grad(out.sin().sum(), list(module.parameters())) for out in (found, expected)]
    close(*both)


# ---------------------------------------------------------------- one mode for two occasions


def occasions() -> list[Any]:
    stack = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    return [mode.when for mode in stack if isinstance(mode, Rules)]


def test_a_mode_is_raised_and_lowered_again() -> None:
    with rules("gradients"):
        assert occasions() == ["gradients"]
        with rules("transforms"):
            assert occasions() == ["transforms"]
            with rules("gradients"), rules("always"):
                assert occasions() == ["transforms"]
        assert occasions() == ["gradients"]
        with pytest.raises(KeyError), rules("transforms"):
            raise KeyError
        assert occasions() == ["gradients"]
    assert occasions() == []


def test_a_mode_that_others_may_share_is_never_raised() -> None:
    watched = Watched()
    with watched, rules("transforms"):
        assert occasions() == ["always", "transforms"]
    assert watched.when == "always"


@pytest.mark.usefixtures("registry")
def test_the_rules_of_both_occasions_hold_inside_inner_steps() -> None:
    calls: list[str] = []

    def of(name: str, function: Any) -> Any:
        return lambda *args: calls.append(name) or function(*args)

    rule(torch.erf, why="a test", when="gradients")(of("gradients", torch.erf))
    rule(torch.erfc, why="a test", when="transforms")(of("transforms", torch.erfc))

    def loss(params: Any, x: Tensor) -> Tensor:
        return (torch.erf(params["w"] * x) + torch.erfc(params["w"])).sum()

    options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 1}
    params = {"w": torch.ones(2, requires_grad=True)}
    adapt_tasks(loss, params, torch.ones(3, 2), **options)
    assert calls == ["gradients", "transforms"]
    adapt(loss, params, torch.ones(2), **options)
    assert calls == ["gradients", "transforms", "gradients"]
