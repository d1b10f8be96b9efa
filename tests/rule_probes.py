"""One trap for each target of a rule: a probe passes where the rule holds, and fails with plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Kernels, close, gradients, ruled, scalar
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from statelessify import errors, stateless

PROBES: dict[Any, Callable[[], None]] = {}


def probe(*targets: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(run: Callable[[], None]) -> Callable[[], None]:
        PROBES.update(dict.fromkeys(targets, run))
        return run

    return register


# Functions that cannot be mapped -----------------------------------------------------------------------------------


def mapped(call: Callable[..., Tensor], *args: Tensor) -> None:
    expected = torch.stack([call(*row) for row in zip(*args, strict=True)])
    close(vmap(ruled(call), randomness="different")(*args), expected)


@probe(F.gaussian_nll_loss)
def _gaussian() -> None:
    mapped(F.gaussian_nll_loss, *torch.rand(3, 2, 4))


@probe(F.cross_entropy)
def _cross_entropy() -> None:
    weight = torch.rand(3)
    mapped(
        lambda x, y: F.cross_entropy(x, y, weight, label_smoothing=0.2), torch.randn(2, 4, 3), torch.randint(3, (2, 4))
    )


@probe(F.ctc_loss)
def _ctc() -> None:
    y = torch.tensor([[[1, 2]], [[2, 1]]])
    mapped(F.ctc_loss, torch.randn(2, 5, 1, 3), y, torch.tensor([[5], [4]]), torch.tensor([[2], [1]]))


@probe(F.normalize)
def _normalize() -> None:
    mapped(lambda x: F.normalize(x, out=torch.zeros_like(x)), torch.randn(3, 4, 2))


@probe(F.rrelu)
def _rrelu() -> None:
    mapped(lambda x: F.rrelu(x, 0.2, 0.2, True), torch.randn(3, 4))


def _recurrent(layer: Callable[..., nn.Module]) -> Callable[[], None]:
    def run() -> None:
        module, first = layer(2, 3), lambda out: out if isinstance(out, Tensor) else out[0]
        weights = {name: torch.stack([p, p.sin()]).detach() for name, p in module.named_parameters()}
        call = lambda *w: first(functional_call(module, dict(zip(weights, w, strict=True)), torch.ones(4, 2)))
        mapped(call, *weights.values())

    return run


PROBES |= {
    torch.lstm: _recurrent(nn.LSTM),
    torch.gru: _recurrent(nn.GRU),
    torch.rnn_tanh: _recurrent(nn.RNN),
    torch.rnn_relu: _recurrent(lambda *sizes: nn.RNN(*sizes, nonlinearity="relu")),
    torch.lstm_cell: _recurrent(nn.LSTMCell),
    torch.gru_cell: _recurrent(nn.GRUCell),
    torch.rnn_tanh_cell: _recurrent(nn.RNNCell),
    torch.rnn_relu_cell: _recurrent(lambda *sizes: nn.RNNCell(*sizes, nonlinearity="relu")),
}


@probe(F.embedding)
def _embedding() -> None:
    _padded(lambda w, x: F.embedding(x, w, padding_idx=1))


@probe(torch.embedding)
def _torch_embedding() -> None:
    _padded(lambda w, x: torch.embedding(w, x, 1))


def _padded(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The slope by each task's weights, where the padding has none."""
    weights, x = torch.randn(2, 3, 4), torch.tensor([[0, 1]] * 2)
    slopes = [gradients(lambda w, each=each: call(w, each), [w])[1] for w, each in zip(weights, x, strict=True)]
    found = grad(lambda w: sum(scalar(out) for out in vmap(ruled(call))(w, x)))(weights)
    close(found, torch.stack(slopes))


@probe(F.one_hot)
def _one_hot() -> None:
    x, classes = torch.randn(2, 3), torch.tensor([0, 2])
    close(vmap(grad(ruled(lambda x, c: F.one_hot(c, 3).to(x.dtype) @ x)))(x, classes), torch.eye(3)[classes])


# Branches that all tasks take --------------------------------------------------------------------------------------


def _branch(truth: Callable[[Tensor], Any]) -> Callable[[], None]:
    def run() -> None:
        mapped(lambda x, n: x if truth(n) else -x, torch.randn(2, 3), torch.tensor([[3, 4]] * 2))

    return run


