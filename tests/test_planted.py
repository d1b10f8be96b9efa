"""The checks notice planted bugs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from kit_properties import CHECKS
from planted import SOURCES, Planted, patched, planted
from planted_blind import BLIND
from planted_known import LOOPS, MODULES, TASKS
from planted_optim import OPTIMIZERS
from planted_peers import PEERS
from planted_report import BLIND as BLIND_ONES
from planted_report import FOREIGN, KNOWN, PROPERTY
from planted_runs import Runs, Verdict

OURS = (*MODULES, *TASKS, *LOOPS, *OPTIMIZERS)
LOOKED_FOR_BY = {
    "counters are not cloned": "stateless",
    "slope of the inverse deviation scaled twice": "meta_grads",
    "attention inputs that are one tensor": "module_grads",
    "padding is counted in the mean of a bag": "over_tasks",
    "task dimension swapped with the first": "over_tasks",
    "gradients of all tasks transformed as one": "adapt_many",
    "amsgrad divides by the present average": "optimizer",
    "recomputed gradients forget their cotangents": "meta_grads",
    "ridge left out of the equation": "solves",
    "tensors of the batch taken for constants": "modes",
}
"""Blind bug -> the property for what it is said to break."""
EXAMPLES = 100
SAMPLE = 5  # in an ordinary run each fifth bug is tried; with --planted all are


@pytest.mark.parametrize("bug", [*OURS, *BLIND], ids=lambda bug: bug.name)
def test_a_planted_bug_fits_its_file_and_compiles(bug: Planted) -> None:
    text = patched(bug)
    assert text != (SOURCES / "statelessify" / bug.file).read_text(encoding="utf-8")
    compile(text, bug.file, "exec")


def test_names_are_unique_and_each_bug_has_its_property() -> None:
    bugs = [*OURS, *BLIND]
    assert len({bug.name for bug in bugs}) == len(bugs)
    assert len(BLIND) == 10
    assert {bug.check for bug in OURS} | {*LOOKED_FOR_BY.values()} <= {*CHECKS}
    assert {bug.name for bug in BLIND} == {*LOOKED_FOR_BY}


def test_a_copy_holds_the_bug_and_the_sources_do_not() -> None:
    bug = BLIND[0]
    before = (SOURCES / "statelessify" / bug.file).read_text(encoding="utf-8")
    with planted(bug) as copy:
        found = (copy / "statelessify" / bug.file).read_text(encoding="utf-8")
        assert bug.new in found
        assert bug.old not in found
    assert not copy.exists()
    assert (SOURCES / "statelessify" / bug.file).read_text(encoding="utf-8") == before


def test_old_text_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="stands 0 times"), planted(BLIND[0]._replace(old="no such text")):
        pass


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with Runs() as found:
        yield found


@pytest.fixture(scope="module")
def alarms(runs: Runs, pytestconfig: pytest.Config) -> Callable[[str], str]:
    """What a property says of the library as it is, with the very examples that are to find bugs: nothing."""

    @cache
    def said(check: str) -> str:
        verdict = runs(SOURCES, check, EXAMPLES)
        return verdict.error or verdict.message

    return said if pytestconfig.getoption("--planted") else lambda check: ""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = 1 if metafunc.config.getoption("--planted") else SAMPLE
    if "planted_bug" in metafunc.fixturenames:
        metafunc.parametrize("planted_bug", [*OURS[::every], *BLIND[::every]], ids=lambda bug: bug.name)
    if "defect" in metafunc.fixturenames:
        metafunc.parametrize("defect", list(PEERS)[::every])


def _record(request: pytest.FixtureRequest, group: str, name: str, check: str, verdict: Verdict) -> None:
    assert not verdict.error, verdict.error
    entry: dict[str, Any] = {"group": group, "name": name, "check": check, **verdict._asdict()}
    request.node.user_properties.append((PROPERTY, entry))


def test_a_planted_bug_is_found(
    planted_bug: Planted, runs: Runs, alarms: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    check = planted_bug.check or LOOKED_FOR_BY[planted_bug.name]
    with planted(planted_bug) as copy:
        verdict = runs(copy, check, EXAMPLES)
    _record(request, KNOWN if planted_bug.check else BLIND_ONES, planted_bug.name, check, verdict)
    assert verdict.found, f"`{check}` did not notice: {planted_bug.symptom}"
    assert not alarms(check), f"`{check}` is not quiet without the bug: {alarms(check)}"


def test_a_defect_of_torch_or_higher_is_found(defect: str, runs: Runs, request: pytest.FixtureRequest) -> None:
    verdict = runs(SOURCES, defect, EXAMPLES)
    _record(request, FOREIGN, PEERS[defect], defect, verdict)
    assert verdict.found, f"`{defect}` did not notice: {PEERS[defect]}"
