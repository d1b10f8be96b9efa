"""Hugging Face models, tiny and with random weights: all that `conformity.py` asks of a module, and meta-gradients.

The user's part is what anyone writes who trains them: `use_cache=False`, and `.loss` of what comes out.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conformance_report import NotApplicable, conform
from conformity import CHECKS, Case
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from statelessify import adapt, adapt_tasks, optim, over_tasks, stateless, tree_unstack
from statelessify.typing import Backend

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # configurations are made here; nothing is to be fetched
hf = pytest.importorskip("transformers", reason="transformers is installed for the conformance session only")
hf.logging.set_verbosity_error()  # no advice on configurations that nobody is going to use

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward-mode rules are scripted when they are first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

Inputs = dict[str, Any]

VOCABULARY, LENGTH, ROWS = 13, 5, 2
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
# A mask drawn again in each call could not be compared. BERT and ViT have the same names for it, the others their own.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# ---------------------------------------------------------------- the models


def gpt2(attention: str) -> nn.Module:
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = hf.GPT2Config(vocab_size=VOCABULARY, attn_implementation=attention, **sizes, **dropout, **ends)
    return hf.GPT2LMHeadModel(config)


def bert(attention: str) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_labels": 3}
    config = hf.BertConfig(attn_implementation=attention, **sizes, **SIZES, **NO_DROPOUT)
    return hf.BertForSequenceClassification(config)


def llama(attention: str) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_key_value_heads": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(attn_implementation=attention, **sizes, **SIZES))


def vit(attention: str) -> nn.Module:
    sizes = {"image_size": 6, "patch_size": 3, "num_channels": 2, "num_labels": 3}
    return hf.ViTForImageClassification(hf.ViTConfig(attn_implementation=attention, **sizes, **SIZES, **NO_DROPOUT))


def t5(attention: str) -> nn.Module:
    """Encoder and decoder; the embedding is the encoder's, the decoder's and, transposed, the head."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    buckets = {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 6}
    config = hf.T5Config(attn_implementation=attention, dropout_rate=0.0, decoder_start_token_id=0, **sizes, **buckets)
    return hf.T5ForConditionalGeneration(config)


def images(mask: str, *tasks: int) -> Inputs:
    return {"pixel_values": torch.randn(*tasks, ROWS, 2, 6, 6), "labels": torch.randint(3, (*tasks, ROWS))}


def texts(mask: str, *tasks: int) -> Inputs:
    """Sequences, each filled up to the longest with token 0, as a tokenizer does."""
    words = torch.randint(1, VOCABULARY, (*tasks, ROWS, LENGTH))
    if tasks:  # token 0 also where it counts: BERT's table gets no gradient in this row, whatever differences say
        words[..., 1] = 0
    if mask == "no mask":
        return {"input_ids": words}
    lengths = torch.full((*tasks, ROWS), LENGTH)
    if mask != "full":
        lengths[..., 0] = LENGTH - 2
    if mask == "full in one task":
        lengths[0] = LENGTH
    kept = torch.arange(LENGTH) < lengths.unsqueeze(-1)
    return {"input_ids": words * kept, "attention_mask": kept.long()}


def classified(mask: str, *tasks: int) -> Inputs:
    return {**texts(mask, *tasks), "labels": torch.randint(3, (*tasks, ROWS))}


def continued(mask: str, *tasks: int) -> Inputs:
    """The labels are the words themselves; -100 says that a place does not count."""
    inputs = texts(mask, *tasks)
    kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return {**inputs, "labels": torch.where(kept == 1, inputs["input_ids"], -100)}


def translated(mask: str, *tasks: int) -> Inputs:
    return {**texts(mask, *tasks), "labels": torch.randint(VOCABULARY, (*tasks, ROWS, LENGTH - 1))}


class Model(NamedTuple):
    """A model by its attention; inputs by their padding and the number of tasks; what else a user passes."""

    make: Callable[[str], nn.Module]
    inputs: Callable[..., Inputs]
    options: dict[str, Any]


MODELS = {
    "GPT-2": Model(gpt2, continued, {"use_cache": False}),
    "BERT": Model(bert, classified, {}),
    "Llama": Model(llama, continued, {"use_cache": False}),
    "ViT": Model(vit, images, {}),
    "T5": Model(t5, translated, {"use_cache": False}),
}


