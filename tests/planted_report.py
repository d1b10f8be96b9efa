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
        yield f"{CORRECT:{names}}  alarms  seconds  cases  message"
        for check in dict.fromkeys(each["check"] for each in correct):
            of_check = [each for each in correct if each["check"] == check]
            alarms, seconds, cases = (sum(each[key] for each in of_check) for key in ("found", "seconds", "cases"))
            message = next((each["message"] for each in of_check if each["found"]), "")
            yield f"{check:{names}}  {alarms:6}  {seconds:7.1f}  {cases:5,}  {message[:100]}".rstrip()
        yield ""
        cases, alarms = sum(each["cases"] for each in correct), sum(each["found"] for each in correct)
        totals.append(f"{CORRECT}: {alarms} false alarms in {cases:,}")
    yield from totals
