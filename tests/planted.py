"""Planted bugs: small patches to the library, by which a check shows that it would notice a mistake."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent.parent / "src"


class Planted(NamedTuple):
    """A mistake in the library that raises no error.

    Attributes:
        name: what it is called.
        file: the file that it is in, relative to ``src/statelessify``.
        old: the text that is replaced, which stands in the file exactly once.
        new: the text in its place.
        symptom: what a user sees.
        public: the public function, and the kind of use, by which it shows.
        check: the property that is to find it; see `kit_properties`.
    """

    name: str
    file: str
    old: str
    new: str
    symptom: str
    public: str
    check: str = ""


def patched(bug: Planted) -> str:
    """The whole text of the file, with the bug in it.

    Raises:
        ValueError: the replaced text does not stand in the file exactly once.
    """
    text = (SOURCES / "statelessify" / bug.file).read_text(encoding="utf-8")
    count = text.count(bug.old)
    if count != 1:
        raise ValueError(
            f"planted bug `{bug.name}`: its old text stands {count} times in `{bug.file}`, not once; the source has "
            f"changed, so write the bug anew: {bug.old!r}"
        )
    return text.replace(bug.old, bug.new)


@contextmanager
def planted(bug: Planted) -> Iterator[Path]:
    """The path of a copy of ``src`` with the bug in it, for the ``PYTHONPATH`` of another process."""
    text = patched(bug)
    with tempfile.TemporaryDirectory(prefix="planted_") as folder:
        copy = Path(folder) / "src"
        shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "statelessify" / bug.file).write_text(text, encoding="utf-8")
        yield copy
