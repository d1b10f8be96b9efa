"""The README's two outer loops do what it says: the meta-loss falls."""

from pathlib import Path

import pytest

BLOCKS = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1:]
LOOPS = [block.split("```")[0] for block in BLOCKS if "history" in block.split("```")[0]]


def test_there_are_two_outer_loops() -> None:
    assert len(LOOPS) == 2
    assert "torch.optim.Adam(params.values()" in LOOPS[0]
    assert "torch.func.grad_and_value" in LOOPS[1]


@pytest.mark.parametrize("code", LOOPS, ids=["torch.optim outside", "functional"])
def test_the_loss_falls(code: str) -> None:
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    history = names["history"]
    assert all(value == value for value in history)
    assert history[-1] < 0.2 * history[0]


def test_the_default_policy_trains_the_model_itself() -> None:
    names: dict = {}
    exec(compile(LOOPS[0], "README.md", "exec"), names)
    assert names["net"].weight is names["params"]["weight"]
    out = names["net"](names["x"])
    trained = ((out - names["y"]) ** 2).mean().item()
    assert trained < names["history"][0]
