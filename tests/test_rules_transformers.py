"""Multi-head attention and torch's Transformers: second order in eager code, masks per task, no mode without need."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_checks import close
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from statelessify import adapt, adapt_tasks, optim, over_tasks, stateless

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning"),
]

LENGTH, ROWS, WIDTH = 3, 2, 4
Params = dict[str, Tensor]


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, 2, 5, dropout=0.0, **options)


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(WIDTH, 2, 5, dropout=0.0, **options)


class Attends(nn.Module):
    """A function of one sequence: `need_weights` both ways, of which the second uses the fused kernel."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, **options)

    def forward(self, x: Tensor, need_weights: bool = False, **masks: Any) -> Any:
        out, weights = self.attention(x, x, x, need_weights=need_weights, **masks)
        return out if weights is None else torch.cat([out.flatten(), weights.flatten()])


class OnItself(nn.Module):
    """A decoder, or both halves, on one sequence."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, x.sin(), tgt_mask=mask)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attends,
    "layer": layer,
    "layer, batch first": lambda: layer(batch_first=True, norm_first=True, activation="gelu"),
    "encoder": lambda: nn.TransformerEncoder(layer(batch_first=True), 2, nn.LayerNorm(WIDTH)),
    "decoder": lambda: OnItself(nn.TransformerDecoder(decoder_layer(batch_first=True), 2)),
    "decoder layer": lambda: OnItself(decoder_layer(norm_first=True)),
    "transformer": lambda: OnItself(nn.Transformer(WIDTH, 2, 1, 1, 5, 0.0, batch_first=True)),
}
modules = pytest.mark.parametrize("name", MODULES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def made(name: str, training: bool = True) -> nn.Module:
    module = MODULES[name]().train(training)
    with torch.no_grad():
        for parameter in module.parameters():  # biases are zero at first
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def second_order(run: Callable[[Params], Tensor], params: Params) -> list[Tensor]:
    value = run(params)
    options: Any = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(value.sin().sum(), list(params.values()), create_graph=True, **options)
    total = sum((g.sin().sum() for g in first), torch.zeros(()))
    return [value, *first, *torch.autograd.grad(total, list(params.values()), **options)]


def by_torch(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):  # torch's own kernel with a second derivative
        return second_order(lambda p: functional_call(module, p, args, kwargs), params)


# ---------------------------------------------------------------- eager code


@modules
@modes
@pytest.mark.parametrize("bound", [False, True], ids=["apply", "bind"])
def test_second_order_in_eager_code(name: str, training: bool, bound: bool) -> None:
    module, x = made(name, training), torch.randn(ROWS, LENGTH, WIDTH)
    apply, params, buffers = stateless(module, params="detach")
    for _ in range(2):  # the second call is the one that has learnt what it needs
        run = lambda p: apply.bind(p, buffers)(x) if bound else apply(p, buffers, x)[0]
        close(second_order(run, params), by_torch(module, params, x))


@st.composite
def attention_options(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], Callable[[], Tensor]]:
    options = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    batched, kind = draw(st.booleans()), draw(st.sampled_from(["none", "bool", "float", "causal"]))
    masks: dict[str, Any] = {"need_weights": draw(st.booleans())}
    mask = torch.rand(LENGTH, LENGTH) > 0.6
    mask.fill_diagonal_(False)
    if kind == "causal":
        masks |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True}
    elif kind != "none":
        masks["attn_mask"] = mask if kind == "bool" else torch.randn(LENGTH, LENGTH)
    if draw(st.booleans()):
        padding = torch.tensor([[False, False, True], [False, False, False]])[: ROWS if batched else 1]
        padding = padding if batched else padding[0]
        masks["key_padding_mask"] = (
            torch.zeros(padding.shape).masked_fill(padding, -5.0) if kind == "float" else padding
        )
    if kind == "causal" and masks.get("key_padding_mask") is not None:
        del masks["key_padding_mask"]  # a mask of another type is deprecated
    first = options["batch_first"]
    shape = ((ROWS, LENGTH, WIDTH) if first else (LENGTH, ROWS, WIDTH)) if batched else (LENGTH, WIDTH)
    return options, masks, lambda: torch.randn(shape)


@given(attention_options(), st.booleans())
def test_multi_head_attention(drawn: Any, training: bool) -> None:
    """As torch's, twice differentiable; and over tasks, with shared and with own parameters."""
    options, masks, make = drawn
    module = Attends(**options).train(training)
    apply, params, buffers = stateless(module, params="detach")
    x = make()
    close(second_order(lambda p: apply(p, buffers, x, **masks)[0], params), by_torch(module, params, x, **masks))
    xs, many = torch.stack([make(), make()]), {k: torch.stack([p, 2 * p]).detach() for k, p in params.items()}
    for in_dims in ((None, 0), (0, None), (0, 0)):
        found = vmap(lambda p, x: apply(p, buffers, x, **masks)[0], in_dims)(
            params if in_dims[0] is None else many, x if in_dims[1] is None else xs
        )
        for index in range(2):
            one = params if in_dims[0] is None else {k: p[index] for k, p in many.items()}
            close(found[index], functional_call(module, one, (x if in_dims[1] is None else xs[index],), masks))


