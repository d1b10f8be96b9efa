"""The project's chores. `python -m nox -s NAME -- ARGUMENTS`; a bare `nox` runs tests, lint and types."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_venv = "yes"

PINNED = ("--constraint", "constraints.txt")
PEERS = ("higher", "numpy")  # what tests and benchmarks compare with
HEADLESS = {"MPLBACKEND": "Agg"}


def install_project(session: nox.Session, *requirements: str) -> None:
    """Install pinned versions only: build isolation would fetch whatever hatchling is newest."""
    session.install(*PINNED, "hatchling")
    session.install(*PINNED, "--no-build-isolation", *requirements)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the built wheel, in parallel; arguments go to pytest (`-- -n0 -k sgd`, `-- --cov`)."""
    install_project(session, ".[testing,examples]", "pytest-cov", "pytest-xdist", *PEERS)
    # One thread per worker: torch's own threads would fight over the cores with the other workers.
    workers = ("-n", "auto", "--maxprocesses=4", "--dist=worksteal")
    session.run("pytest", *workers, *session.posargs, env={"OMP_NUM_THREADS": "1", **HEADLESS})


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and formatting of every Python file; arguments go to `ruff check` (`-- --fix`)."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of src, strictly; arguments go to pyright."""
    install_project(session, ".[testing]", "pyright[nodejs]")
    session.run("pyright", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run two examples with small settings and say where their pictures are; arguments replace `--fast`."""
    install_project(session, ".[examples]")
    for program in ("sinusoid", "few_shot"):
        session.run("python", f"examples/{program}.py", *(session.posargs or ["--fast"]), env=HEADLESS)
    for picture in sorted(Path("pictures").glob("*.png")):
        session.log(f"picture: {picture.resolve()}")


@nox.session
def bench(session: nox.Session) -> None:
    """Run every script in benchmarks, peers measured in the same run; arguments go to each script."""
    install_project(session, ".[examples]", *PEERS)
    for script in sorted(Path("benchmarks").glob("[!_]*.py")):
        session.run("python", str(script), *session.posargs, env=HEADLESS)
