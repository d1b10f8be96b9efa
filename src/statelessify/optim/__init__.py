"""Optimizers as pure functions: ``init(params) -> state`` and ``step(params, grads, state) -> (params, state)``."""

from ._adam import adam
from ._hyperparameters import per_task
from ._optimizer import Optimizer, OptState
from ._sgd import sgd

__all__ = ["OptState", "Optimizer", "adam", "per_task", "sgd"]
