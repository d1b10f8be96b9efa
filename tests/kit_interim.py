from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from statelessify.testing.strategies import Buffered, Indices, Residual, Shared, Single, Tied, seeded


def layers(n):
    return st.sampled_from(
        [
            lambda: nn.Linear(n, n),
            nn.Tanh,
            lambda: nn.LayerNorm(n),
            lambda: nn.Dropout(0.5),
            lambda: Residual(nn.Linear(n, n)),
            lambda: Tied(nn.Linear(n, n), nn.Linear(n, n)),
            lambda: Shared(nn.Linear(n, n)),
            lambda: Buffered(n),
            lambda: nn.Sequential(nn.Flatten(0, -2), nn.BatchNorm1d(n), nn.Unflatten(0, (3, -1))),
            lambda: Single(nn.MultiheadAttention(n, 1, batch_first=True), 3),
            lambda: Single(nn.GRU(n, n, batch_first=True)),
        ]
    )


@st.composite
def modules(draw, dtype=torch.float64, evaluating=None):
    n = draw(st.integers(2, 3))
    takes = [(draw(st.integers(2, 3)), n)]
    parts = []
    if draw(st.booleans()):
        takes = [Indices((2,), 3)]
        parts.append(nn.Embedding(3, n, padding_idx=draw(st.sampled_from([None, 0, -1]))))
    parts += [make() for make in draw(st.lists(layers(n), min_size=1, max_size=3))]
    parts += [nn.Linear(n, 1)]
    m = nn.Sequential(*parts)
    frozen = draw(st.sampled_from([[], [next(iter(dict(m.named_parameters())))]]))
    return seeded(
        m,
        draw(st.integers(0, 99)),
        takes=takes,
        dtype=dtype,
        frozen=frozen,
        evaluating=draw(st.booleans()) if evaluating is None else evaluating,
    )


def inputs_for(module, tasks=None):
    r = module._recipe
    return st.integers(0, 99).map(lambda seed: made(r, seed, (3,) if tasks is None else (tasks, 3)))


def made(r, seed, lead):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(0, t.below, (*lead, *t.shape), generator=g)
        if isinstance(t, Indices)
        else torch.randn((*lead, *t), generator=g, dtype=r.dtype)
        for t in r.takes
    )
