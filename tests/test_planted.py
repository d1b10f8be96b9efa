"""Planted bugs fit the library as it is now."""

from __future__ import annotations

import pytest
from planted import SOURCES, Planted, patched, planted
from planted_blind import BLIND


@pytest.mark.parametrize("bug", BLIND, ids=lambda bug: bug.name)
def test_a_planted_bug_fits_its_file_and_compiles(bug: Planted) -> None:
    text = patched(bug)
    assert text != (SOURCES / "statelessify" / bug.file).read_text(encoding="utf-8")
    compile(text, bug.file, "exec")


def test_names_are_unique() -> None:
    assert len({bug.name for bug in BLIND}) == len(BLIND) == 10


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
