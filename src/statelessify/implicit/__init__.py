"""Derivatives of solutions: linear solves on trees, and any solver as a differentiable function."""

from ._root import custom_root
from ._solve import cg, dense, neumann

__all__ = ["cg", "custom_root", "dense", "neumann"]
