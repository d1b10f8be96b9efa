"""Every block of code in the documentation runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCKS = [
    pytest.param(block.split("```")[0], id=f"{page.stem}-{index}")
    for page in sorted(DOCS.glob("*.md"))
    for index, block in enumerate(page.read_text(encoding="utf-8").split("```python\n")[1:])
]


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_runs(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "docs", "exec"), names)
