"""Modules whose own names are those of the layer: forward, calls with weights, and optimizers work all the same."""

from __future__ import annotations

import pytest
import torch
from higher_cases import QUIET, everything, reference
from torch import Tensor, nn
from torch.testing import assert_close

from statelessify.compat import higher

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]

NAMES = ["root", "is_root", "fast_params", "init_fast_params", "track_higher_grads", "direct_submodule_call"]
NAMES += ["update_params", "boxed_forward", "_fast_params"]


def clashing(name: str, how: str) -> nn.Module:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            if how == "module":
                self.add_module(name, nn.Linear(3, 3))
            elif how == "weight":
                setattr(self, name, nn.Parameter(torch.randn(3)))
            elif how == "buffer":
                self.register_buffer(name, torch.randn(3))
            elif how == "attribute":
                setattr(self, name, 5.0)

        def forward(self, x: Tensor) -> Tensor:
            own = getattr(self, name)
            return self.linear(x) + (own(x) if callable(own) else own)

    if how == "method":
        setattr(Clash, name, lambda self, x: self.linear(x) * 7)
    elif how == "property":
        setattr(Clash, name, property(lambda self: self.linear.bias * 7))
    return Clash()


@pytest.mark.parametrize("how", ["module", "weight", "buffer", "attribute", "method", "property"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "part"])
def test_names_of_the_module_go_before_those_of_the_layer(name: str, how: str, inside: bool) -> None:
    model = clashing(name, how)
    model = nn.Sequential(nn.Tanh(), model) if inside else model
    before, x = everything(model), torch.randn(5, 3)
    fmodel = higher.monkeypatch(model)
    assert_close(fmodel(x), model(x))
    new = [p.detach() + 1 for p in model.parameters()]
    assert_close(fmodel(x, params=new), reference(model, new, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fmodel(x, params=[p.requires_grad_() for p in new])
    moved = higher.get_diff_optim(optimizer, model.parameters(), fmodel).step(fmodel(x).square().sum())
    assert_close(fmodel(x), reference(model, moved, x))
    assert everything(model) == before
