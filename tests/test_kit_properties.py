"""The checks say nothing of the library as it is."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from kit_properties import CHECKS, PROPERTIES, run
from planted_report import CORRECT, PROPERTY

CASES = 2000  # of all properties, with --planted
PART = 5  # of the examples of a profile below `deep`: each bug that is looked for tries the others as well


def examples_of(profile: int, planted: bool) -> int:
    """How many examples a property gets."""
    if planted:
        return -(-CASES // len(CHECKS))
    return profile if profile >= 1000 else -(-profile // PART)


@pytest.mark.filterwarnings("default")  # torch warns of batching rules that it lacks
@pytest.mark.parametrize(("name", "stratum"), [(name, stratum) for name in CHECKS for stratum in PROPERTIES[name]])
def test_correct_code_passes(name: str, stratum: str, request: pytest.FixtureRequest) -> None:
    begin = time.process_time()
    examples = examples_of(settings().max_examples, request.config.getoption("--planted"))
    entry = {"group": CORRECT, "name": stratum, "check": name, "cases": 0, "found": True, "message": ""}
    request.node.user_properties.append((PROPERTY, entry))
    try:
        entry["cases"] = run(name, stratum, examples)
        entry["found"] = False
    except AssertionError as error:
        entry["message"] = next(iter(str(error).splitlines()), "")
        raise
    finally:
        entry["seconds"] = time.process_time() - begin


def test_examples() -> None:
    assert [examples_of(100, False), examples_of(25, False), examples_of(2000, False)] == [20, 5, 2000]
    assert examples_of(100, True) * len(CHECKS) >= CASES
