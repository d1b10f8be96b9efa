"""What drawn modules are made of: families of layers, each with the inputs that it is for and its legal settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st
from torch import nn

from ._blocks import Buffered, Residual, Shared, Single, Tied
from ._recipe import Call, Indices, call

__all__: list[str] = []

Shape = tuple[int, ...]


class Wanted(NamedTuple):
    """What the layers of a module are to be.

    Attributes:
        smooth: with derivatives of every order, which are what a small change of the weights brings about.
        random: whether dropout and the like are allowed.
    """

    smooth: bool
    random: bool


class Layer(NamedTuple):
    """A kind of layer.

    Attributes:
        make: ``make(draw, shape, wanted) -> (call, shape of the output)``; shapes are without the batch dimension.
        fits: ``fits(shape, wanted)`` says whether it is for such an input.
    """

    make: Callable[[st.DrawFn, Shape, Wanted], tuple[Call, Shape]]
    fits: Callable[[Shape, Wanted], bool]


SIZE = st.integers(1, 3)
YES = st.sampled_from([True, False])
NO = st.booleans()
LINEAR = st.sampled_from([(out, bias) for bias in (True, False) for out in (1, 2, 3)])
"""Sizes and biases, one choice, so that no module is found to be smaller than a linear layer."""


def settings(draw: st.DrawFn, **options: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Keyword arguments, each drawn."""
    return {name: draw(option) for name, option in options.items()}


# ---------------------------------------------------------------- linear


