"""Rules for what torch's transforms get wrong or cannot do, and the door for more of them."""

from . import _attention, _cross_entropy, _embeddings, _linear, _losses, _masks, _modules, _norms, _recurrent, _weights
from ._registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "rule"]

del (
    _attention,
    _cross_entropy,
    _embeddings,
    _linear,
    _losses,
    _masks,
    _modules,
    _norms,
    _recurrent,
    _weights,
)  # imported for the rules that they register
