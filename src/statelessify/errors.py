"""Every error that statelessify raises on purpose.

    StatelessifyError
     ├── NamesError (KeyError)                   unknown, missing, doubled or unmatched tensor names
     ├── ShapeError (ValueError)                 a tensor of the wrong shape
     ├── DtypeError (TypeError)                  a leaf that is no tensor, or of a dtype that cannot be trained
     ├── TreeError (ValueError)                  trees whose structures differ
     ├── PolicyError (ValueError)                an unknown copy policy, or ``"alias"`` with a move that copies
     ├── ModuleError (TypeError)                 a module that has no pure form
     │    └── LazyModuleError (also ValueError)  a lazy module that has not seen its first input
     ├── MutationError (RuntimeError)            a module that writes into its own parameters
     ├── LateUseError (RuntimeError)             a module's tensor, used outside the call it was passed to
     ├── CheckpointError (RuntimeError)          activation checkpointing where torch would lose a derivative
     ├── CompileError (RuntimeError)             a step that cannot be compiled, or not without changing its numbers
     ├── DerivativeError (RuntimeError)          an operation that lacks the derivative which is asked for
     ├── ConvergenceError (ArithmeticError)      a linear system that has no solution, or whose solve has not arrived
     ├── TaskError (ValueError)                  tasks that do not line up
     │    ├── VmapError (also RuntimeError)      ``backend="vmap"`` where torch has no batching rule
     │    └── RandomnessError (also RuntimeError)  random numbers under ``randomness="error"``
     ├── FastWeightsError (ValueError, RuntimeError)  the weights of a patched module, used in a way they cannot be
     │    └── FastWeightsIndexError (also IndexError)  too few or too many of them, or a time that there is not
     ├── OptimizerError (TypeError, ValueError)  an optimizer of torch that has no pure form
     ├── LossError (ValueError)                  a loss that is not one real number per task
     ├── HyperparameterError (ValueError)        a value that no optimizer can use
     │    └── HyperparameterNameError (also TypeError)  a hyperparameter that does not exist
     └── MissingExtraError (ImportError)         a package that an optional part needs

Each is also the built-in that a caller would expect, so ``except ValueError`` goes on working. Each says what is
wrong, what was given, and what to write instead.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CompileError",
    "ConvergenceError",
    "DerivativeError",
    "DtypeError",
    "FastWeightsError",
    "FastWeightsIndexError",
    "HyperparameterError",
    "HyperparameterNameError",
    "LateUseError",
    "LazyModuleError",
    "LossError",
    "MissingExtraError",
    "ModuleError",
    "MutationError",
    "NamesError",
    "OptimizerError",
    "PolicyError",
    "RandomnessError",
    "ShapeError",
    "StatelessifyError",
    "StationaryPointWarning",
    "TaskError",
    "TreeError",
    "VmapError",
]


class StatelessifyError(Exception):
    """The base of all errors that this library raises on purpose."""

    def __str__(self) -> str:
        # `KeyError` would print the repr of the message.
        return Exception.__str__(self)


class NamesError(StatelessifyError, KeyError):
    """A name, or a glob over names, that does not fit the tensors it is meant for."""


class ShapeError(StatelessifyError, ValueError):
    """A tensor whose shape is not the one that the module or the parameter has."""


class DtypeError(StatelessifyError, TypeError):
    """A leaf that is not a tensor, or a tensor of a dtype that has no gradient."""


class TreeError(StatelessifyError, ValueError):
    """Trees whose structures differ where they must agree."""


class PolicyError(StatelessifyError, ValueError):
    """A copy policy that does not exist, or that the requested move contradicts."""


class ModuleError(StatelessifyError, TypeError):
    """A module that cannot be made a pure function; the message says which one, and what to pass instead."""


class LazyModuleError(ModuleError, ValueError):
    """A lazy module whose shapes are not known yet."""


class MutationError(StatelessifyError, RuntimeError):
    """A module that writes in place into tensors which the caller owns."""


class LateUseError(StatelessifyError, RuntimeError):
    """A tensor of a module that is used after the call it was passed to, or past its slot."""


class CheckpointError(StatelessifyError, RuntimeError):
    """Activation checkpointing inside a module, in a place where torch refuses it or gives a wrong derivative."""


class CompileError(StatelessifyError, RuntimeError):
    """A step of an inner loop that cannot be compiled, or that compiled code would compute differently."""


class DerivativeError(StatelessifyError, RuntimeError):
    """An operation that does not have the derivative which is asked for, and would lose it without an error."""


class ConvergenceError(StatelessifyError, ArithmeticError):
    """A linear solve that has not converged, or whose matrix does not allow it."""


class StationaryPointWarning(UserWarning):
    """An implicit derivative at a point where the gradient is not small."""


class FastWeightsError(StatelessifyError, ValueError, RuntimeError):
    """The weights of a patched module (`compat.higher`), missing or used in a way that they cannot be."""


class FastWeightsIndexError(FastWeightsError, IndexError):
    """A list of weights of the wrong length, or a time that their history does not have."""


class OptimizerError(StatelessifyError, TypeError, ValueError):
    """An optimizer of torch that cannot be made a pure one; the message says what to use instead."""


class TaskError(StatelessifyError, ValueError):
    """Task trees without a common number of tasks."""


class VmapError(TaskError, RuntimeError):
    """A function that torch cannot batch, where the caller insisted on ``backend="vmap"``."""


class RandomnessError(TaskError, RuntimeError):
    """A function that draws random numbers, where the caller has forbidden them."""


class LossError(StatelessifyError, ValueError):
    """A loss that is not one real floating-point number per task."""


class HyperparameterError(StatelessifyError, ValueError):
    """A hyperparameter outside its range, or of a shape that does not fit the parameter."""


class HyperparameterNameError(HyperparameterError, TypeError):
    """A hyperparameter that the optimizer does not have."""


class MissingExtraError(StatelessifyError, ImportError):
    """A part of the library whose packages are optional, without them; the message says what to install."""