PROBES |= {
    Tensor.all: _branch(lambda n: (n > 2).all()),
    Tensor.any: _branch(lambda n: (n > 3).any()),
    torch.all: _branch(lambda n: torch.all(n > 2)),
    torch.any: _branch(lambda n: torch.any(n > 3)),
    Tensor.__bool__: _branch(lambda n: (n > 2).all()),
    Tensor.__eq__: _branch(lambda n: n.sum() == 7),
}
for _name, _number in {"eq": 7, "ne": 7, "lt": 8, "le": 7, "gt": 6, "ge": 7}.items():
    PROBES[getattr(Tensor, _name)] = _branch(lambda n, name=_name, v=_number: getattr(n.sum(), name)(v))
    PROBES[getattr(torch, _name)] = _branch(lambda n, name=_name, v=_number: getattr(torch, name)(n.sum(), v))

# Functions without a derivative ------------------------------------------------------------------------------------


def forward_mode(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    _, slope = gradients(call, [x])
    tangent = torch.randn_like(x)
    close(jvp(ruled(call), (x,), (tangent,))[1], (slope * tangent).sum())


@probe(F.multi_margin_loss)
def _multi_margin() -> None:
    forward_mode(lambda x: F.multi_margin_loss(x, torch.tensor([0, 2])), torch.randn(2, 3))


@probe(F.multilabel_margin_loss)
def _multilabel_margin() -> None:
    forward_mode(lambda x: F.multilabel_margin_loss(x, torch.tensor([0, 2, -1])), torch.randn(3))


@probe(F.linear_cross_entropy)
def _linear_cross_entropy() -> None:
    weight, more = torch.randn(3, 4), {"options": nn.LinearCrossEntropyOptions(batch_chunk_size=1)}
    forward_mode(lambda x: F.linear_cross_entropy(x, weight, torch.tensor([0, 2]), **more), torch.randn(2, 4))


@probe(F.embedding_bag)
def _embedding_bag() -> None:
    forward_mode(lambda w: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), w).sum(), torch.randn(3, 4))


@probe(torch._weight_norm)
def _weight_norm() -> None:
    def slopes(v: Tensor) -> Tensor:
        out = ruled(torch._weight_norm, "always")(v, torch.ones(2, 1))
        return torch.autograd.grad(scalar(out.sin()), v, create_graph=True)[0]

    assert torch.autograd.gradcheck(slopes, torch.randn(2, 3, requires_grad=True))


def second_order(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    out = ruled(call, "always")(x)
    (slope,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    torch.autograd.grad(slope.sum(), x)


@probe(F.scaled_dot_product_attention)
def _attention() -> None:
    second_order(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]))


@probe(F.multi_head_attention_forward)
def _multi_head_attention() -> None:
    module = nn.MultiheadAttention(4, 2)
    second_order(lambda x: module(x, x, x, need_weights=False)[0])


# Norms: the numbers are wrong --------------------------------------------------------------------------------------