@pytest.mark.parametrize("name", ["attention", "layer", "layer, batch first", "encoder"])
def test_evaluation_does_not_depend_on_what_requires_a_gradient(name: str) -> None:
    """Torch takes another path where nothing does, which gives zero for what is padded."""
    module, x = made(name, False), torch.randn(ROWS, LENGTH, WIDTH)
    columns = LENGTH if name in ("layer, batch first", "encoder") else ROWS
    padding = torch.zeros(ROWS if columns == LENGTH else LENGTH, columns, dtype=torch.bool)
    padding[0, -1] = True
    apply, params, buffers = stateless(module, params="detach")
    kwargs = {"key_padding_mask" if name == "attention" else "src_key_padding_mask": padding}
    frozen = {key: p.detach() for key, p in params.items()}
    outs = [apply(p, buffers, x, **kwargs)[0] for p in (frozen, params, frozen)]
    with torch.no_grad():
        outs.append(apply(params, buffers, x, **kwargs)[0])
    for out in outs:
        close(out.detach(), functional_call(module, params, (x,), kwargs).detach(), 1e-12)


def test_meta_gradients_of_a_transformer() -> None:
    """First-order or not, one by one or all at once."""
    module, batches = made("encoder"), torch.randn(3, ROWS, LENGTH, WIDTH)
    apply, params, buffers = stateless(module, params="detach")
    loss = lambda p, x: apply(p, buffers, x)[0].square().mean()
    run = {"optimizer": optim.sgd(lr=0.1), "steps": 2}
    together = over_tasks(loss, in_dims=0)(adapt_tasks(loss, params, batches, **run).params, batches).sum()
    apart = sum(loss(adapt(loss, params, x, **run).params, x) for x in batches)
    total = torch.zeros(())
    with sdpa_kernel(SDPBackend.MATH):
        for x in batches:
            own: Params = dict(params)
            for _ in range(2):
                value = functional_call(module, own, (x,)).square().mean()
                grads = torch.autograd.grad(value, list(own.values()), create_graph=True)
                own = {key: p - 0.1 * g for (key, p), g in zip(own.items(), grads, strict=True)}
            total = total + functional_call(module, own, (x,)).square().mean()
    expected = torch.autograd.grad(total, list(params.values()))
    for value in (together, apart):
        close(torch.autograd.grad(value, list(params.values())), expected)


# ---------------------------------------------------------------- masks of each task

CAUSAL = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
OTHER = torch.tensor([[False, True, False], [False, False, True], [True, False, False]])


