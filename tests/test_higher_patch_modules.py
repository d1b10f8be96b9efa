"""Patched modules of the kinds for which `higher` is wrong, against torch's `functional_call`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention
from higher_cases import QUIET, descend, everything, others, reference, slopes, visible
from ordinary import twice_derived
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from zoo import seeded, total

from statelessify import errors
from statelessify.compat import higher

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings(QUIET),
    # torch loops over some kernels by itself, which is slow and right
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

# The only kernel of attention on the CPU whose derivative has a derivative; the layer chooses it by itself.
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# ---------------------------------------------------------------- kinds for which higher is wrong


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.own = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x).unsqueeze(0)
        return self.attention(x, x, x, need_weights=False)[0].squeeze(0)


def transformer(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Containers(nn.Module):
    """Weights in a list, in a dict, and in a list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])
        self.named = nn.ParameterDict({"scale": torch.randn(4), "shift": torch.randn(4)})
        self.deep = nn.ParameterList([nn.ParameterDict({"w": torch.randn(4, 4)})])

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.many
        x = (x @ weight + bias) * self.named["scale"] + sum(self.named.values())
        return x.tanh() @ self.deep[0]["w"]


class Holds(nn.Module):
    """Reaches its parts by what it made of them in `__init__`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        a = self.a
        held: dict[str, Callable[[], list[Any]]] = {
            "bound method": lambda: [self.both],
            "bound method of a part": lambda: [self.a.forward, self.b.__call__],
            "list": lambda: [self.a, self.b],
            "closure over self": lambda: [lambda x: self.a(x) + self.b.bias],
            "closure over a part": lambda: [lambda x: a(x) * a.weight.mean()],
            "default argument": lambda: [lambda x, part=self.b: part(x)],
            "tuple of a dict of lists": lambda: ({"deep": [self.a, self.b]}["deep"][1], self.a),
        }
        self.steps = held[how]()

    def both(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x).sin()
        return self.b(x)


def legacy(norm: Callable[..., nn.Module], **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with warnings.catch_warnings():
        # both are deprecated; models that were built with them are still in use
        warnings.simplefilter("ignore", FutureWarning)
        norm(model[0], **options)
        norm(model[2], **options)
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda part, args, out: out * part.weight.mean())
    model[2].register_forward_pre_hook(lambda part, args: (args[0] + model[0].bias.sum(),))
    model.register_forward_hook(lambda part, args, out: out + part[0].bias)
    return model


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    prune.random_unstructured(model[0], "bias", amount=0.4)
    prune.ln_structured(model[2], "weight", amount=1, n=2, dim=1)
    return model


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
    parametrizations.weight_norm(model[0])
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    parametrizations.orthogonal(model[3])
    return model


HOLDS = ["bound method", "bound method of a part", "list", "closure over self", "closure over a part"]
HOLDS += ["default argument", "tuple of a dict of lists"]
KINDS: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": Attends,
    "TransformerEncoder": transformer,
    "TransformerEncoder, dropout": lambda: transformer(0.3),
    "containers": Containers,
    "hooks": hooked,
    "legacy weight_norm": lambda: legacy(torch.nn.utils.weight_norm),
    "legacy weight_norm, dim": lambda: legacy(torch.nn.utils.weight_norm, dim=None),
    "pruning": pruned,
    "parametrizations": parametrized,
    **{how: lambda how=how: Holds(how) for how in HOLDS},
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@kinds
@modes
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "in the graph"])
def test_updates_are_seen_and_gradients_go_through_them(make: Any, training: bool, copied: bool) -> None:
    """Three updates by hand, against torch's `functional_call`."""
    model, twin = seeded(make).train(training), seeded(make).train(training)
    before, x = everything(model), torch.randn(3, 4)
    fmodel = higher.monkeypatch(model, copy_initial_weights=copied)
    call, oracle = (lambda x: seeded(fmodel, x)), (lambda x: seeded(reference, twin, own, x))
    own = start = list(twin.parameters())
    for _ in range(3):
        fmodel.update_params(descend(call, fmodel.fast_params, x))
        with twice_derived():
            own = descend(oracle, own, x)
        assert_close([p.detach() for p in fmodel.fast_params], [p.detach() for p in own])
        assert_close(call(x), oracle(x))
    found = slopes(total(call(x)) ** 2, fmodel.init_fast_params, create_graph=True)
    with twice_derived():
        assert_close(found, slopes(total(oracle(x)) ** 2, start, create_graph=True))
    assert any(slope.abs().max() > 1e-9 for slope in found)
    if not copied:
        (total(call(x)) ** 2).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        assert_close(grads, [slope.detach() for slope in found])
        model.zero_grad()
    assert everything(model) == before


