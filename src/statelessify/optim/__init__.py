"""Optimizers as pure functions: ``init(params) -> state`` and ``step(params, grads, state) -> (params, state)``.

Each is a rule of torch.optim (Lion is one that torch lacks), out of place, with torch's names, defaults and meanings.
Every hyperparameter may be

- a number,
- a 0-dim tensor, which may require a gradient,
- a dict from parameter names or globs to these, or to tensors that broadcast to the parameter (groups, Meta-SGD); each
  parameter is matched exactly once,
- a callable of the step (a 0-dim int64 tensor, 0 at first) that returns any of these; `schedule` makes one from
  `torch.optim.lr_scheduler`,
- `per_task` of a tensor or dict with leaves ``(tasks, ...)``, for `adapt_tasks`.

A switch such as `maximize` is True, False or a dict of these. A parameter whose gradient is None counts as one with
gradient zero.
"""

from ._adadelta import adadelta
from ._adafactor import adafactor
from ._adagrad import adagrad
from ._adam import adam, adamw
from ._adamax import adamax
from ._asgd import asgd
from ._clip import clip_by_global_norm, clip_by_value, normalize
from ._from_torch import from_torch
from ._hyperparameters import per_task
from ._lion import lion
from ._muon import muon
from ._nadam import nadam
from ._optimizer import Optimizer, OptState
from ._radam import radam
from ._rmsprop import rmsprop
from ._rprop import rprop
from ._schedule import schedule
from ._sgd import sgd
from ._to_torch import to_torch_

__all__ = [
    "OptState",
    "Optimizer",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "clip_by_global_norm",
    "clip_by_value",
    "from_torch",
    "lion",
    "muon",
    "nadam",
    "normalize",
    "per_task",
    "radam",
    "rmsprop",
    "rprop",
    "schedule",
    "sgd",
    "to_torch_",
]
