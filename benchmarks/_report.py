"""What the scripts here share: options, fresh processes, and a report of measured numbers beside their targets.

    args = parser(__doc__, rounds=15).parse_args()
    ...                                                 # contenders must agree first; with --check that is all
    rows = [Row("25 tasks, 5 steps: higher / adapt_tasks", 16.2, least=15, cells={"ms": "6.9", "higher, ms": "112"})]
    report(__file__, "How fast is a meta-gradient over many tasks?", rows, out=args.out, pictures=[path])

prints the table and saves it as data in `--out`, from which `_results.py` writes RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

STARTED = time.monotonic()


class Row(NamedTuple):
    """A measured number and its target.

    Attributes:
        what: what the number is; of a ratio both sides, as in ``"25 tasks: higher / adapt_tasks"``.
        measured: the number.
        least: the target, where more is better.
        most: the target, where less is better.
        cells: further columns, heading -> text.
        headline: how the summary of all scripts calls it; empty: it is not in the summary.
    """

    what: str
    measured: float
    least: float | None = None
    most: float | None = None
    cells: Mapping[str, str] = MappingProxyType({})
    headline: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met, of the number as measured, not as printed; None without a target."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)

    @property
    def target(self) -> str:
        words = [f"at least {self.least:g}"] if self.least is not None else []
        words += [f"at most {self.most:g}"] if self.most is not None else []
        return ", ".join([*words, "met" if self.met else "**missed**"]) if words else ""

    @property
    def shown(self) -> str:
        """The number with three digits, none of a count's lost."""
        return f"{self.measured:.0f}" if self.measured >= 100 or self.measured == 0 else f"{self.measured:.3g}"


def parser(doc: str | None, rounds: int | None = None, threads: int = 1) -> argparse.ArgumentParser:
    """The options that all scripts have; `rounds` is the default of `--rounds`, which a script may do without."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="only check that contenders agree, on small problems")
    options.add_argument("--out", type=Path, default=Path("pictures"), help="folder for data and picture")
    options.add_argument("--threads", type=int, default=threads, help=f"of each process (default: {threads})")
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds, help=f"(default: {rounds})")
    return options


def table(rows: Sequence[Row], of: str = "measured") -> str:
    headings = list(dict.fromkeys(heading for row in rows for heading in row.cells))
    targets = ["target"] if any(row.target for row in rows) else []
    lines = ["| " + " | ".join(["", *headings, of, *targets]).lstrip() + " |"]
    lines.append("|---" * (len(headings) + 2 + len(targets)) + "|")
    for row in rows:
        cells = [row.what, *(row.cells.get(heading, "") for heading in headings), row.shown]
        lines.append("| " + " | ".join([*cells, *([row.target] if targets else [])]) + " |")
    return "\n".join(lines)


def report(
    file: str,
    question: str,
    rows: Sequence[Row],
    *,
    out: Path,
    note: str = "",
    details: str = "",
    pictures: Iterable[Path] = (),
) -> None:
    """Print a script's table, and save it as data in the folder `out`.

    Args:
        file: the script's `__file__`.
        question: the one that the script answers; a heading in RESULTS.md.
        rows: the table.
        out: the folder, made where it is missing; pictures lie in it.
        note: what numbers mean, how often and with how many threads they were taken: printed before the table.
        details: more tables, in Markdown, printed after it.
        pictures: files that were drawn.
    """
    text = "\n\n".join(part for part in (note, table(rows), details) if part)
    print(f"{question}\n\n{text}")
    names = [Path(picture).name for picture in pictures]
    for name in names:
        print(f"picture: {out / name}")
    saved = {
        "script": Path(file).name,
        "question": question,
        "text": text,
        "rows": [{**row._asdict(), "cells": dict(row.cells)} for row in rows],
        "pictures": names,
        "seconds": round(time.monotonic() - STARTED),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{Path(file).stem}.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


def fresh(file: str, *arguments: object, count: int = 1, **environment: str) -> list[Any]:
    """Run ``python file arguments`` in `count` fresh processes, one after the other.

    Returns:
        The JSON that the last line of each one's standard output is: ``print(json.dumps(found))``.
    """
    command = [sys.executable, file, *map(str, arguments)]
    results = []
    for _ in range(count):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}; what it says stands above")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The medians over processes of the numbers with the same key."""
    return {key: statistics.median(each[key] for each in found) for key in found[0]}
