"""Property tests of meta-learning code: hypothesis strategies, and checks that say which entry is wrong."""

from ._close import assert_trees_close

__all__ = ["assert_trees_close"]
