"""One level of vmap: it is as torch's own, and gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.func import vmap

from statelessify._budget import Chunks
from statelessify._vmapped import vmapped


def noisy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + torch.rand(()) * y, torch.rand(2)


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 9])
def test_as_torch(randomness: str, chunk_size: int | None) -> None:
    x, y = torch.randn(2, 5, 3)
    torch.manual_seed(0)
    expected = vmap(noisy, randomness=randomness, chunk_size=chunk_size)(x, y)
    torch.manual_seed(0)
    found = vmapped(noisy, [x, y], 5, randomness, Chunks(chunk_size))  # type: ignore[arg-type]
    torch.testing.assert_close(tuple(found), expected)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_level_ends_with_an_error(chunk_size: int | None) -> None:
    def fails(x: Tensor) -> tuple[Tensor]:
        assert peek_interpreter_stack().level() == 1
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            vmapped(fails, [torch.ones(3)], 3, "different", Chunks(chunk_size))
        assert peek_interpreter_stack() is None


def test_a_result_that_no_task_shapes_is_repeated() -> None:
    (found,) = vmapped(lambda x: [torch.ones(2)], [torch.zeros(3)], 3, "error", Chunks())
    assert found.shape == (3, 2)


def test_the_error_of_random_numbers() -> None:
    with pytest.raises(RuntimeError, match="random"):
        vmapped(noisy, [torch.ones(3), torch.ones(3)], 3, "error", Chunks())
