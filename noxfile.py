"""The project's chores. `python -m nox -s NAME -- ARGUMENTS`; a bare `nox` runs tests, lint and types."""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_venv = "yes"

PINNED = ("--constraint", "constraints.txt")
PEERS = ("higher", "numpy")  # what tests and benchmarks compare with
MORE_PEERS = ("torchopt", "pytorch-optimizer", "tensordict", "jax")  # what benchmarks alone do
DATABASE = "expecttest"  # torch's own module database needs it
WORKERS = ("-n", "auto", "--maxprocesses=4", "--dist=worksteal")
# One thread per worker: torch's own threads would fight over the cores with the other workers.
QUIET = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
HEADLESS = {"MPLBACKEND": "Agg"}


def install_project(session: nox.Session, *requirements: str) -> None:
    """Install pinned versions only: build isolation would fetch whatever hatchling is newest."""
    session.install(*PINNED, "hatchling")
    session.install(*PINNED, "--no-build-isolation", *requirements)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the built wheel, in parallel; arguments go to pytest (`-- -n0 -k sgd`, `-- --cov`)."""
    install_project(session, ".[testing,examples]", "pytest-cov", "pytest-xdist", DATABASE, *PEERS)
    session.run("pytest", *WORKERS, *session.posargs, env=QUIET)


@nox.session
def conformance(session: nox.Session) -> None:
    """Every sample of torch's module database, the zoo and Hugging Face models, and a table of what holds."""
    install_project(session, ".[testing]", "pytest-xdist", DATABASE, "transformers")
    files = [f"tests/test_{name}.py" for name in ("conformance", "transformers", "apply", "apply_members")]
    session.run("pytest", "--conformance", *WORKERS, *files, *session.posargs, env=QUIET)


@nox.session
def planted(session: nox.Session) -> None:
    """All planted bugs, which the checks of the kit have to find, 2,000 correct cases, and a table of both."""
    install_project(session, ".[testing]", "pytest-xdist", *PEERS)
    files = [f"tests/test_{name}.py" for name in ("planted", "kit_properties")]
    session.run("pytest", "--planted", *WORKERS, *files, *session.posargs, env=QUIET)


@nox.session
def deep(session: nox.Session) -> None:
    """The properties of the library and of the kit, with 2,000 examples each, of dear ones a part; new in each run."""
    install_project(session, ".[testing]", "pytest-xdist", *PEERS)
    options = ("--statelessify-profile", "deep")
    files = ["tests/test_kit_properties.py", *map(str, sorted(Path("tests").glob("test_properties_*.py")))]
    session.run("pytest", *options, *WORKERS, *files, *session.posargs, env=QUIET)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant small mistakes in the core files and name those that no test notices; arguments are files, `_tree.py`."""
    install_project(session, ".[testing,examples]", "pytest-cov", "mutmut", DATABASE, *PEERS)
    session.run("python", "tests/mutants.py", *session.posargs, env=QUIET)


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
    """Run the examples with small settings and say where their pictures are; arguments replace `--fast`."""
    install_project(session, ".[examples]")
    for program in ("sinusoid", "few_shot", "learned_optimizer", "implicit"):
        session.run("python", f"examples/{program}.py", *(session.posargs or ["--fast"]), env=HEADLESS)
    for picture in sorted(Path("pictures").glob("*.png")):
        session.log(f"picture: {picture.resolve()}")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure all contenders in the same run and write benchmarks/RESULTS.md; arguments go to each script instead."""
    install_project(session, ".[examples]", *PEERS, *MORE_PEERS)
    for old in Path("pictures").glob("*.json"):
        old.unlink()
    for script in sorted(Path("benchmarks").glob("[!_]*.py")):
        session.run("python", str(script), *session.posargs, env=HEADLESS)
    if not session.posargs:  # they may have made runs short, or checks alone
        session.run("python", "benchmarks/_results.py")
