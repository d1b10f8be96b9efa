"""What conformance tests found, as a table at the end of the run: `pytest --conformance`.

A test of any group leaves one record; see `conform`. This works under xdist, because a record travels with the report
of its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from zoo import ZOO

PROPERTY = "conformance"
PASSED, MISSING, FAILED = "ok", "-", "FAIL"  # MISSING: eager autograd itself has no such derivative


class NotApplicable(Exception):
    """Eager autograd itself cannot do what a check asks for; the reason is what it said."""


def conform(
    request: pytest.FixtureRequest,
    group: str,
    of: int,
    member: str,
    cases: Sequence[Any],
    checks: Mapping[str, Callable[[Any], None]],
) -> None:
    """Run all checks on all cases, leave a record of it, and fail where one of them failed.

    Args:
        request: the test's.
        group: the section of the table, such as "torch modules".
        of: how many members the group has.
        member: a line of the table; several tests (modes, sizes) may share one.
        cases: what is checked, each with a `name`.
        checks: the columns.
    """
    verdicts: dict[str, list[str]] = {check: [] for check in checks}
    reasons = []
    for case in cases:
        for check, call in checks.items():
            verdict, why = _verdict(call, case)
            verdicts[check].append(verdict)
            if verdict == FAILED:
                reasons.append(f"{case.name}, {check}: {why}")
    entry = {"group": group, "of": of, "member": member, "samples": len(cases), "checks": verdicts}
    request.node.user_properties.append((PROPERTY, entry))
    assert not reasons, "\n".join(reasons)
    assert all(PASSED in verdict for verdict in zip(*verdicts.values(), strict=True)), "a case that nothing checks"


def _verdict(check: Callable[[Any], None], case: Any) -> tuple[str, str]:
    try:
        check(case)
    except NotApplicable as reason:
        return MISSING, str(reason)
    except Exception as error:  # whatever the library or torch raises is a failure of this check, not of the others
        return FAILED, f"{type(error).__name__}: {error}"
    return PASSED, ""


ZOO_TITLES = {
    "test_agrees_with_the_module": "forward, gradient",
    "test_touches_nothing": "purity",
    "test_pickles_and_deep_copies_whenever_the_module_does": "pickles",
    "test_second_derivatives_are_those_of_the_module": "second order",
    "test_functional_second_derivatives_are_those_of_the_module": "grad(grad)",
    "test_vmap_equals_a_loop_of_ordinary_modules": "vmap",
    "test_gradients_per_task_are_those_of_ordinary_modules": "vmap(grad)",
    "test_tasks_of_what_vmaps_are_batched": "over_tasks",
    "test_tasks_of_what_torch_cannot_batch_run_in_a_loop": "over_tasks",
    "test_meta_gradients_over_tasks_are_those_of_a_loop": "meta-gradient",
}


@pytest.fixture(autouse=True)
def zoo_record(request: pytest.FixtureRequest) -> None:
    """A test of a member of the zoo leaves a record, whose verdict is the outcome of the test."""
    member = getattr(request.node, "callspec", None) and request.node.callspec.params.get("member")
    name = next((name for name, each in ZOO.items() if each is member), None)
    title = ZOO_TITLES.get(getattr(request.node, "originalname", ""))
    if name is not None and title is not None:
        entry = {"group": "zoo modules", "of": len(ZOO), "member": name, "samples": 1, "checks": {title: []}}
        request.node.user_properties.append((PROPERTY, entry))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance", action="store_true", help="run every sample of the conformance tests, and print their table"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--conformance"):
        reports = [report for found in terminalreporter.stats.values() for report in found]
        records = [
            _with_outcome(value, report.outcome)
            for report in reports
            if getattr(report, "when", None) == "call"  # the teardown's report carries the same properties
            for name, value in report.user_properties
            if name == PROPERTY
        ]
        for line in table(records):
            terminalreporter.write_line(line)


def _with_outcome(entry: dict[str, Any], outcome: str) -> dict[str, Any]:
    verdict = PASSED if outcome == "passed" else FAILED
    return {**entry, "checks": {check: verdicts or [verdict] for check, verdicts in entry["checks"].items()}}


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """One section for each group: a line for each member, and the totals at the very end."""
    groups = sorted({each["group"] for each in records})
    totals = []
    for group in groups:
        of_group = [each for each in records if each["group"] == group]
        members: dict[str, list[dict[str, Any]]] = {}
        for each in of_group:
            members.setdefault(each["member"], []).append(each)
        checks = list(dict.fromkeys(check for each in of_group for check in each["checks"]))
        yield from _section(group, members, checks)
        samples = sum(each["samples"] for each in of_group)
        good = sum(_sound(found) for found in members.values())
        totals.append(f"{group}: {good} of {of_group[0]['of']} ({samples:,} samples)")
    yield from totals


def _section(group: str, members: dict[str, list[dict[str, Any]]], checks: list[str]) -> Iterator[str]:
    words = [check.split() for check in checks]  # a heading of several lines, so that the columns stay narrow
    height = max(len(each) for each in words)
    widths = [max(len(FAILED), *map(len, each)) for each in words]
    first = max(len(group), *map(len, members))
    for line in range(height):
        heads = [each[line] if line < len(each) else "" for each in words]
        left = [f"{group if line == 0 else '':{first}}", f"{'samples' if line == 0 else '':>7}"]
        yield "  ".join([*left, *(f"{head:^{width}}" for head, width in zip(heads, widths, strict=True))]).rstrip()
    for member in sorted(members):
        found = members[member]
        cells = [_cell(found, check) for check in checks]
        left = [f"{member:{first}}", f"{sum(each['samples'] for each in found):>7}"]
        yield "  ".join([*left, *(f"{cell:^{width}}" for cell, width in zip(cells, widths, strict=True))]).rstrip()
    yield ""


def _cell(found: list[dict[str, Any]], check: str) -> str:
    verdicts = {verdict for each in found for verdict in each["checks"].get(check, [])}
    return next((each for each in (FAILED, PASSED, MISSING) if each in verdicts), MISSING)


def _sound(found: list[dict[str, Any]]) -> bool:
    """A member counts where nothing failed, and something was checked."""
    verdicts = {verdict for each in found for some in each["checks"].values() for verdict in some}
    return PASSED in verdicts and FAILED not in verdicts
