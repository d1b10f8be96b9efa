"""Patched modules against `higher` itself, in one process, on generated modules for which higher is right."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from higher_cases import QUIET, everything, slopes, times
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import seeded, total

from statelessify.compat import higher

with warnings.catch_warnings():  # its code has a SyntaxWarning
    warnings.simplefilter("ignore")
    import higher as real

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings(QUIET)]

WIDTH = 4

# ---------------------------------------------------------------- modules


class Counted(nn.Module):
    """A buffer that forward binds anew, one that it writes into, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.ones(WIDTH), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * self.scale + self.mean
        self.mean = 0.9 * self.mean + 0.1 * x.detach().flatten(0, -2).mean(0)
        self.count += 1
        return x / (self.count + 1)


class Twice(nn.Module):
    """Two weights that are one tensor, a part that is used twice, and a weight that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.again, self.unused = self.part, nn.Parameter(torch.randn(2))
        self.other.weight = self.part.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.other(self.part(x).sin()).tanh())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cells = kind(WIDTH, 3, batch_first=True, **options)
        self.head = nn.Linear(3 * (1 + self.cells.bidirectional), WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = self.cells(x.unsqueeze(1).expand(-1, 3, -1))[0]
        return self.head(out[:, -1])


class Cell(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase], bias: bool) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = None
        for _ in range(2):
            hidden = self.cell(x, hidden)
        return hidden[0] if isinstance(hidden, tuple) else hidden


class Convolutions(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module], dilation: int, bias: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 2, 3, padding=dilation, dilation=dilation, bias=bias), norm()
        self.second = nn.Conv1d(2, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x.unsqueeze(1))).tanh()).squeeze(1)


NORMS = [
    lambda: nn.BatchNorm1d(2),
    lambda: nn.BatchNorm1d(2, affine=False),
    lambda: nn.BatchNorm1d(2, momentum=None),
    lambda: nn.BatchNorm1d(2, track_running_stats=False),
    lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(1, 2),
    nn.Identity,
]
flags = st.booleans()
ACTIVATIONS = [nn.Tanh, nn.Softplus, nn.SiLU, lambda: nn.PReLU(init=0.3), lambda: nn.Dropout(0.3)]

layers: st.SearchStrategy[Callable[[], nn.Module]] = st.one_of(
    st.builds(lambda bias: lambda: nn.Linear(WIDTH, WIDTH, bias=bias), flags),
    st.sampled_from(ACTIVATIONS),
    st.builds(lambda affine: lambda: nn.LayerNorm(WIDTH, elementwise_affine=affine), flags),
    st.builds(lambda affine: lambda: nn.BatchNorm1d(WIDTH, affine=affine), flags),
    st.sampled_from([Counted, Twice]),
    st.builds(
        lambda norm, d, bias: lambda: Convolutions(norm, d, bias), st.sampled_from(NORMS), st.integers(1, 2), flags
    ),
    st.builds(
        lambda kind, count, both, bias: lambda: Recurrent(kind, num_layers=count, bidirectional=both, bias=bias),
        st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
        st.integers(1, 2),
        flags,
        flags,
    ),
    st.builds(lambda kind, bias: lambda: Cell(kind, bias), st.sampled_from([nn.LSTMCell, nn.GRUCell]), flags),
)


@st.composite
def networks(draw: Any) -> nn.Module:
    """Layers one after another, nested, some of them frozen, some in evaluation mode."""
    makes = draw(st.lists(layers, min_size=1, max_size=3))
    made = [make() for make in makes]
    if draw(flags):
        made = [nn.Sequential(*made), nn.Linear(WIDTH, 2)]
    model = nn.Sequential(*made)
    parts = list(model.modules())
    for index in draw(st.lists(st.integers(0, len(parts) - 1), max_size=2)):
        parts[index].eval()
    own = list(model.parameters())
    for index in draw(st.lists(st.integers(0, len(own) - 1), max_size=2)) if own else ():
        own[index].requires_grad_(False)
    return model


# ---------------------------------------------------------------- the same program on both


def moved(fmodel: Any, x: Tensor) -> list[Tensor]:
    """One step by hand on the graph; what the loss does not reach stays."""
    found = slopes(total(seeded(fmodel, x)) ** 2, fmodel.fast_params, create_graph=True)
    return [p - 0.1 * g.tanh() if p.requires_grad else p for p, g in zip(fmodel.fast_params, found, strict=True)]


def by_params(fmodel: Any, new: list[Tensor], x: Tensor) -> None:
    seeded(fmodel, x, params=new)


def by_setting(fmodel: Any, new: list[Tensor], x: Tensor) -> None:
    fmodel.fast_params = new


def by_update(fmodel: Any, new: list[Tensor], x: Tensor) -> None:
    fmodel.update_params(new)


ways = st.sampled_from([by_params, by_setting, by_update])


@given(networks(), st.lists(ways, max_size=3), flags, flags)
def test_it_is_what_higher_is(model: nn.Module, chosen: list[Any], copied: bool, tracking: bool) -> None:
    """Outputs, weights over time, buffers, and gradients through all updates, to the module or to the first weights."""
    mine, theirs = model, copy.deepcopy(model)
    x = torch.randn(5, WIDTH)
    before = everything(mine)
    options: Any = {"copy_initial_weights": copied, "track_higher_grads": tracking}
    ours, other = higher.monkeypatch(mine, **options), real.monkeypatch(theirs, **options)
    starts = ours.fast_params, other.fast_params
    for fmodel in (ours, other):
        for way in chosen:
            way(fmodel, moved(fmodel, x), x)
    assert everything(mine) == before
    assert times(ours) == times(other)
    for time in range(-times(ours), times(ours)) if tracking else (0, -1, None):
        assert_close(list(ours.parameters(time=time)), list(other.parameters(time=time)))
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        assert (type(a), a.requires_grad, a.is_leaf) == (type(b), b.requires_grad, b.is_leaf)
    outs = seeded(ours, x), seeded(other, x)
    assert_close(*outs)
    assert_close(dict(ours.named_buffers()), dict(other.named_buffers()))
    assert_close(ours.state_dict(), other.state_dict())
    if not outs[1].requires_grad:
        assert not outs[0].requires_grad
        return
    assert_close(slopes(outs[0].square().sum(), starts[0], True), slopes(outs[1].square().sum(), starts[1], True))
    for out in outs:
        out.square().sum().backward()
    assert_close([p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()])
    assert_close([p.requires_grad for p in mine.parameters()], [p.requires_grad for p in theirs.parameters()])


@given(networks(), flags)
def test_inner_loops_are_those_of_higher(model: nn.Module, copied: bool) -> None:
    """`innerloop_ctx` with momentum, three steps, and a loss at the end."""
    x, own, found = torch.randn(5, WIDTH), [model, copy.deepcopy(model)], []
    if not total(copy.deepcopy(model)(x)).requires_grad:
        return  # the loss reaches frozen weights alone
    for library, net in zip((higher, real), own, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        with library.innerloop_ctx(net, optimizer, copy_initial_weights=copied) as (fmodel, diffopt):
            start = fmodel.fast_params
            for _ in range(3):
                diffopt.step(total(seeded(fmodel, x)).tanh())
            loss = total(seeded(fmodel, x)).tanh()
        assert times(fmodel) == 4
        first = slopes(loss, start, create_graph=True)
        found.append([loss, first, [list(fmodel.parameters(time=time)) for time in range(4)], list(fmodel.buffers())])
    assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- errors have the types of higher's


ERRORS: dict[str, Callable[[Any, Any], Any]] = {
    "beyond the end": lambda h, f: list(f.parameters(time=1)),
    "before the start": lambda h, f: list(f.parameters(time=-2)),
    "untracked time": lambda h, f: list(h.monkeypatch(nn.Linear(2, 1), track_higher_grads=False).parameters(time=1)),
    "tracking is 1": lambda h, f: setattr(f, "track_higher_grads", 1),
    "patched twice": lambda h, f: h.monkeypatch(f),
    "patched part": lambda h, f: h.monkeypatch(f[0]),
    "patched inside": lambda h, f: h.monkeypatch(nn.Sequential(f)),
    "lazy": lambda h, f: h.monkeypatch(nn.LazyLinear(2)),
    "too short": lambda h, f: f(torch.ones(1, 4), params=[]),
    "number over a weight": lambda h, f: setattr(h.monkeypatch(nn.Linear(2, 1)), "weight", 3),
    "number over a module": lambda h, f: setattr(f, "0", 3),
    "parameter over a module": lambda h, f: setattr(f, "0", nn.Parameter(torch.ones(1))),
    "number over a buffer": lambda h, f: setattr(h.monkeypatch(nn.BatchNorm1d(2)), "running_mean", 3),
    "no forward": lambda h, f: h.monkeypatch(nn.ModuleList([nn.Linear(2, 1)]))(torch.ones(2)),
    "no weights": lambda h, f: h.patch.make_functional(nn.Linear(2, 1))(torch.ones(2)),
    "missing child": lambda h, f: h.patch.buffer_sync(nn.Sequential(*[nn.Tanh()] * 3), f),
    "unknown argument": lambda h, f: h.monkeypatch(nn.Linear(2, 1), gradients=True),
    "no such child": lambda h, f: f[5],
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_can_be_caught_as_those_of_higher(name: str) -> None:
    theirs, ours = (h.monkeypatch(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for h in (real, higher))
    kind = None
    try:
        ERRORS[name](real, theirs)
    except Exception as error:
        kind = type(error)
    assert kind not in (None, Exception)
    with pytest.raises(kind):
        ERRORS[name](higher, ours)


def test_names_and_classes_are_those_of_higher() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ModuleList([nn.LSTM(2, 3)]), Counted())
    ours, theirs = higher.monkeypatch(model), real.monkeypatch(model)
    assert repr(ours) == repr(theirs)
    assert type(ours).__qualname__ == type(theirs).__qualname__
    for name in dir(theirs):
        assert name.startswith("_") or hasattr(ours, name), name
    for name in ("monkeypatch", "make_functional", "buffer_sync"):
        assert hasattr(higher.patch, name)
        assert hasattr(real.patch, name)
