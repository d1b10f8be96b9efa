"""`statelessify.testing` itself: lazy, and clear about what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from statelessify import testing
from statelessify.errors import ModuleError
from statelessify.testing import unmutated

WITHOUT = """
import sys
sys.modules["hypothesis"] = None  # an import of it fails as if it were not installed
import statelessify
import statelessify.testing as testing
from statelessify.errors import MissingExtraError
testing.assert_trees_close(1.0, 1.0)
try:
    {use}
except MissingExtraError as error:
    assert "pip install 'statelessify[testing]'" in str(error), error
else:
    raise SystemExit("no error")
"""


@pytest.mark.parametrize("use", ["testing.strategies", "from statelessify.testing import strategies"])
def test_strategies_without_hypothesis(use: str) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT.format(use=use)], check=True)


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import sys, statelessify, statelessify.testing; sys.exit('hypothesis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_no_other() -> None:
    assert list(testing.__all__) == sorted(set(testing.__all__))
    assert all(callable(getattr(testing, name)) for name in testing.__all__)
    parts = {*testing.checks.__all__, *testing.strategies.__all__}
    assert set(testing.__all__) == parts
    with pytest.raises(AttributeError, match="no attribute `check_grad`"):
        _ = testing.check_grad


def test_several_modules_at_once() -> None:
    one, two = nn.Linear(1, 1), nn.BatchNorm1d(1)
    with unmutated(one, two):
        two.eval()
        two(one(torch.ones(3, 1))).sum().backward()
        two.train()
    message = r"the BatchNorm1d was changed:\n  `num_batches_tracked` was 0, is 1"
    with pytest.raises(AssertionError, match=message), unmutated(one, two):
        two(one(torch.ones(3, 1)))


def test_an_exception_of_the_block_passes_through() -> None:
    def spoil(module: nn.Module) -> None:
        with unmutated(module):
            module.eval()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        spoil(nn.Linear(1, 1))


def test_only_modules_are_watched() -> None:
    with pytest.raises(ModuleError, match="was given dict"), unmutated({}):  # pyright: ignore[reportArgumentType]
        pass


def test_nan_is_what_it_was_and_ties_are_not_changes() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("hole", torch.tensor([float("nan"), float("inf"), 1.0]))
    module.twin = module.weight
    with unmutated(module):
        pass
    with pytest.raises(AssertionError, match=r"`hole` at \[2\] was 1, is nan"), unmutated(module):
        module.hole[2] = float("nan")
