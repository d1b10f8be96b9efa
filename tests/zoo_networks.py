"""Networks as they are found in papers, each as small as it can be."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_member import Member
from zoo_modules import MLP

# ---------------------------------------------------------------- convolutions


class Residual(nn.Module):
    """A residual block with batch norm, squeeze-and-excitation, and stochastic depth."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms, self.skip = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]), nn.Conv2d(2, 4, 1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()
        )
        self.layer_scale, self.drop = nn.Parameter(torch.full((4, 1, 1), 0.1)), drop

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](self.first(x)), inplace=True)
        out = self.norms[1](self.second(out))
        out = out * self.squeeze(out) * self.layer_scale
        if self.drop and self.training:
            keep = out.new_empty(len(out), 1, 1, 1).bernoulli_(1 - self.drop)
            out = out * keep / (1 - self.drop)
        return F.relu(self.skip(x) + out)


class UNet(nn.Module):
    """Down, up by transposed convolutions, with a list of skips; a time embedding in between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.middle, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ConvTranspose2d(8, 2, 2, stride=2)])
        self.time = nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = F.max_pool2d(F.silu(layer(x)), 2)
            skips.append(x)
        angles = x.mean() * self.frequencies
        x = self.norm(self.middle(x)) + self.time(torch.cat([angles.sin(), angles.cos()]))[:, None, None]
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1))
        return x


# ---------------------------------------------------------------- sequences


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(3, 3, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None])[0]


class Cells(nn.Module):
    """A loop over time of one cell, whose state starts from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.start, self.read = nn.GRUCell(3, 4), nn.Parameter(torch.zeros(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, outs = self.start[None], []
        for row in x:
            state = self.cell(row[None], state)
            outs.append(self.read(state))
        return torch.cat(outs)


class Packed(nn.Module):
    """Sequences of different lengths; one network reads them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 3, batch_first=True, bidirectional=True, proj_size=2)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [3, 1], batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return out.sum(1) + self.rnn(x.flip(0))[0].sum(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.attention(x, x, x)[0])


class Decoder(nn.Module):
    """Causal attention with rotary positions, RMS norms, a gated MLP, and a mask and a cache made when first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.qkv = nn.ModuleList([nn.RMSNorm(4), nn.RMSNorm(4)]), nn.Linear(4, 12, bias=False)
        self.out, self.gate, self.mlp = nn.Linear(4, 4, bias=False), nn.Linear(4, 16), nn.Linear(8, 4)
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("angles", torch.outer(torch.arange(8.0), torch.tensor([1.0, 0.1])), persistent=False)
        self.cache: list[tuple[Tensor, Tensor]] = []

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = self.angles[: len(x)].cos(), self.angles[: len(x)].sin()
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) < len(x):
            self.mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        self.cache.append((k.detach(), v.detach()))
        x = x + self.out(F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, attn_mask=self.mask))
        first, second = self.gate(self.norms[1](x)).chunk(2, -1)
        return x + self.mlp(F.silu(first) * second) * len(self.cache)


class Translates(nn.Module):
    """An encoder and a decoder under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no nested tensors for pre-norm layers
            self.model = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return self.model(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)


# ---------------------------------------------------------------- tables and sets


def rows(x: Tensor, count: int = 6) -> Tensor:
    """Indices that follow from an input."""
    return x.detach().abs().mul(3).long().clamp(max=count - 1)


class LanguageModel(nn.Module):
    """Reads with an embedding and writes with the same matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.mix, self.write = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.write.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.mix(self.read(rows(x, 7))).tanh())


class Table(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Embedding, **options: object) -> None:
        super().__init__()
        self.table, self.head = kind(6, 3, **options), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(rows(x)))


class SparseTable(nn.Module):
    """Nothing but the table: its gradient is a sparse tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(rows(x)).sin()


class Graph(nn.Module):
    """Message passing: gathers along edges, scatters into nodes, normalizes by degree."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.attend = nn.Linear(6, 4), nn.Linear(7, 3), nn.Linear(4, 1)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        messages = self.message(torch.cat([x[source], x[target]], -1)).tanh()
        weights = self.attend(messages).exp()
        total = torch.zeros(len(x), 1).index_add(0, target, weights)
        mean = torch.zeros(len(x), 4).index_add(0, target, messages * weights) / total
        return self.update(torch.cat([x, mean], -1))


