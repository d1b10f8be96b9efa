"""The benchmarks' contenders agree, on small problems and without timing; reports and results say what was measured."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("[!_]*.py"))


def imported(script: Path) -> set[str]:
    """The top-level packages that a script imports, at its top or inside functions, and those of its neighbours."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    names = {name.partition(".")[0] for name in names}
    own = {name for name in names if (BENCHMARKS / f"{name}.py").is_file()}
    return (names - own).union(*(imported(BENCHMARKS / f"{name}.py") for name in own))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_contenders_agree(script: Path, tmp_path: Path) -> None:
    packages = imported(script)
    missing = [name for name in sorted(packages) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; the session `bench` has it")
    command = [sys.executable, str(script), "--check", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the frame


@pytest.fixture
def frame(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """`_report` and `_results`, imported as the scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("_report", "_results"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("_report"), importlib.import_module("_results")


def test_a_target_is_met_by_the_number_itself(frame: tuple[ModuleType, ModuleType]) -> None:
    row = frame[0].Row
    assert row("a", 15.0, least=15).target == "at least 15, met"
    assert row("a", 14.999, least=15).target == "at least 15, **missed**"
    assert (row("a", 14.999).shown, row("a", 14.999).met, row("a", 14.999).target) == ("15", None, "")
    assert row("a", 1.4, most=1.4).met
    assert not row("a", 1.4001, most=1.4).met
    assert not row("a", float("nan"), least=1).met
    assert (row("a", 0).shown, row("a", 1234.5).shown) == ("0", "1234")


def test_from_reports_to_results_and_readme(
    frame: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _report, _results = frame
    here, data = tmp_path / "benchmarks", tmp_path / "pictures"
    here.mkdir()
    data.mkdir()
    (data / "one.png").write_bytes(b"picture")
    (here / "one.py").touch()
    rows = [
        _report.Row("peer / ours", 16.2, least=15, cells={"ms": "6.9"}, headline="how fast"),
        _report.Row("other / ours", 2.0, least=3),
        _report.Row("bare", 1.0),
    ]
    _report.report(str(here / "one.py"), "How fast?", rows, out=data, pictures=[data / "one.png"])
    assert json.loads((data / "one.json").read_text())["rows"][0]["headline"] == "how fast"

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{_results.SUMMARY}\n|---|---|---|\n| old | 1 | |\n\nafter\n")
    monkeypatch.setattr(_results, "HERE", here)
    monkeypatch.setattr(sys, "argv", ["", "--data", str(data), "--to", str(here), "--readme", str(readme)])
    _results.main()
    line = "| how fast | 16.2 | at least 15, met |"
    assert readme.read_text() == f"before\n\n{_results.SUMMARY}\n|---|---|---|\n{line}\n\nafter\n"
    written = (here / "RESULTS.md").read_text()
    assert line in written
    assert "1 of 2 targets are met" in written
    assert "| peer / ours | 6.9 | 16.2 | at least 15, met |" in written
    assert "(pictures/one.png)" in written
    assert (here / "pictures" / "one.png").read_bytes() == b"picture"

    (here / "two.py").touch()
    with pytest.raises(SystemExit, match=r"no data from `two.py`"):
        _results.main()


def test_fresh_processes(frame: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    _report, _ = frame
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint('noise')\nprint(json.dumps({sys.argv[1]: int(os.environ['N'])}))\n")
    assert _report.fresh(str(script), "a", count=2, N="3") == [{"a": 3}, {"a": 3}]
    assert _report.medians([{"a": 1, "b": 5}, {"a": 3, "b": 4}, {"a": 2, "b": 9}]) == {"a": 2, "b": 5}
    with pytest.raises(RuntimeError, match="ended with 1"):
        _report.fresh(str(script), "a", N="none")


def test_the_readme_has_the_summary_of_the_results() -> None:
    readme, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/RESULTS.md"))
    summaries = [text.partition("| | measured | target |\n")[2].partition("\n\n")[0] for text in (readme, results)]
    assert summaries[0]
    assert summaries[0] == summaries[1]
    for folder, text in ((ROOT, readme), (BENCHMARKS, results)):
        pictures = [part.partition(")")[0] for part in text.split("](")[1:] if part.partition(")")[0].endswith(".png")]
        assert pictures
        assert [picture for picture in pictures if not (folder / picture).is_file()] == []
