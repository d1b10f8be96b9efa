"""Which planted bugs were found, by which property and how fast, as a table at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

PROPERTY = "planted"
KNOWN, BLIND, FOREIGN = "known bugs", "blind bugs", "defects of torch and higher"
CORRECT = "correct cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--planted", action="store_true", help="try all planted bugs and 2,000 correct cases, and print their table"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    records = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    for line in table(records) if config.getoption("--planted") else ():
        terminalreporter.write_line(line)


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each bug, a line for each property on correct cases, and the totals at the end."""
    bugs = [each for each in records if each["group"] != CORRECT]
    correct = [each for each in records if each["group"] == CORRECT]
    names, checks = (max((len(each[key]) for each in records), default=0) for key in ("name", "check"))
    totals: list[str] = []
    for group in (KNOWN, BLIND, FOREIGN):
        members = [each for each in bugs if each["group"] == group]
        if members:
            yield f"{group:{names}}  {'property':{checks}}  found  seconds  message"
        for each in members:
            found = "yes" if each["found"] else "NO"
            line = f"{each['name']:{names}}  {each['check']:{checks}}  {found:5}  {each['seconds']:7.1f}"
            yield f"{line}  {each['message'][:100]}".rstrip()
        yield from [""] if members else []
        if members:
            totals.append(f"{group}: {sum(each['found'] for each in members)} of {len(members)} found")
    if correct:
        yield f"{CORRECT:{names}}  {'property':{checks}}  alarm  seconds  cases"
    for each in correct:
        alarm = "YES" if each["found"] else "no"
        line = f"{each['name']:{names}}  {each['check']:{checks}}  {alarm:5}  {each['seconds']:7.1f}"
        yield f"{line}  {each['cases']:,}  {each['message'][:100]}".rstrip()
    if correct:
        yield ""
        cases, alarms = sum(each["cases"] for each in correct), sum(each["found"] for each in correct)
        totals.append(f"{CORRECT}: {alarms} false alarms in {cases:,}")
    yield from totals