class Experts(nn.Module):
    """A mixture of experts; each sees only the rows that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == index)
            if len(row):
                out = out.index_add(0, row, expert(x[row]) * weights[row, rank, None])
        return out


class DenseExperts(nn.Module):
    """A mixture in which every expert sees every row."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 2)
        self.weights, self.shifts = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,bi,eio->bo", self.router(x).softmax(-1), x, self.weights) + self.router(x) @ self.shifts


# ---------------------------------------------------------------- whole models


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return F.cosine_similarity(self.branch(x), self.branch(x.flip(-1)))


class AveragedTwin(nn.Module):
    """A model beside its moving average, which has been updated before and is a constant here."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.average = torch.optim.swa_utils.AveragedModel(self.online, use_buffers=True)
        self.average.requires_grad_(False)
        self.average.update_parameters(self.online)

    def forward(self, x: Tensor) -> Tensor:
        return self.online(x) - self.average(x) * self.average.n_averaged


class Momentum(nn.Module):
    """A target network in buffers, which follows the online one in each training call."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Linear(3, 3)
        self.register_buffer("target", self.online.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.target.lerp_(self.online.weight.detach(), 0.1)
        return (self.online(x) - F.linear(x, self.target)).square()


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        draw = mean + torch.randn_like(mean) * log_scale.exp()
        divergence = 0.5 * (mean.square() + log_scale.exp().square() - 2 * log_scale - 1).sum(-1)
        return {"rebuilt": self.decoder(draw), "divergence": divergence}


def traced() -> nn.Module:
    """A graph module: code that was written by `torch.fx`, with a tied and a frozen layer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    model[3].weight = model[0].weight
    model[1].requires_grad_(False)
    graph = torch.fx.symbolic_trace(model)
    assert isinstance(graph, torch.fx.GraphModule)
    return graph


class LazyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.LazyConv1d(4, 2), nn.LazyBatchNorm1d(), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh())


def dropouts() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.ELU(), nn.AlphaDropout(0.3), nn.Linear(4, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose1d(3, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.RMSNorm(10), nn.PReLU())


MEMBERS = {
    "residual": Member(Residual, (3, 2, 4, 4), compiles=True),
    "stochastic_depth": Member(functools.partial(Residual, 0.5), (6, 2, 4, 4), random=True),
    "unet": Member(UNet, (2, 2, 4, 4)),
    "normed": Member(normed, (2, 3, 5)),
    "rnn": Member(functools.partial(Recurrent, nn.RNN)),
    "lstm": Member(Recurrent),
    "gru": Member(functools.partial(Recurrent, nn.GRU)),
    "cells": Member(Cells),
    "packed": Member(Packed, (2, 3, 3), blocked="packed sequences have no batching rule"),
    "attention": Member(Attention, (2, 3, 4), compiles=True),
    "decoder": Member(Decoder, (3, 4)),
    "translates": Member(Translates, (2, 3, 4)),
    "embedding": Member(functools.partial(Table, padding_idx=1)),
    "embedding_bag": Member(functools.partial(Table, nn.EmbeddingBag, mode="mean"), once="its backward is not derived"),
    "sparse": Member(SparseTable, once="torch does not derive sparse gradients"),
    "graph": Member(Graph),
    "experts": Member(Experts, blocked="which rows an expert sees depends on the data"),
    "dense_experts": Member(DenseExperts),
    "language_model": Member(LanguageModel),
    "siamese": Member(Siamese),
    "averaged_model": Member(lambda: torch.optim.swa_utils.AveragedModel(MLP())),
    "averaged_twin": Member(AveragedTwin),
    "momentum": Member(Momentum),
    "vae": Member(VAE, random=True),
    "traced": Member(traced),
    "lazy": Member(LazyNetwork, (2, 3, 5), lazy=True),
    "dropouts": Member(dropouts, random=True),
}
