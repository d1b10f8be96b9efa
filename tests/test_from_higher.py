"""Programs written for `higher` run on `statelessify.compat.higher` as they stand, and what differs is said once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statelessify import errors
from statelessify.compat import higher as ours
from statelessify.compat.higher import _differences

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compares a number with `is`, which is a SyntaxWarning
    import higher as real

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "from-higher.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("float64")


def python(code: str, *arguments: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---------------------------------------------------------------- whole programs

PROGRAMS: dict[str, tuple[dict[str, int], list[str]]] = {  # small settings, and which differences are said
    "maml_batchnorm": ({"meta_steps": 5, "tasks": 4, "test_tasks": 5}, []),
    "learned_rates": ({"meta_steps": 5, "test_tasks": 5}, ["bools"]),
    "learned_loss": ({"meta_steps": 10, "test_tasks": 10}, []),
}

RUN = """
import json, runpy, sys, torch
torch.set_default_dtype(torch.float64)
program, settings, library = sys.argv[1:]
if library == "ours":
    import statelessify.compat.higher
    sys.modules["higher"] = statelessify.compat.higher
table = runpy.run_path(program)["main"](**json.loads(settings))
said = sorted(sys.modules["statelessify.compat.higher._differences"]._said) if library == "ours" else []
print(json.dumps({"table": table, "said": said, "library": sys.modules["higher"].__name__}))
"""


def run(program: str, library: str) -> tuple[str, dict[str, Any]]:
    """What a program prints, and what its `main` returns."""
    settings, _ = PROGRAMS[program]
    printed = python(RUN, str(ROOT / "examples" / "from_higher" / f"{program}.py"), json.dumps(settings), library)
    *text, returned = printed.splitlines()
    return "\n".join(text), json.loads(returned)


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, (dict, list)):
        return [leaf for item in (tree.values() if isinstance(tree, dict) else tree) for leaf in numbers(item)]
    return [tree]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_computes_the_same_numbers(program: str) -> None:
    (text, theirs), (our_text, own) = run(program, "real"), run(program, "ours")
    assert theirs["library"] == "higher"
    assert own["library"] == "statelessify.compat.higher"
    assert len(set(numbers(theirs["table"]))) > 3
    assert numbers(own["table"]) == pytest.approx(numbers(theirs["table"]), rel=1e-10, abs=1e-12)
    assert our_text == text
    assert own["said"] == PROGRAMS[program][1]


def test_the_programs_import_no_more_of_the_library_than_its_name() -> None:
    files = sorted((ROOT / "examples" / "from_higher").glob("*.py"))
    assert [file.stem for file in files] == sorted(PROGRAMS)
    for file in files:
        code = file.read_text(encoding="utf-8")
        imports = re.findall(r"^(?:import|from)\b.*$", code, re.MULTILINE)
        assert [line for line in imports if "higher" in line or "statelessify" in line] == ["import higher"]
        assert len(code.splitlines()) < 120


# ---------------------------------------------------------------- the name `higher`


def test_the_alias_reaches_submodules_and_makes_no_second_copy() -> None:
    (line,) = re.findall(r"^import sys, .*sys\.modules.*$", PAGE, re.MULTILINE)
    python(
        line + "\n"
        "import higher.patch\n"
        "from higher.optim import DifferentiableSGD\n"
        "import higher.utils as u\n"
        "from higher import innerloop_ctx, optim\n"
        "import higher, statelessify.compat.higher as ours\n"
        "import statelessify.compat.higher.patch, statelessify.compat.higher.utils\n"
        "assert higher is ours and innerloop_ctx is ours.innerloop_ctx\n"
        "assert higher.patch is statelessify.compat.higher.patch is sys.modules['higher.patch']\n"
        "assert u is statelessify.compat.higher.utils and optim is ours.optim is sys.modules['higher.optim']\n"
        "assert DifferentiableSGD is ours.optim.DifferentiableSGD\n"
        "assert DifferentiableSGD.__module__.startswith('statelessify.')\n"
        "copies = [m for name, m in sys.modules.items() if name.startswith('statelessify.compat.higher.')]\n"
        "assert len(copies) == len({id(m) for m in copies}) == len({m.__file__ for m in copies})\n"
    )


def test_a_submodule_that_there_is_not_is_not_found() -> None:
    python(
        "import sys, statelessify.compat.higher; sys.modules['higher'] = statelessify.compat.higher\n"
        "try:\n    import higher.nothing\n"
        "except ModuleNotFoundError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )


@pytest.mark.parametrize("imported", ["statelessify", "statelessify.compat.higher"])
def test_the_real_library_stays_importable(imported: str) -> None:
    python(
        f"import {imported}, higher, higher.patch, os.path\n"
        "from higher.optim import DifferentiableSGD\n"
        "assert os.path.basename(os.path.dirname(higher.__file__)) == 'higher'\n"
        "assert 'statelessify' not in higher.__file__ + higher.patch.__file__ + DifferentiableSGD.__module__\n"
    )


# ---------------------------------------------------------------- deliberate differences


def one_step(library: ModuleType, kind: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of a linear map after a step of its patched copy, and after a step of torch."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = kind(net.parameters(), **options)
    with library.innerloop_ctx(net, optimizer) as (fmodel, diffopt):
        diffopt.step((fmodel(x) ** 2).sum())
    (net(x) ** 2).sum().backward()
    optimizer.step()
    return list(fmodel.parameters()), list(net.parameters())


def follows_torch(library: ModuleType, kind: Any, **options: Any) -> bool:
    return all(map(torch.allclose, *one_step(library, kind, **options)))


def derivative(library: ModuleType, kind: Any, learned: dict[str, Any], steps: int = 3, **options: Any) -> list[Any]:
    """The derivatives of the loss after some steps by the tensors in `learned`, and by finite differences."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), torch.randn(4, 3)

    def loss(values: list[float]) -> tuple[Tensor, list[Tensor]]:
        leaves = [torch.tensor(value, requires_grad=True) for value in values]
        rest = iter(leaves)
        override = {
            name: [tuple(next(rest) for _ in value) if isinstance(value, tuple) else next(rest)]
            for name, value in learned.items()
        }
        with library.innerloop_ctx(net, kind(net.parameters(), **options), override=override) as (fmodel, diffopt):
            for _ in range(steps):
                diffopt.step((fmodel(x) ** 2).sum())
            return (fmodel(x) ** 2).sum(), leaves

    start = numbers([list(value) if isinstance(value, tuple) else value for value in learned.values()])
    found = torch.autograd.grad(*loss(start), allow_unused=True)
    for index, gradient in enumerate(found):
        ends = []
        for shift in (1e-6, -1e-6):
            moved = list(start)
            moved[index] += shift
            ends.append(loss(moved)[0].item())
        difference = (ends[0] - ends[1]) / 2e-6
        yield gradient is not None and abs(gradient.item() - difference) < 1e-5 * max(1, abs(difference))


