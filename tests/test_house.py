"""The house itself: its names, the direction of its imports, its README, the size of its files."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "statelessify"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


README = _text(ROOT / "README.md")
TEST_COMMAND = "python -m pip install nox && python -m nox -s tests"

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "module_name",
    ["statelessify", "statelessify.optim", "statelessify.errors", "statelessify.rules", "statelessify.compat.higher"],
)
def test_all_names_exactly_what_is_public(module_name: str) -> None:
    module = importlib.import_module(module_name)
    declared = list(module.__all__)
    assert declared == sorted(set(declared))
    assert [name for name in declared if not hasattr(module, name)] == []
    assert [name for name in dir(module) if name not in declared and _looks_public(module, name)] == []


def _looks_public(module: ModuleType, name: str) -> bool:
    """A package offers all that it binds, save submodules (an import binds them); a file what it defines."""
    if name.startswith(("_", "@")):  # "@": what pytest writes into the modules of a package that has a plugin
        return False
    value = getattr(module, name)
    origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", module.__name__)
    if not hasattr(module, "__path__"):
        return origin == module.__name__
    submodule = isinstance(value, ModuleType) and origin.startswith(module.__name__ + ".")
    return not submodule and origin != "__future__"


# ---------------------------------------------------------------- imports

LEVELS = {
    name: level
    for level, names in enumerate(
        [
            "errors typing _words _traced_tree",
            "_tree _partition _structure _vacant _transforms _graph _expected _likeness _loop _random _memory",
            "rules _task_trees _pristine _reads _budget _attach _capture _split _repeats",
            "_known _lost _compiled_graphs _vmapped",
            "_compiled_calls",
            "_compile",
            "_skeleton _tasks optim implicit",
            "_layout",
            "_effects _kept _gradient _values _task_states",
            "_apply _checkpoint",
            "_stateless _trial _unroll _forward_mode _implicit",
            "_adapt _compare explain",
            "_one_task",
            "_adapt_tasks",
            "compat testing distributed",
            "__init__",
        ]
    )
    for name in names.split()
}


def import_complaints(source: Path) -> list[str]:
    """What is wrong with the imports between the files of the package that lies in `source`."""
    modules = {_module_name(path, source.parent): path for path in source.rglob("*.py")}
    inside: dict[str, set[str]] = {}  # imports between the files of one unit, which may be siblings
    complaints = []
    for module, path in sorted(modules.items()):
        unit = _unit(module)
        if unit not in LEVELS:
            complaints.append(f"`{unit}` has no level: add it to LEVELS in tests/test_house.py")
            continue
        for target in _imports(module, path, modules):
            top, _, _ = target.partition(".")
            if top == "optree" and unit != "_tree":
                complaints.append(f"`{module}` imports optree: only `_tree` may, use what it offers")
            if top != source.name:
                continue
            if _unit(target) == unit:
                inside.setdefault(module, set()).add(target)
            elif _unit(target) not in LEVELS or LEVELS[_unit(target)] >= LEVELS[unit]:
                complaints.append(f"`{module}` imports `{target}`, which does not lie on a lower level")
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as cycle:
        complaints.append(f"these import each other: {' -> '.join(cycle.args[1])}")
    return complaints


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _unit(module: str) -> str:
    """The file or folder directly below the package that `module` belongs to."""
    return [*module.split("."), "__init__"][1]


def _imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at its top or inside functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(_text(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule in modules else base


def test_imports_go_down_a_level() -> None:
    assert import_complaints(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("_tree.py", "import optree", None),
        ("optim/_sgd.py", "from . import _rule", None),
        ("optim/_sgd.py", "from ._rule import Rule", None),
        ("optim/_sgd.py", "from .._tree import tree_map", None),
        ("__init__.py", "from . import _adapt", None),
        ("_tree.py", "from statelessify._adapt import adapt", "lower level"),
        ("_tree.py", "def f():\n    from . import optim", "lower level"),
        ("_adapt.py", "import statelessify.explain", "lower level"),
        ("optim/_rule.py", "from .._adapt import adapt", "lower level"),
        ("_adapt.py", "from statelessify import optree_like", "lower level"),
        ("_adapt.py", "from optree import tree_map", "only `_tree` may"),
        ("optim/_rule.py", "from ._sgd import sgd", "import each other"),
        ("optim/_rule.py", "from . import sgd", "import each other"),
        ("novel.py", "", "add it to LEVELS"),
    ],
)
def test_imports_that_are_complained_of(tmp_path: Path, file: str, line: str, complaint: str | None) -> None:
    package = tmp_path / "statelessify"
    (package / "optim").mkdir(parents=True)
    files = dict.fromkeys(["__init__.py", "_tree.py", "_adapt.py", "explain.py", "optim/_rule.py"], "")
    files |= {"optim/__init__.py": "from ._sgd import sgd", "optim/_sgd.py": "from ._rule import Rule"}
    for name, text in (files | {file: line}).items():
        (package / name).write_text(text)
    complaints = import_complaints(package)
    assert len(complaints) == (complaint is not None), complaints
    assert complaint is None or complaint in complaints[0]


# ---------------------------------------------------------------- README and commands


def _python_blocks() -> list[object]:
    blocks = []
    for block in re.finditer(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        line = README.count("\n", 0, block.start(1))
        blocks.append(pytest.param("\n" * line + block[1], id=f"line {line + 1}"))
    return blocks


@pytest.mark.parametrize("code", _python_blocks())
def test_readme_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_named_sessions_exist() -> None:
    noxfile = ast.parse(_text(ROOT / "noxfile.py"))
    sessions = {
        node.name
        for node in noxfile.body
        if isinstance(node, ast.FunctionDef) and "nox.session" in map(ast.unparse, node.decorator_list)
    }
    for file in _project_files():
        for names in re.findall(r"\bnox (?:-\w+ )*?-s ([a-z][\w ]*)", _text(file)):
            assert set(names.split()) <= sessions | {"NAME"}, file


def test_named_scripts_exist() -> None:
    scripts = re.findall(r"\b(?:examples|benchmarks|tests)/[\w/]+\.py\b", README)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_ci_runs_what_the_readme_says() -> None:
    assert TEST_COMMAND in README
    assert TEST_COMMAND in _text(ROOT / ".ci" / "run")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("folder", "most_lines"), [("src", 350), ("examples", 150)])
def test_files_are_short(folder: str, most_lines: int) -> None:
    """A file that outgrows its limit is two concepts."""
    lengths = {file: len(_text(file).splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {str(file): length for file, length in lengths.items() if length > most_lines} == {}


def _project_files() -> list[Path]:
    tops = ["*.md", "*.toml", "*.txt", "*.py", "*.yaml", "LICENSE", ".gitignore"]
    folders = ["src", "tests", "examples", "benchmarks", "docs", ".ci", ".github"]
    files = [file for pattern in tops for file in ROOT.glob(pattern)]
    files += [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    return [file for file in files if "__pycache__" not in file.parts and file.suffix != ".png"]


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"\b(?:pypi|pythonhosted|npmjs|anaconda|download\.pytorch)\.(?:org|com)\b", id="registry"),
        pytest.param(r"(?<![\w.~/-])/(?:work|tmp|home|root|opt|mnt|Users)/\w", id="path of one machine"),
    ],
)
def test_files_name_no(pattern: str) -> None:
    named = {str(file): re.findall(pattern, _text(file)) for file in _project_files()}
    assert {name: found for name, found in named.items() if found} == {}
