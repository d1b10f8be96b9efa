"""Write RESULTS.md, its pictures, and the README's summary from the data that the scripts here have saved."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _report import Row

HERE = Path(__file__).parent
VERSIONS = ("torch", "statelessify", "higher", "torchopt", "tensordict", "jax")
SUMMARY = "| | measured | target |"
"""The first line of the summary, in RESULTS.md and in the README; the table goes on to the next empty line."""


def version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def setting() -> str:
    packages = [f"Python {platform.python_version()}", *map(version_of, VERSIONS)]
    return f"{datetime.date.today()}; {cpu()}, {os.cpu_count()} cores, {memory()} of memory; {', '.join(packages)}."


def rows_of(data: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in data["rows"]]


def summary(found: list[dict[str, Any]]) -> str:
    headlines = [row for data in found for row in rows_of(data) if row.headline]
    lines = [f"| {row.headline} | {row.shown} | {row.target} |" for row in headlines]
    return "\n".join([SUMMARY, "|---|---|---|", *lines])


def results(found: list[dict[str, Any]], missing: list[str]) -> str:
    rows = [row for data in found for row in rows_of(data) if row.met is not None]
    parts = [
        "# Results",
        "Written by `python -m nox -s bench`, which measures all contenders in the same run. " + setting(),
        *([f"**Not a full run**: no data from {', '.join(missing)}."] if missing else []),
        f"{sum(bool(row.met) for row in rows)} of {len(rows)} targets are met.",
        summary(found),
    ]
    for data in found:
        parts += [f"## {data['question']}", f"[`{data['script']}`]({data['script']}), {data['seconds']} s"]
        parts += [data["text"], *(f"![{data['question']}](pictures/{name})" for name in data["pictures"])]
    return "\n\n".join(parts) + "\n"


def with_summary(text: str, table: str) -> str:
    """The README with another summary; as it was where it has none."""
    before, found, after = text.partition(SUMMARY)
    return before + table + "\n\n" + after.partition("\n\n")[2] if found else text


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, default=Path("pictures"), help="folder with data and pictures")
    options.add_argument("--to", type=Path, default=HERE, help="folder for RESULTS.md")
    options.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    options.add_argument("--partial", action="store_true", help="go without the scripts that have no data")
    args = options.parse_args()
    scripts = sorted(script.stem for script in HERE.glob("[!_]*.py"))
    missing = [f"`{name}.py`" for name in scripts if not (args.data / f"{name}.json").is_file()]
    if missing and not args.partial:
        raise SystemExit(f"no data from {', '.join(missing)} in `{args.data}`; run `python -m nox -s bench`")
    files = [args.data / f"{name}.json" for name in scripts]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    (args.to / "pictures").mkdir(parents=True, exist_ok=True)
    for name in (name for data in found for name in data["pictures"]):
        shutil.copyfile(args.data / name, args.to / "pictures" / name)
    (args.to / "RESULTS.md").write_text(results(found, missing), encoding="utf-8")
    readme = args.readme.read_text(encoding="utf-8")
    args.readme.write_text(with_summary(readme, summary(found)), encoding="utf-8")
    print(f"written: {args.to / 'RESULTS.md'}, and the summary in {args.readme.name}")


if __name__ == "__main__":
    main()