@kinds
def test_each_way_to_give_weights_counts_at_once(make: Any) -> None:
    """In higher a weight that its owner's forward does not push is that of the call before."""
    model, twin, x = seeded(make).eval(), seeded(make).eval(), torch.randn(3, 4)
    fmodel = higher.monkeypatch(model)
    for way in (
        lambda new: fmodel(x, params=new),
        lambda new: (fmodel.update_params(new), fmodel(x))[1],
        lambda new: (setattr(fmodel, "fast_params", new), fmodel(x))[1],
        lambda new: (fmodel.forward(x, params=new), fmodel(x))[1],
    ):
        new = others(fmodel)
        assert_close(way(new), reference(twin, new, x))
    bare = higher.patch.make_functional(model)
    assert_close(bare(x, params=new), reference(twin, new, x))


@kinds
def test_inside_vmap(make: Any) -> None:
    twin, xs = seeded(make).eval(), torch.randn(2, 3, 4)
    fmodel = higher.monkeypatch(seeded(make).eval())
    stack = [torch.randn(2, *p.shape) for p in fmodel.parameters()]
    before = visible(fmodel)
    found = vmap(lambda params, x: fmodel(x, params=params))(stack, xs)
    assert visible(fmodel) == before
    expected = [reference(twin, [tensor[task] for tensor in stack], xs[task]) for task in range(2)]
    assert_close(found, torch.stack(expected))


def test_a_container_is_read_and_assigned() -> None:
    fmodel = higher.monkeypatch(Containers())
    fmodel.update_params(new := others(fmodel))
    assert fmodel.many[0] is new[0]
    assert fmodel.named["scale"] is new[2]
    assert fmodel.deep[0]["w"] is new[4]
    assert [id(tensor) for tensor in fmodel.many] == [id(tensor) for tensor in new[:2]]
    assert (len(fmodel.many), list(fmodel.named)) == (2, ["scale", "shift"])


@pytest.mark.parametrize(
    ("assign", "index"),
    [
        (lambda f, new: f.many.__setitem__(0, new), 0),
        (lambda f, new: setattr(f.many, "0", new), 0),
        (lambda f, new: f.named.__setitem__("scale", new), 2),
        (lambda f, new: f.named.update({"scale": new}), 2),
        (lambda f, new: setattr(f.named, "scale", new), 2),
    ],
    ids=["list", "attribute of a list", "dict", "update", "attribute of a dict"],
)
def test_an_item_of_a_container_is_assigned_on_the_graph(assign: Any, index: int) -> None:
    """nn.Module makes a parameter of whatever is put into its containers, which would cut the graph in silence."""
    fmodel, x = higher.monkeypatch(Containers()), torch.randn(3, 4)
    old = fmodel.fast_params[index]
    assign(fmodel, old * 2)
    assert_close(fmodel(x), reference(Containers(), fmodel.fast_params, x))
    assert_close(fmodel.fast_params[index], old * 2)
    (found,) = slopes(fmodel(x).sum(), [old])
    assert found.abs().max() > 0


class HidesParts(nn.Module):
    """Parts that torch does not know of, as a frozen teacher is hidden in a list; a method is kept beside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.hidden = nn.Linear(4, 4), [nn.Linear(4, 4)]
        self.step = self.first

    def first(self, x: Tensor) -> Tensor:
        return self.a(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.step(x))


def test_hidden_parts_are_shared_as_in_higher() -> None:
    model, x = HidesParts(), torch.randn(3, 4)
    before = everything(model)
    fmodel = higher.monkeypatch(model)
    weight, bias = others(fmodel)
    assert fmodel.hidden[0] is model.hidden[0]
    assert_close(fmodel(x, params=[weight, bias]), model.hidden[0]((x @ weight.T + bias).tanh()))
    assert everything(model) == before


class KeepsWeight(nn.Module):
    """A second reference to a weight, as the default of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.step = lambda x, weight=self.a.weight: x @ weight

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.a(x))


def test_a_second_reference_to_a_weight_is_right_or_refused() -> None:
    fmodel, x = higher.monkeypatch(KeepsWeight()), torch.randn(3, 4)
    weight, bias = new = others(fmodel)
    try:
        out = fmodel(x, params=new)
    except errors.LateUseError:
        return
    assert_close(out, (x @ weight.T + bias) @ weight)
