"""Mutants: small mistakes in the core files, each of which the tests that reach its line should notice.

`python tests/mutants.py [FILE ...]`, with files as `_tree.py` or `optim/_adam.py`. The mistakes are mutmut's. It would
put all of them into one module and choose among them at each call; this library counts references, walks frames and is
traced, so here each is imported in the place of the file it is in, by a process forked from one that has torch.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import libcst as cst
import pytest
import torch
from coverage import CoverageData
from mutmut.mutation.file_mutation import Mutation, create_mutations

ROOT = Path(__file__).parents[1]
SOURCE = Path(str(find_spec("statelessify").origin)).parent  # pyright: ignore[reportOptionalMemberAccess]
MADE = ROOT / ".mutants"
CORE = (
    "_stateless _apply _skeleton _tree _partition _adapt _adapt_tasks _tasks _unroll _checkpoint _gradient _implicit "
    "_loop implicit/_solve optim/_sgd optim/_adam optim/_rule"
)
TESTS = (
    "adapt adapt_input adapt_tasks adapt_tasks_calls adapt_tasks_optimizers adapt_tasks_rules apply apply_members "
    "apply_transforms checkpoint checkpoint_errors forward_mode gradient graph implicit implicit_calls kept known "
    "learned_optimizer one_task optim optim_errors optim_extremes optim_given optim_hyperparameters optim_purity "
    "optim_rules optim_torch optim_transforms own_optimizer partition pristine root schedule skeleton solve "
    "solve_derivatives stateless structure tasks threads tree truncate vmapped"
)
PYTEST = ("-q", "-x", "--no-header", "--assert=plain", "-p", "no:cacheprovider")  # rewriting imports the package itself
WARM = ("hypothesis.strategies", "torch._dynamo", "zoo")  # what takes long to import and is the same for all mutants
SECONDS = 20.0  # of tests for one mutant, by what they take without it
DECISIONS: tuple[type[cst.CSTNode], ...] = (
    *(cst.ComparisonTarget, cst.BooleanOperation, cst.BinaryOperation, cst.UnaryOperation, cst.IfExp, cst.AugAssign),
    *(cst.BaseNumber, cst.Name, cst.BaseCompOp, cst.Break, cst.Continue, cst.Lambda),
)
"""Mutants that choose another way or number; nearly all others make a None of something, which nearly always fails."""


def in_a_fork(target: Callable[..., int], *args: Any, seconds: float | None = None) -> int | None:
    """What a function returns, run in a process of its own; None if that took too long."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_silent, args=(target, args))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _silent(target: Callable[..., int], args: tuple[Any, ...]) -> None:
    log = os.open(MADE / "last.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(target(*args))


# Which tests reach a line -------------------------------------------------------------------------------------------


class Clock:
    """A pytest plugin that writes down how long each test took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


def stamp() -> str:
    """Of the code that was measured: lines of other code lie elsewhere."""
    files = [*sorted(SOURCE.rglob("*.py")), *(ROOT / f"tests/test_{name}.py" for name in TESTS.split())]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def measure(files: list[str]) -> int:
    os.environ["COVERAGE_FILE"] = str(MADE / "coverage")
    clock = Clock()
    options = ["--cov=statelessify", "--cov-context=test", "--cov-report="]
    outcome = pytest.main([*PYTEST, *options, *files], plugins=[clock])
    (MADE / "seconds.json").write_text(json.dumps({"stamp": stamp(), "seconds": clock.seconds}))
    return int(outcome)


def _measured() -> dict[str, Any]:
    file = MADE / "seconds.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("stamp") == stamp() else {}


class Reach:
    """The tests that run a line, the fastest first."""

    def __init__(self) -> None:
        if not _measured() and in_a_fork(measure, [f"tests/test_{name}.py" for name in TESTS.split()]) != 0:
            sys.exit(f"the tests fail without a mutant: see {MADE / 'last.log'}")
        self._seconds: dict[str, float] = _measured()["seconds"]
        self._data = CoverageData(str(MADE / "coverage"))
        self._data.read()
        self._lines: dict[Path, dict[int, list[str]]] = {}

    def tests(self, file: Path, lines: range, most: float) -> tuple[list[str], float]:
        """Tests that run one of some lines and take so many seconds in all, and how long they take."""
        if file not in self._lines:
            self._lines[file] = self._data.contexts_by_lineno(str(file))
        by_line = self._lines[file]
        contexts = {context for line, contexts in by_line.items() if line in lines for context in contexts}
        found = {test for context in contexts if (test := context.rpartition("|")[0]) in self._seconds}
        chosen, total = list[str](), 0.0
        for test in sorted(found, key=lambda test: (self._seconds[test], test)):
            if total + self._seconds[test] > most and chosen:
                break
            chosen.append(test)
            total += self._seconds[test]
        return chosen, total


# Mutants ------------------------------------------------------------------------------------------------------------


class Planted(SourceFileLoader):
    """Imports one module from other code than its file has."""

    def __init__(self, name: str, path: Path, code: str) -> None:
        super().__init__(name, str(path))
        self._compiled = compile(code, str(path), "exec", dont_inherit=True)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return self._compiled


def run_with(name: str, path: Path, code: str, tests: list[str]) -> int:
    sys.meta_path.insert(0, Planted(name, path, code))  # pyright: ignore[reportArgumentType]
    return int(pytest.main([*PYTEST, "-p", "no:xdist", "-p", "no:cov", *tests]))


def mutants(file: str, decisions: int, others: int) -> tuple[int, Iterator[str]]:
    """How many mutants the functions of a file have, and the code of those in the sample.

    One in `decisions` of those that decide something, and one in `others` of the rest.
    """
    code = (SOURCE / file).read_text()
    module, mutations, _, _ = create_mutations(file, code)
    messages = _messages(module)
    every = [m for m in mutations if m.contained_by_top_level_function and m.original_node not in messages]
    every = [m for m in every if not _is_words(m)]
    shares = [decisions if isinstance(m.original_node, DECISIONS) else others for m in every]
    chosen = [m for index, m in enumerate(every) if _number(file, index) % shares[index] == 0]
    changed = (module.deep_replace(m.original_node, m.mutated_node) for m in chosen)
    return len(every), (cst.ensure_type(new, cst.Module).code for new in changed)


def _number(file: str, index: int) -> int:
    return int(hashlib.sha256(f"{file} {index}".encode()).hexdigest(), 16)


def _messages(module: cst.Module) -> set[cst.CSTNode]:
    """All that stands in the call that makes an error or a warning, and whether a zip is strict: what cannot be."""
    found: set[cst.CSTNode] = set()

    class Visitor(cst.CSTVisitor):
        def visit_Call(self, node: cst.Call) -> None:
            name = module.code_for_node(node.func)
            if name.endswith(("Error", "warn", "_warn_once")):
                found.update(_below(node))

        def visit_Arg(self, node: cst.Arg) -> None:
            if node.keyword is not None and node.keyword.value == "strict":
                found.update(_below(node))

    module.visit(Visitor())
    return found


def _below(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _below(child)


def _is_words(mutation: Mutation) -> bool:
    """A string in another case, or one that is a sentence."""
    if not isinstance(mutation.original_node, cst.SimpleString):
        return False
    new = cst.ensure_type(mutation.mutated_node, cst.SimpleString)
    return " " in mutation.original_node.value or "XX" not in new.value


def statement(tree: ast.Module, line: int) -> range:
    """The lines of the innermost statement around a line; of a function, those of its body."""
    best = range(0)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line):
            body: list[ast.stmt] = getattr(node, "body", [])
            if isinstance(node, ast.FunctionDef):
                lines = range(body[0].lineno, (node.end_lineno or line) + 1)
            else:
                lines = range(node.lineno, body[0].lineno if body else (node.end_lineno or line) + 1)
            if not body or line < body[0].lineno:
                best = lines
    return best


def difference(before: str, after: str) -> tuple[int, str]:
    """The first changed line, and what was changed."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    return int(lines[0].split()[1].split(",")[0][1:]), "\n".join(line for line in lines if not line.startswith("@@"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[f"{name}.py" for name in CORE.split()])
    parser.add_argument("--decisions", type=int, default=2, help="one in so many mutants that decide something")
    parser.add_argument("--others", type=int, default=16, help="one in so many of the rest")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of tests for one mutant")
    parser.add_argument("--again", action="store_true", help="also those that have survived before")
    parser.add_argument("--tests", nargs="*", help="run these for each mutant, not those that reach its line")
    arguments = parser.parse_args()
    MADE.mkdir(exist_ok=True)
    os.chdir(ROOT)
    os.environ.update(HYPOTHESIS_PROFILE="mutants", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    torch.set_num_threads(1)
    for module in WARM:
        import_module(module)
    gc.freeze()  # pytest collects garbage three times, which need not walk through torch
    if arguments.tests and outcome("_tree.py", (SOURCE / "_tree.py").read_text(), arguments.tests, 600) != "survived":
        sys.exit(f"the tests fail without a mutant: see {MADE / 'last.log'}")
    reach, results = None if arguments.tests else Reach(), MADE / "results.jsonl"
    known = {}
    if results.exists():
        entries = map(json.loads, results.read_text().splitlines())
        known = {(entry["file"], entry["diff"]): entry["outcome"] for entry in entries}
    for file in arguments.files:
        code = (SOURCE / file).read_text()
        tree = ast.parse(code)
        count, sample = mutants(file, arguments.decisions, arguments.others)
        outcomes = list[str]()
        for mutated in sample:
            line, diff = difference(code, mutated)
            before = known.get((file, diff))
            if before is None or (arguments.again and before != "killed"):
                tests, total = arguments.tests, 60.0
                if reach is not None:
                    tests, total = reach.tests(SOURCE / file, statement(tree, line), arguments.seconds)
                before = outcome(file, mutated, tests, 60 + 10 * total)
                with results.open("a") as out:
                    out.write(json.dumps({"file": file, "line": line, "outcome": before, "diff": diff}) + "\n")
            outcomes.append(before)
            if before != "killed":
                print(f"{file}:{line} {before}", diff, sep="\n", flush=True)
        print(f"{file}: {outcomes.count('killed')} of {len(outcomes)} killed, of {count} in all", flush=True)


def outcome(file: str, mutated: str, tests: list[str], seconds: float) -> str:
    """What tests make of a mutant."""
    if not tests:
        return "not reached"
    name = "statelessify." + file.removesuffix(".py").replace("/", ".")
    code = in_a_fork(run_with, name, SOURCE / file, mutated, tests, seconds=seconds)
    return {None: "timeout", 0: "survived"}.get(code, "killed")


if __name__ == "__main__":
    main()
