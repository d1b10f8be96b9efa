"""The pytest plugin of statelessify: hypothesis profiles, and a fixture that tells when a test changes a module.

It lies outside the package, and imports nothing of it before a test asks: whoever has statelessify installed would
otherwise wait for torch at each start of pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from statelessify.testing._unmutated import Watch

PROFILES: dict[str, dict[str, Any]] = {
    "dev": {"max_examples": 25, "derandomize": False},
    "ci": {"max_examples": 100, "derandomize": True, "print_blob": True},
    "deep": {"max_examples": 2000, "derandomize": False},
}
"""Examples of each property: while one writes it, on each commit, overnight. None has a deadline.

`derandomize` is said each time: left out, hypothesis takes it from the environment, where it may find a CI.
"""

WATCHES = pytest.StashKey[list["Watch"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--statelessify-profile`."""
    examples = ", ".join(f"{name}: {options['max_examples']}" for name, options in PROFILES.items())
    parser.getgroup("statelessify").addoption(
        "--statelessify-profile",
        choices=tuple(PROFILES),
        help=f"how many examples hypothesis tries for each property ({examples})",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile that was asked for."""
    profile = config.getoption("--statelessify-profile")
    if profile is None:
        return
    if config.getoption("--hypothesis-profile", default=None) is not None:
        raise pytest.UsageError("give either --statelessify-profile or --hypothesis-profile")
    try:
        from hypothesis import settings
    except ModuleNotFoundError as error:
        raise pytest.UsageError("--statelessify-profile needs hypothesis: install statelessify[testing]") from error
    name = f"statelessify-{profile}"  # a project may have profiles called `dev` and `ci` of its own
    settings.register_profile(name, deadline=None, **PROFILES[profile])
    settings.load_profile(name)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which profile it is."""
    profile = config.getoption("--statelessify-profile")
    return None if profile is None else f"statelessify profile: {profile}, {PROFILES[profile]['max_examples']} examples"


@pytest.fixture
def unmutated(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    """A function that watches a module and returns it; the test fails if it leaves the module other than it is now."""
    from statelessify.testing._unmutated import Watch

    watches = request.node.stash.setdefault(WATCHES, [])

    def watch(module: nn.Module) -> nn.Module:
        watches.append(Watch(module))
        return module

    return watch


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """Within the call, not in a fixture's end: there it would be an error beside a test that has passed."""
    result = yield
    if WATCHES in pyfuncitem.stash:
        for watch in pyfuncitem.stash[WATCHES]:
            watch.check()
    return result
