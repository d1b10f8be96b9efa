"""Checks that raise an AssertionError which names the leaf, the worst entry, both values and code to reproduce it."""

from .._close import assert_trees_close

__all__ = ["assert_trees_close"]