def made(model: Model, attention: str, training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    # `double`, because rotary embeddings hold float32 buffers whatever the default is.
    module = model.make(attention).double().train(training)
    with torch.no_grad():
        for parameter in module.parameters():  # as they are made they are so small that nothing depends on them
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


class DoublePrecision(TorchFunctionMode):
    """What these models compute in float32 whatever goes in, in float64: else two right answers differ by 1e-7."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


# ---------------------------------------------------------------- meta-gradients

OPTIMIZER = optim.sgd(lr=0.1)
STEPS, TASKS = 2, 3


def meta_gradients(module: nn.Module, batches: Inputs, options: dict[str, Any], backend: Backend = "vmap") -> None:
    """Of the losses after an inner loop: one task at a time, all at once, and in the functional style."""
    apply, params, buffers = stateless(module, params="detach")

    def loss(params: Any, batch: Inputs) -> Tensor:
        return apply(params, buffers, **batch, **options)[0].loss

    def adapted_loss(params: Any, batch: Inputs) -> Tensor:
        return loss(adapt(loss, params, batch, optimizer=OPTIMIZER, steps=STEPS).params, batch)

    adapted = adapt_tasks(loss, params, batches, optimizer=OPTIMIZER, steps=STEPS, backend=backend)
    ways = {
        "adapt": sum(adapted_loss(params, batch) for batch in tree_unstack(batches)),
        "adapt_tasks": over_tasks(loss, in_dims=0, backend=backend)(adapted.params, batches).sum(),
    }
    expected = plain_meta_gradient(copy.deepcopy(module), tree_unstack(batches), options)
    for way, value in ways.items():
        close(dict(zip(params, torch.autograd.grad(value, params.values()), strict=True)), expected, way)
    leaves = {name: value.detach() for name, value in params.items()}
    many = over_tasks(adapted_loss, backend=backend)
    close(grad(lambda p: many(p, batches).sum())(leaves), expected, "grad(over_tasks(adapt))")


def plain_meta_gradient(module: nn.Module, batches: list[Inputs], options: dict[str, Any]) -> dict[str, Tensor]:
    """The same by eager autograd, one task and one step after the other."""
    start = dict(module.named_parameters())
    total = torch.zeros(())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no double backward
        for batch in batches:
            params: dict[str, Tensor] = {**start}
            for _ in range(STEPS):
                value = functional_call(module, params, kwargs={**batch, **options}).loss
                grads = torch.autograd.grad(value, params.values(), create_graph=True)
                params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
            total = total + functional_call(module, params, kwargs={**batch, **options}).loss
        return dict(zip(start, torch.autograd.grad(total, start.values()), strict=True))


def close(actual: Any, expected: Any, what: str) -> None:
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, check_stride=False, msg=lambda text: f"{what}: {text}")


# ---------------------------------------------------------------- the tests

WAYS = [(True, "padded"), (False, "padded"), (True, "full"), (False, "no mask")]  # the first finds most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_is_a_pure_function(name: str, attention: str, request: pytest.FixtureRequest) -> None:
    """In training and evaluation, with each kind of mask; without `--conformance`, one way only."""
    model = MODELS[name]
    ways = [way for way in WAYS if model.inputs is not images or way[1] == "padded"]  # an image has no mask
    ways = ways if request.config.getoption("--conformance") else ways[:1]
    cases = [
        Task(
            f"{name}, {training=}, {mask}",
            made(model, attention, training),
            kwargs={**model.inputs(mask), **model.options},
            batches=model.inputs(mask, TASKS),
            options=model.options,
        )
        for training, mask in ways
    ]
    checks = {check: strictly(run) for check, run in CHECKS.items()}
    checks["meta-gradient"] = strictly(lambda case: meta_gradients(case.module, case.batches, case.options))
    conform(request, "transformers", len(MODELS), name, cases, checks)


@dataclasses.dataclass(frozen=True, eq=False)
class Task(Case):
    """A case with the batches and the call's options that meta-gradients need."""

    batches: Inputs = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def strictly(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """In double precision, and it has to apply: these models have every derivative."""

    def run(case: Any) -> None:
        try:
            with DoublePrecision():
                check(case)
        except NotApplicable as reason:
            raise AssertionError(f"not applicable: {reason}") from reason

    return run


@pytest.mark.filterwarnings("ignore:torch.vmap cannot batch:UserWarning")  # the loop is an answer, too
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.inputs is not images])
def test_masks_that_pad_in_some_tasks_only(name: str) -> None:
    """Where nothing is padded the models leave the mask out, which is another path through their code."""
    model = MODELS[name]
    module = made(model, "sdpa")
    with DoublePrecision():
        meta_gradients(module, model.inputs("full in one task", TASKS), model.options, backend="auto")


def test_what_a_model_computes_in_float32_it_computes_in_float32() -> None:
    """`DoublePrecision` is for comparing only: without it, too, tasks are adapted as they are one by one."""
    model = MODELS["Llama"]
    apply, params, buffers = stateless(made(model, "sdpa"))
    batches = model.inputs("padded", TASKS)

    def loss(params: Any, batch: Inputs) -> Tensor:
        return apply(params, buffers, **batch, **model.options)[0].loss

    adapted = adapt_tasks(loss, params, batches, optimizer=OPTIMIZER, steps=STEPS, backend="vmap")
    assert adapted.losses.dtype == torch.float32
    for one, batch in zip(tree_unstack(adapted.params), tree_unstack(batches), strict=True):
        expected = adapt(loss, params, batch, optimizer=OPTIMIZER, steps=STEPS)
        assert_close(one, expected.params, rtol=1e-5, atol=1e-5)