def is_exact(library: ModuleType, kind: Any, learned: dict[str, Any], **options: Any) -> bool:
    return all(derivative(library, kind, learned, **options))


def runs_hooks(library: ModuleType) -> bool:
    net, calls = nn.Linear(1, 1), []
    net.register_forward_hook(lambda *args: calls.append(1))
    library.monkeypatch(net)(torch.ones(1))
    return bool(calls)


def keeps_frozen(library: ModuleType) -> bool:
    net = nn.Linear(1, 1)
    net.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with library.innerloop_ctx(net, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        diffopt.step(fmodel(torch.ones(1)).sum())
    return not list(fmodel.parameters())[1].requires_grad


def keeps_updates(library: ModuleType) -> bool:
    net, x = nn.Linear(1, 1), torch.ones(1)
    with library.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
        diffopt.step(fmodel(x).sum())
        before = fmodel(x).item()
        fmodel.track_higher_grads = False
        diffopt.step(fmodel(x).sum())
        return fmodel(x).item() != before


def uses_given_weights(library: ModuleType) -> bool:
    net = nn.MultiheadAttention(4, 2)
    fmodel = library.monkeypatch(net)
    x, new = torch.randn(3, 1, 4), [torch.randn_like(p) for p in net.parameters()]
    expected = torch.func.functional_call(net, dict(zip(dict(net.named_parameters()), new, strict=True)), (x, x, x))
    return torch.allclose(fmodel(x, x, x, params=new)[0], expected[0])


def keeps_fraction(library: ModuleType) -> bool:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    library.optim.apply_trainable_opt_params(optimizer, {"lr": [torch.tensor(0.5)]})
    return optimizer.param_groups[0]["lr"] == 0.5


class Scaled(nn.Linear):
    def forward(self, x: Tensor, params: float = 1.0) -> Tensor:
        return params * super().forward(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, params=2.0)


def passes_params(library: ModuleType) -> bool:
    net, x = Outer(), torch.ones(1)
    return torch.equal(library.monkeypatch(net)(x), net(x))


def stays_pure(library: ModuleType) -> bool:
    net = nn.Linear(1, 1)
    fmodel = library.monkeypatch(net)
    before = list(fmodel.parameters())
    torch.func.grad(lambda *params: fmodel(torch.ones(1), params=params).sum())(*before)
    return all(p is q for p, q in zip(before, fmodel.parameters(), strict=True))


SITUATIONS: dict[str, Callable[[ModuleType], bool]] = {  # with higher each of them is false
    "maximize": lambda library: follows_torch(library, torch.optim.SGD, lr=0.1, maximize=True),
    "eps": lambda library: follows_torch(library, torch.optim.Adam, lr=0.1, eps=1e-2),
    "betas": lambda library: is_exact(library, torch.optim.Adam, {"betas": (0.9, 0.99)}, lr=0.1),
    "asgd": lambda library: is_exact(
        library, torch.optim.ASGD, {"lr": 0.01, "lambd": 0.1, "alpha": 0.7}, lr=0.01, lambd=0.1, alpha=0.7
    ),
    "momentum": lambda library: is_exact(library, torch.optim.SGD, {"momentum": 0.0}, lr=0.01),
    "hooks": runs_hooks,
    "buffers": lambda library: bool(library.patch.make_functional(nn.BatchNorm1d(1))._buffers),
    "frozen": keeps_frozen,
    "untracked": keeps_updates,
    "late": uses_given_weights,
    "bools": lambda library: (
        "nesterov" not in library.optim.get_trainable_opt_params(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    ),
    "whole": keeps_fraction,
    "nested": passes_params,
    "pure": stays_pure,
}


@pytest.fixture
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_differences, "_said", set())


def said(situation: Callable[[ModuleType], bool]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert situation(ours)
    assert all(warning.category is ours.DifferenceWarning for warning in caught), [str(w.message) for w in caught]
    return caught


@pytest.mark.usefixtures("_nothing_said")
@pytest.mark.parametrize("key", SITUATIONS)
def test_a_difference_is_said_once(key: str) -> None:
    text = re.escape(_differences.DIFFERENCES[key]).replace(r"\{kind\}", r"\w+")
    first = [w for w in said(SITUATIONS[key]) if re.match(text, str(w.message))]
    assert [w.filename for w in first] == [__file__]
    assert "docs/from-higher.md" in str(first[0].message)
    assert said(SITUATIONS[key]) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", SITUATIONS)
def test_it_is_a_difference(key: str) -> None:
    assert not SITUATIONS[key](real)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", [real, ours], ids=["real", "ours"])
def test_the_measures_find_nothing_where_there_is_nothing(library: ModuleType) -> None:
    assert follows_torch(library, torch.optim.SGD, lr=0.1)
    assert follows_torch(library, torch.optim.Adam, lr=0.1, eps=1e-20)
    assert is_exact(library, torch.optim.SGD, {"lr": 0.01, "momentum": 0.5}, lr=0.01)
    assert is_exact(library, torch.optim.Adam, {"lr": 0.1}, lr=0.1)


def test_the_page_lists_every_difference_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == list(_differences.DIFFERENCES)
    assert rows == list(SITUATIONS)


class Roundabout(nn.Module):
    """Reaches its layer by another method than forward, and by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.held = self.layer.forward

    def encode(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x)


@pytest.mark.parametrize("method", ["encode", "forward"])
def test_the_latest_weights_are_used_on_every_way(method: str) -> None:
    """Where higher uses old ones; nothing is said, for a call would have to look."""
    for library in (real, ours):
        fmodel = library.monkeypatch(Roundabout())
        for _ in range(2):
            fmodel.update_params([p * 2 for p in fmodel.parameters()])
            out = getattr(fmodel, method)(torch.ones(1))
        weight, bias = fmodel.parameters()
        assert (out.item() == (weight + bias).item()) is (library is ours)


# ---------------------------------------------------------------- what raises, and was silent


def called_with(*shapes: tuple[int, ...]) -> Callable[[ModuleType], Any]:
    return lambda library: library.monkeypatch(nn.Linear(3, 2))(torch.ones(3), params=list(map(torch.ones, shapes)))


def wrapped(library: ModuleType) -> None:
    library.monkeypatch(nn.DataParallel(nn.Linear(1, 1)))(torch.ones(1))


def overridden(**override: Any) -> Callable[[ModuleType], Any]:
    def step(library: ModuleType) -> None:
        net = nn.Linear(3, 2)
        with library.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), override=override) as (f, diffopt):
            diffopt.step(f(torch.ones(3)).sum())

    return step


def applied(value: Any, to: Any) -> Callable[[ModuleType], Any]:
    def apply(library: ModuleType) -> None:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        optimizer.param_groups[0]["own"] = to
        library.optim.apply_trainable_opt_params(optimizer, {"own": [value]})

    return apply


def traced(library: ModuleType) -> None:
    fmodel = library.monkeypatch(nn.Linear(1, 1))

    def loss(*params: Tensor) -> Tensor:
        fmodel.update_params(params)
        return fmodel(torch.ones(1)).sum()

    torch.func.grad(loss)(*list(fmodel.parameters()))


class Block(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.recompute = nn.Linear(3, 3), nn.Linear(3, 3), recompute

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)


def through_a_block(library: ModuleType, recompute: bool = True) -> Tensor:
    """The meta-gradient through two steps."""
    net, x = Block(recompute), torch.linspace(-1, 1, 12).view(4, 3)
    with library.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.5), copy_initial_weights=False) as (f, step):
        for _ in range(2):
            step.step((f(x) ** 2).mean())
        (f(x) ** 2).mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


SILENT: dict[str, tuple[Callable[[ModuleType], Any], type[errors.StatelessifyError], type[Exception]]] = {
    "another shape": (called_with((1, 3), (1,)), errors.ShapeError, ValueError),
    "too long": (called_with((2, 3), (2,), (2,)), errors.FastWeightsIndexError, IndexError),
    "traced": (traced, errors.FastWeightsError, ValueError),
    "checkpointing": (through_a_block, errors.CheckpointError, RuntimeError),
    "negative": (overridden(lr=[-0.1]), errors.HyperparameterError, ValueError),
    "not finite": (overridden(lr=[float("nan")]), errors.HyperparameterError, ValueError),
    "a switch": (overridden(nesterov=[torch.tensor(0.0)]), errors.HyperparameterError, ValueError),
    "other keys": (applied({"b": torch.tensor(1.0)}, {"a": 1.0}), errors.HyperparameterError, ValueError),
    "too short": (applied((torch.tensor(1.0),), (1.0, 2.0)), errors.HyperparameterError, ValueError),
    "DataParallel": (wrapped, errors.ModuleError, TypeError),
}


@pytest.mark.parametrize("situation", SILENT)
def test_what_was_silent_raises(situation: str) -> None:
    run_with, error, builtin = SILENT[situation]
    run_with(real)
    with pytest.raises(error):
        run_with(ours)
    assert issubclass(error, builtin)
    assert f"`{error.__name__}`" in PAGE


def test_checkpointing_under_higher_is_as_far_off_as_the_page_says() -> None:
    exact = through_a_block(ours, recompute=False)
    assert torch.allclose(through_a_block(real, recompute=False), exact)
    off = (through_a_block(real) - exact).norm() / exact.norm()
    (percent,) = re.findall(r"a meta-gradient (\d+) % off", PAGE)
    assert round(100 * off.item()) == int(percent)


def test_a_loss_that_does_not_reach_the_weights_is_said() -> None:
    net = nn.Linear(1, 1)
    for library in (real, ours):
        with library.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
            before = list(fmodel.parameters())
            with pytest.warns(UserWarning, match="does not reach") if library is ours else nullcontext():
                diffopt.step(net(torch.ones(1)).sum())
            assert all(map(torch.equal, before, fmodel.parameters()))


# ---------------------------------------------------------------- the page


def test_both_columns_of_the_page_compute_the_same_meta_gradient() -> None:
    found = []
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[-2:]:
        names: dict[str, Any] = {}
        exec(compile(block, "docs", "exec"), names)
        found.append(torch.cat([p.grad.flatten() for p in names["net"].parameters()]))
    assert torch.allclose(*found, rtol=1e-12)
    assert found[0].abs().min() > 1e-3


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) < 120