@pytest.mark.parametrize("name", ["encoder", "decoder", "transformer"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@modes
def test_masks_of_each_task(name: str, kind: str, training: bool) -> None:
    """Of which one is causal, one is not, one masks nothing."""
    module, x = made(name, training), torch.randn(3, ROWS, LENGTH, WIDTH)
    masks = torch.stack([CAUSAL, OTHER, torch.zeros_like(OTHER)])
    masks = masks if kind == "bool" else torch.zeros(masks.shape).masked_fill(masks, -torch.inf)
    apply, params, buffers = stateless(module, params="detach")
    for batched in (x, x[0]):
        found = vmap(lambda x, mask: apply(params, buffers, x, mask)[0], (0 if batched is x else None, 0))(
            batched, masks
        )
        rows = [functional_call(module, params, (x[i] if batched is x else x[0], masks[i])) for i in range(3)]
        close(found, torch.stack(rows))
        close(
            torch.autograd.grad(found.sin().sum(), list(params.values())),
            torch.autograd.grad(torch.stack(rows).sin().sum(), list(params.values())),
        )


@pytest.mark.parametrize("how", ["positional", "keyword", "hint", "no hint"])
def test_every_way_to_pass_a_mask(how: str) -> None:
    x, mask = torch.randn(3, ROWS, LENGTH, WIDTH), torch.zeros(LENGTH, LENGTH).masked_fill(CAUSAL, -torch.inf)
    padding = torch.zeros(ROWS, LENGTH).masked_fill(torch.tensor([[False, False, True]] * ROWS), -torch.inf)
    calls: dict[str, Any] = {
        "positional": ((mask, padding, True), {}),
        "keyword": ((), {"mask": mask, "src_key_padding_mask": padding}),
        "hint": ((mask,), {"is_causal": True}),
        "no hint": ((mask, padding), {"is_causal": None}),
    }
    args, kwargs = calls[how]
    encoder = made("encoder")
    apply, params, buffers = stateless(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = vmap(lambda x: apply(params, buffers, x, *args, **kwargs)[0])(x)
    close(found, torch.stack([encoder(each, *args, **kwargs) for each in x]))
    decoder = nn.TransformerDecoder(decoder_layer(batch_first=True), 2)
    apply, params, buffers = stateless(decoder)
    hint = {"tgt_is_causal": {"positional": True, "hint": True}.get(how)}
    both = lambda call: lambda x: call(x, x.sin(), mask, memory_key_padding_mask=padding, **hint)
    found = vmap(both(lambda *a, **k: apply(params, buffers, *a, **k)[0]))(x)
    close(found, torch.stack([both(decoder)(each) for each in x]))


# ---------------------------------------------------------------- the mode is there only where it is needed


class Counts(nn.Module):
    """Notes how many modes are active; `attends` says whether it attends in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: list[int], attends: bool) -> Tensor:
        seen.append(torch._C._len_torch_function_stack())
        x = self.linear(x)
        return F.scaled_dot_product_attention(x, x, x) if attends else x


class CountsAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: list[int], _: bool) -> Tensor:
        seen.append(torch._C._len_torch_function_stack())
        return self.linear(x)


@pytest.mark.parametrize(("kind", "attends"), [(CountsAlone, False), (Counts, False), (Counts, True)])
def test_eager_code_has_a_mode_only_where_it_may_attend(kind: type[nn.Module], attends: bool) -> None:
    apply, params, buffers = stateless(kind())
    seen: list[int] = []
    for _ in range(3):
        apply(params, buffers, torch.randn(LENGTH, WIDTH), seen, attends)
    vmap(lambda x: apply(params, buffers, x, seen, attends)[0])(torch.randn(2, LENGTH, WIDTH))
    apply(params, buffers, torch.randn(LENGTH, WIDTH), seen, attends)
    assert seen == ([1] * 5 if kind is Counts else [1, 0, 0, 1, 0])
    assert torch._C._len_torch_function_stack() == 0


def test_a_first_call_that_fails_teaches_nothing() -> None:
    module = Counts()
    apply, params, buffers = stateless(module, params="detach")
    with pytest.raises(RuntimeError):
        apply(params, buffers, torch.randn(LENGTH, WIDTH + 1), [], True)
    x = torch.randn(1, 2, LENGTH, WIDTH)  # with fewer dimensions there is no fused kernel
    run = lambda p: apply(p, buffers, x, [], True)[0]
    close(second_order(run, params), by_torch(module, params, x, [], True))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attends = Attends()

    def forward(self, x: Tensor, gate: bool) -> Tensor:
        return self.attends(x) if gate else x


def test_a_first_call_that_does_not_attend() -> None:
    module = Gated()
    apply, params, buffers = stateless(module, params="detach")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    apply(params, buffers, x, False)
    close(second_order(lambda p: apply(p, buffers, x, True)[0], params), by_torch(module, params, x, True))