def linear(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    out, bias = draw(LINEAR)
    return call(nn.Linear, shape[-1], out, bias=bias), (*shape[:-1], out)


def bilinear(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    out = draw(SIZE)
    layer = call(nn.Bilinear, shape[-1], shape[-1], out, bias=draw(YES))
    return Call(Single, (layer, 2), {}), (*shape[:-1], out)


def tied(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    size = shape[-1]
    first, last = (call(nn.Linear, size, size, bias=draw(YES)) for _ in range(2))
    return Call(Tied, (first, last), {}), shape


def parametrized(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    inner, out = linear(draw, shape, wanted)
    tools = nn.utils.parametrizations
    kinds: list[Call] = [call(tools.weight_norm, inner, dim=draw(st.sampled_from([0, 1])))]
    if not wanted.smooth:  # in training, a spectral norm follows the weights outside of the graph
        kinds += [call(tools.spectral_norm, inner), call(tools.orthogonal, inner, orthogonal_map="cayley")]
    return draw(st.sampled_from(kinds)), out


# ---------------------------------------------------------------- elementwise

_SMOOTH: list[Call] = [
    call(nn.Tanh),
    call(nn.Sigmoid),
    call(nn.Softplus),
    call(nn.GELU),
    call(nn.GELU, approximate="tanh"),
    call(nn.SiLU),
    call(nn.Mish),
    call(nn.LogSigmoid),
    call(nn.Tanhshrink),
    call(nn.Softmax, dim=-1),
]
_CORNERED: list[Call] = [
    call(nn.ReLU),
    call(nn.LeakyReLU),
    call(nn.ELU),
    call(nn.SELU),
    call(nn.Hardtanh),
    call(nn.Hardswish),
    call(nn.Softsign),
    call(nn.PReLU),
]


def activation(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    noisy = [call(nn.RReLU)] if wanted.random else []
    return draw(st.sampled_from(_SMOOTH if wanted.smooth else [*_SMOOTH, *_CORNERED, *noisy])), shape


def dropout(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    kinds: list[Any] = [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout]
    if len(shape) > 1:
        kinds.append(getattr(nn, f"Dropout{len(shape) - 1}d"))
    return call(draw(st.sampled_from(kinds)), p=draw(st.sampled_from([0.5, 0.25]))), shape


def buffered(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    return call(Buffered, shape[-1], **settings(draw, persistent=YES, moves=YES)), shape


# ---------------------------------------------------------------- norms


def eps(wanted: Wanted) -> st.SearchStrategy[float]:
    """Of a norm: small ones make large derivatives where a variance vanishes."""
    return st.sampled_from([0.5, 0.25] if wanted.smooth else [1e-5, 0.5])


def layer_norm(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    last = shape[draw(st.integers(0, len(shape) - 1)) - len(shape) :] if len(shape) > 1 else shape
    size = last[0] if len(last) == 1 else last
    kind = draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))
    return call(kind, size, **settings(draw, eps=eps(wanted), elementwise_affine=YES)), shape


def group_norm(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    groups = draw(st.sampled_from([n for n in range(1, shape[0] + 1) if shape[0] % n == 0]))
    return call(nn.GroupNorm, groups, shape[0], **settings(draw, eps=eps(wanted), affine=YES)), shape


def batch_norm(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    kind = getattr(nn, f"BatchNorm{max(1, len(shape) - 1)}d")
    momentum = st.sampled_from([0.1, None])
    options = settings(draw, eps=eps(wanted), momentum=momentum, affine=YES, track_running_stats=YES)
    return call(kind, shape[0], **options), shape


def instance_norm(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    kind = getattr(nn, f"InstanceNorm{len(shape) - 1}d")
    return call(kind, shape[0], **settings(draw, eps=eps(wanted), affine=NO, track_running_stats=NO)), shape


# ---------------------------------------------------------------- images


def convolution(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    channels, *sides = shape
    out, kernel, padding = draw(SIZE), draw(st.integers(1, min(2, *sides))), draw(st.sampled_from([0, 1]))
    stride = draw(st.sampled_from([1, 2]))
    groups = draw(st.sampled_from([1, channels])) if out % channels == 0 else 1
    options: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups, "bias": draw(YES)}
    if padding:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "circular"]))
    new = tuple((side + 2 * padding - kernel) // stride + 1 for side in sides)
    return call(getattr(nn, f"Conv{len(sides)}d"), channels, out, kernel, **options), (out, *new)


def transposed(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    channels, *sides = shape
    out, kernel = draw(SIZE), draw(st.integers(1, 2))
    layer = call(getattr(nn, f"ConvTranspose{len(sides)}d"), channels, out, kernel, bias=draw(YES))
    return layer, (out, *(side + kernel - 1 for side in sides))


def pool(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    channels, *sides = shape
    kinds = ["AvgPool"] if wanted.smooth else ["AvgPool", "MaxPool"]
    kernel = draw(st.integers(1, min(2, *sides)))
    layer = call(getattr(nn, f"{draw(st.sampled_from(kinds))}{len(sides)}d"), kernel, stride=1)
    return layer, (channels, *(side - kernel + 1 for side in sides))


def flatten(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    return call(nn.Flatten), (math.prod(shape),)


# ---------------------------------------------------------------- sequences


def _noise(draw: st.DrawFn, wanted: Wanted) -> float:
    return draw(st.sampled_from([0.0, 0.5] if wanted.random else [0.0]))


def attention(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    heads = draw(st.sampled_from([n for n in range(1, shape[-1] + 1) if shape[-1] % n == 0]))
    options: dict[str, Any] = {"dropout": _noise(draw, wanted), "bias": draw(YES), "batch_first": True}
    return Call(Single, (call(nn.MultiheadAttention, shape[-1], heads, **options), 3), {}), shape


def transformer(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    heads = draw(st.sampled_from([n for n in range(1, shape[-1] + 1) if shape[-1] % n == 0]))
    options: dict[str, Any] = {
        "dim_feedforward": draw(SIZE),
        "dropout": _noise(draw, wanted),
        "activation": "gelu" if wanted.smooth else draw(st.sampled_from(["relu", "gelu"])),
        "layer_norm_eps": draw(eps(wanted)),
        "batch_first": True,
        "norm_first": draw(NO),
    }
    return call(nn.TransformerEncoderLayer, shape[-1], heads, **options), shape


def recurrent(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    kind, hidden, layers = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM])), draw(SIZE), draw(st.integers(1, 2))
    both = draw(NO)
    options: dict[str, Any] = {"num_layers": layers, "bias": draw(YES), "batch_first": True, "bidirectional": both}
    if kind is nn.RNN and not wanted.smooth:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if layers > 1:
        options["dropout"] = _noise(draw, wanted)
    return Call(Single, (call(kind, shape[-1], hidden, **options),), {}), (shape[0], hidden * (1 + both))


def cell(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    kind, hidden = draw(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell])), draw(SIZE)
    layer = call(kind, shape[-1], hidden, bias=draw(YES))
    return (Call(Single, (layer,), {}) if kind is nn.LSTMCell else layer), (hidden,)


# ---------------------------------------------------------------- blocks


def _inner(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> Call:
    """A layer whose output has the shape of its input."""
    size = shape[-1]
    plain = call(nn.Linear, size, size, bias=draw(YES))
    # Shared, a buffer that moves hands on a mean that is no part of the graph.
    moving = {"moves": False} if wanted.smooth else {}
    layers = [plain, call(nn.LayerNorm, size, eps=draw(eps(wanted))), call(Buffered, size, **moving)]
    return draw(st.sampled_from(layers))


def residual(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    return Call(Residual, (_inner(draw, shape, wanted),), {}), shape


def shared(draw: st.DrawFn, shape: Shape, wanted: Wanted) -> tuple[Call, Shape]:
    return Call(Shared, (_inner(draw, shape, wanted),), {}), shape


# ---------------------------------------------------------------- the table


def _any(shape: Shape, wanted: Wanted) -> bool:
    return True


def _vector(shape: Shape, wanted: Wanted) -> bool:
    return len(shape) == 1


def _sequence(shape: Shape, wanted: Wanted) -> bool:
    return len(shape) == 2


def _image(shape: Shape, wanted: Wanted) -> bool:
    return 2 <= len(shape) <= 4


def _several(shape: Shape, wanted: Wanted) -> bool:
    return len(shape) > 1


def _spread(shape: Shape, wanted: Wanted) -> bool:
    return _image(shape, wanted) and math.prod(shape[1:]) > 1


def _random(shape: Shape, wanted: Wanted) -> bool:
    return wanted.random


FAMILIES: dict[str, tuple[Layer, ...]] = {
    "linear": (Layer(linear, _any),),
    "activation": (Layer(activation, _any),),
    "norm": (
        Layer(batch_norm, _any),
        Layer(layer_norm, _any),
        Layer(group_norm, _any),
        Layer(instance_norm, _spread),
    ),
    "conv": (Layer(convolution, _image), Layer(transposed, _image)),
    "pool": (Layer(pool, _image),),
    "reshape": (Layer(flatten, _several),),
    "recurrent": (Layer(cell, _vector), Layer(recurrent, _sequence)),
    "attention": (Layer(attention, _sequence), Layer(transformer, _sequence)),
    "dropout": (Layer(dropout, _random),),
    "residual": (Layer(residual, _any),),
    "tied": (Layer(tied, _any),),
    "shared": (Layer(shared, _any),),
    "buffered": (Layer(buffered, _any),),
    "bilinear": (Layer(bilinear, _any),),
    "parametrized": (Layer(parametrized, _any),),
}
"""Family -> its layers, simplest first; a module of integers begins with one of `embedding`, too."""


def embedding(draw: st.DrawFn, item: Indices, wanted: Wanted) -> tuple[Call, Shape]:
    """A layer for integers."""
    size = draw(SIZE)
    padding = None if wanted.smooth else draw(st.sampled_from([None, 0]))  # its row has the gradient zero by decree
    if item.shape and draw(NO) and not wanted.smooth:  # torch has no second derivative of a bag
        mode = draw(st.sampled_from(["mean", "sum"]))
        return call(nn.EmbeddingBag, item.below, size, mode=mode, padding_idx=padding), (size,)
    return call(nn.Embedding, item.below, size, padding_idx=padding), (*item.shape, size)
