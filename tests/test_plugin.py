"""The pytest plugin: profiles by name, and a test fails that leaves a watched module changed."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

CHANGES = {
    "values": ("model.weight.data[0, 1] += 1", "`weight` at [0, 1] was"),
    "identity": ("model.weight = nn.Parameter(model.weight.detach().clone())", "`weight` is another tensor"),
    "shape": ("model.weight.data = torch.zeros(3, 3)", "`weight` had shape (1, 2), has (3, 3)"),
    "requires_grad": ("model.bias.requires_grad_(False)", "`bias` had requires_grad=True, has False"),
    "mode": ("model.eval()", "`training` was True, is False"),
    "buffer": ("model.seen.add_(1)", "`seen` was 0, is 1"),
    "attribute": ("model.note = 1", "`note` is new: 1"),
    "deleted": ("del model.kept", "`kept` is gone"),
    "container": ("model.kept.append(1)", "`kept` was changed in place"),
    "submodule": ("model.extra = nn.Tanh()", "`extra` is new: Tanh()"),
    "hook": ("model.register_forward_hook(lambda *args: None)", "`_forward_hooks`"),
}
TEST = """
import torch
from torch import nn

def make():
    model = nn.Linear(2, 1)
    model.register_buffer("seen", torch.zeros(()))
    model.kept = []
    return model

def test_it(unmutated):
    model = unmutated(make())
    loss = model(torch.ones(1, 2)).sum()
    {change}
"""


@pytest.mark.parametrize("change", CHANGES)
def test_a_test_fails_that_changes_a_watched_module(pytester: pytest.Pytester, change: str) -> None:
    code, message = CHANGES[change]
    pytester.makepyfile(TEST.format(change=code))
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    assert message in result.stdout.str()
    assert "the Linear was changed" in result.stdout.str()


@pytest.mark.parametrize("harmless", ["pass", "loss.backward()", "model.state_dict()", "model.train()"])
def test_a_test_passes_that_leaves_it_as_it_was(pytester: pytest.Pytester, harmless: str) -> None:
    pytester.makepyfile(TEST.format(change=harmless))
    pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_a_failing_test_fails_for_its_own_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TEST.format(change="model.eval(); raise ValueError('mine')"))
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    assert "ValueError: mine" in result.stdout.str()


COUNT = """
from hypothesis import given, settings, strategies as st

def test_it():
    assert settings().max_examples == {examples}
    assert settings().deadline is None
    assert settings().derandomize is {same}
"""


@pytest.mark.parametrize(
    ("profile", "examples", "same"), [("dev", 25, False), ("ci", 100, True), ("deep", 2000, False)]
)
def test_profiles(pytester: pytest.Pytester, profile: str, examples: int, same: bool) -> None:
    pytester.makepyfile(COUNT.format(examples=examples, same=same))
    result = pytester.runpytest_subprocess(f"--statelessify-profile={profile}", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"statelessify profile: {profile}, {examples} examples"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--statelessify-profile=often"], "invalid choice: 'often'"),
        (["--statelessify-profile=ci", "--hypothesis-profile=default"], "give either"),
    ],
)
def test_wrong_options_are_refused(pytester: pytest.Pytester, options: list[str], complaint: str) -> None:
    result = pytester.runpytest_subprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert complaint in result.stderr.str()


def test_without_the_option_the_profile_stays(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("from hypothesis import settings\ndef test_it():\n    assert settings().max_examples == 7\n")
    pytester.makeconftest(
        "from hypothesis import settings\nsettings.register_profile('mine', max_examples=7)\n"
        "settings.load_profile('mine')\n"
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_the_plugin_does_not_import_torch() -> None:
    code = "import sys, pytest_statelessify; sys.exit('torch' in sys.modules or 'hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
