"""Phrases that error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__: list[str] = []


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean `x`?)`` for the known name most like `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean `{matches[0]}`?)" if matches else ""


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names in backticks, cut after `limit` of them."""
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"
