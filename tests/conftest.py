"""What every test gets: a hypothesis profile, seeded random numbers, and `float64` for gradient tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import conformance_report
import planted_report
import pytest
import torch
from conformance_report import zoo_record as zoo_record
from hypothesis import Phase, settings

from statelessify.rules._registry import FUNCTIONS, MODULES, RULES
from statelessify.testing import strategies as strategies  # hypothesis seeds torch from here on

settings.register_profile("dev", max_examples=25, deadline=None, derandomize=False)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None, derandomize=False)
settings.register_profile(  # for tests/mutants.py: whether a test fails, not at what
    "mutants", max_examples=10, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
default_profile = "ci" if os.environ.get("CI") == "true" else "dev"
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default_profile))


def pytest_addoption(parser: pytest.Parser) -> None:
    for report in (conformance_report, planted_report):
        report.pytest_addoption(parser)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for report in (conformance_report, planted_report):
        report.pytest_terminal_summary(terminalreporter, config)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def registry() -> Iterator[None]:
    """Removes afterwards the rules that a test registers."""
    known, tables = list(RULES), [MODULES, *FUNCTIONS.values()]
    before = [dict(table) for table in tables]
    yield
    RULES[:] = known
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def float64() -> Iterator[None]:
    """Makes float64 the default dtype of a whole module: `pytestmark = pytest.mark.usefixtures("float64")`.

    Per module, not per test, because hypothesis refuses fixtures that it cannot renew for each example.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
