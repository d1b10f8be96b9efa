"""The examples in public docstrings run, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import statelessify

MODULES = [m.name for m in pkgutil.walk_packages(statelessify.__path__, "statelessify.")]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert results.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 12


@pytest.mark.parametrize(
    "package", [statelessify, statelessify.optim, statelessify.errors, statelessify.rules], ids=lambda p: p.__name__
)
def test_every_public_name_says_what_it_is(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__, name