def _meta(norm: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Differentiate ``vmap(grad(loss))``, against a loop; with a weight, without which torch is right."""

    def run() -> None:
        x, weight = torch.randn(3, 2, 5, 5), torch.randn(5)
        inner = lambda w, x: (ruled(norm)(x * w, w).sin() ** 2).sum()
        slope = lambda w, x: (grad(inner)(w, x) ** 2).sum()
        found = grad(lambda w: vmap(slope, in_dims=(None, 0))(w, x).sum())(weight)
        close(found, grad(lambda w: sum(slope(w, each) for each in x))(weight), 1e-8)

    return run


PROBES |= {
    F.layer_norm: _meta(lambda x, w: F.layer_norm(x, (5,), w)),
    torch.layer_norm: _meta(lambda x, w: torch.layer_norm(x, (5,), w)),
    torch.native_layer_norm: _meta(lambda x, w: torch.native_layer_norm(x, (5,), w, None, 1e-5)[0]),
    F.batch_norm: _meta(lambda x, w: F.batch_norm(x, None, None, w, training=True)),
    torch.batch_norm: _meta(lambda x, w: torch.batch_norm(x, w, None, None, None, True, 0.1, 1e-5, True)),
    torch.native_batch_norm: _meta(lambda x, w: torch.native_batch_norm(x, w, None, None, None, True, 0.1, 1e-5)[0]),
    F.instance_norm: _meta(lambda x, w: F.instance_norm(x, weight=w)),
    torch.instance_norm: _meta(lambda x, w: torch.instance_norm(x, w, None, None, None, True, 0.1, 1e-5, True)),
}

# Modules -----------------------------------------------------------------------------------------------------------


def _module(module: nn.Module, *args: Any) -> None:
    """`torch.vmap` of `apply` over the last of the arguments."""
    apply, params, buffers = stateless(module)
    first = lambda out: out if isinstance(out, Tensor) else out.output
    found = vmap(lambda last: first(apply(params, buffers, *args[:-1], last)[0]))(args[-1])
    close(found, torch.stack([first(module(*args[:-1], last)) for last in args[-1]]))


CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
MASKS = torch.stack([CAUSAL, CAUSAL.mT])


@probe(nn.TransformerEncoder)
def _encoder() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    _module(nn.TransformerEncoder(layer, 1), torch.randn(2, 3, 4), MASKS)


@probe(nn.TransformerDecoder)
def _decoder() -> None:
    layer = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 4)
    _module(nn.TransformerDecoder(layer, 1), x, x, MASKS)


@probe(nn.AdaptiveLogSoftmaxWithLoss)
def _adaptive_log_softmax() -> None:
    _module(nn.AdaptiveLogSoftmaxWithLoss(5, 6, [2, 4], 2.0), torch.randn(4, 5), torch.randint(6, (2, 4)))


class _Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return copy.deepcopy(self.part)(x)


@probe(Tensor.__deepcopy__)
def _deep_copy() -> None:
    apply, params, buffers = stateless(_Copies())
    outs = [apply(own, buffers, torch.ones(3))[0] for own in (params, {k: p * 1 for k, p in params.items()})]
    close(outs[1], outs[0])


class _Sets(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.requires_grad_(False)
        return super().forward(x)


@probe(Tensor.requires_grad_)
def _set_requires_grad() -> None:
    apply, params, buffers = stateless(_Sets(3, 2))
    with pytest.raises(errors.ModuleError):
        apply({k: p * 1 for k, p in params.items()}, buffers, torch.ones(3))


@probe(Tensor.requires_grad.__get__)
def _requires_grad() -> None:
    call = ruled(lambda w: w if w.requires_grad else w * 0)
    close(grad(lambda w: vmap(call)(w).sum())(torch.ones(3)), torch.ones(3))


class _Gated(nn.Module):  # whose first call does without its part
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.part(x, *args, **kwargs) if args or kwargs else x


@probe(nn.MultiheadAttention)
def _attention_module() -> None:
    """Without the rule of the module each call needs a mode for the function, which takes longer than the module."""
    part = nn.MultiheadAttention(4, 2)
    part.register_forward_pre_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    modes: list[int] = []
    apply, params, buffers = stateless(_Gated(part))
    x = torch.randn(3, 2, 4)
    for _ in range(2):
        apply(params, buffers, x, x, x, need_weights=False)
    assert modes == [1, 0]
    out = apply(params, buffers, x, x, x, need_weights=False)[0][0]
    grads = torch.autograd.grad(out.sin().sum(), list(params.values()), create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in grads), list(params.values()))


@probe(nn.TransformerEncoderLayer)
def _encoder_layer() -> None:
    """Its fast path is off in evaluation, whatever requires a gradient."""
    module = _Gated(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)).eval()
    apply, params, buffers = stateless(module)
    x = torch.randn(2, 3, 4)
    apply(params, buffers, x)
    for given in (params, {name: p.detach() for name, p in params.items()}):
        with Kernels() as seen:
            apply(given, buffers, x, src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
        assert "_transformer_encoder_layer_fwd" not in seen.names


@probe(torch._nested_tensor_from_mask_left_aligned)
def _left_aligned() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    apply, params, buffers = stateless(nn.TransformerEncoder(layer, 1).eval(), params="detach")
    x, masks = torch.randn(2, 3, 4), torch.tensor([[[False, False, True], [False, True, True]]]).expand(2, 2, 3)
    call = lambda mask: apply(params, buffers, x, src_key_padding_mask=mask)[0]
    close(vmap(call)(masks), torch.stack([call(mask) for mask in masks]))


@probe(torch._C._set_grad_enabled)
def _without_grad() -> None:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = x.square()
        return (x * fixed).sum()

    x, tangent = torch.randn(3), torch.randn(3)
    close(jvp(ruled(call), (x,), (tangent,))[1], (x.square() * tangent).sum())
