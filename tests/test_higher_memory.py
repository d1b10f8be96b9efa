"""What inner loops leave behind: no tensor, no graph, no module, no class."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statelessify._graph import nodes
from statelessify.compat import higher

pytestmark = [
    pytest.mark.usefixtures("float64", "_only_new_objects"),
    pytest.mark.filterwarnings("ignore::statelessify.compat.higher.DifferenceWarning"),
]
HOOK = pytest.mark.xfail(  # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/hooks.py
    reason="torch's BackwardHook holds the part, whose weights lead through the graph to the hook"
)


class Python(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.last = nn.Linear(4, 1), [torch.randn(4)], None
        self.by_name = {"layer": self.layer}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.by_name["layer"](x * self.scale[0])
        return self.last


def mlp(**hooks: Callable[..., Any]) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    for kind, hook in hooks.items():
        getattr(net[2], f"register_{kind}_hook")(hook)
    return net


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convolution": lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 1)),
    "lstm": lambda: nn.LSTM(4, 3),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0),
    "hooks": lambda: mlp(forward=lambda module, args, out: out.tanh(), forward_pre=lambda module, args: (2 * args[0],)),
    "backward hook": lambda: mlp(full_backward=lambda module, before, after: None),
    "attributes": Python,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.1),
}
EACH = pytest.mark.parametrize("kind", [pytest.param(k, marks=HOOK if k == "backward hook" else ()) for k in KINDS])
X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 1, 4)


class Own(higher.optim.DifferentiableOptimizer):  # a user's, with momentum, which takes no care of the graph
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for group, grads, state in zip(self.param_groups, grouped_grads, self.state, strict=True):
            for index, (p, grad) in enumerate(zip(group["params"], grads, strict=True)):
                before = state[index].get("history", [torch.zeros_like(p)])
                state[index]["history"] = [0.9 * before[-1] + grad + 0.1 * p]
                group["params"][index] = p - 0.1 * state[index]["history"][-1]


@pytest.fixture(scope="module")
def _only_new_objects() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # to look at what the tests before have left takes half a second each time
    yield
    gc.unfreeze()


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live() -> int:
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def alive(references: Iterable[weakref.ref[Any]]) -> list[str]:
    return [type(reference()).__name__ for reference in references if reference() is not None]


def loss(module: nn.Module) -> Tensor:
    out = module(X)
    return ((out[0] if isinstance(out, tuple) else out) - 1).square().mean()


def inner_loop(net: nn.Module, optimizer: str, backward: bool = True, **options: bool) -> Any:
    with higher.innerloop_ctx(net, OPTIMIZERS[optimizer](net.parameters()), **options) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(loss(fmodel))
        if backward:
            loss(fmodel).backward()
    return fmodel, diffopt


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@EACH
def test_inner_loops_leave_no_tensor(kind: str, optimizer: str, no_gc: None) -> None:
    net, saved = KINDS[kind](), []

    def pack(tensor: Tensor) -> Tensor:  # what autograd keeps for backward
        saved.append(weakref.ref(kept := tensor.detach()))
        return kept

    inner_loop(net, optimizer, copy_initial_weights=False)
    before = live()
    for bits in range(16):
        backward, copied, tracked = (bool(bits & 1 << place) for place in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            inner_loop(net, optimizer, backward, copy_initial_weights=copied, track_higher_grads=tracked)
        assert saved or not tracked
    assert (live() - before, alive(saved)) == (0, [])


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "own"])
@pytest.mark.parametrize("kind", ["mlp", "convolution", "attributes"])
def test_test_mode_does_not_grow(kind: str, optimizer: str, no_gc: None) -> None:
    net, options = KINDS[kind](), {"track_higher_grads": False}
    fmodel = higher.monkeypatch(net, copy_initial_weights=False, **options)
    make: Any = Own if optimizer == "own" else higher.get_diff_optim
    opt = OPTIMIZERS["sgd" if optimizer == "own" else optimizer](net.parameters())
    diffopt, seen = make(opt, net.parameters(), fmodel=fmodel, **options), set[tuple[int, int]]()
    for step in range(40):
        diffopt.step(loss(fmodel))
        if step in (1, 2, 10, 39):
            seen.add((live(), len(list(nodes([loss(fmodel)])))))
    state = higher.utils.flatten([list(own.values()) for own in diffopt.state])
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in state)
    assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
    assert len(seen) == 1, seen


@EACH
def test_patched_module_and_optimizer_go_at_once(kind: str, no_gc: None) -> None:
    net = KINDS[kind]()
    fmodel, diffopt = inner_loop(net, "adam")
    roots = [fmodel, copy.deepcopy(fmodel), higher.patch.make_functional(net)]
    references = [weakref.ref(item) for root in roots for item in (*root.modules(), *root.buffers())]
    references += map(weakref.ref, [*fmodel.parameters(), diffopt])
    assert len(alive(references)) == len(references)
    del fmodel, diffopt, roots
    assert alive(references) == []


def test_a_part_outlives_its_root(no_gc: None) -> None:
    net, x = mlp(), torch.randn(2, 4)
    fmodel, diffopt = inner_loop(net, "sgd", copy_initial_weights=False)
    part, root, (weight, bias, *_) = fmodel[0], weakref.ref(fmodel), fmodel.fast_params
    del fmodel, diffopt
    assert (root(), part.root, part.direct_submodule_call) == (None, None, True)
    assert torch.equal(part(x), nn.functional.linear(x, weight, bias))
    assert torch.equal(torch.autograd.grad(part(x).sum(), bias)[0], torch.full((3,), 2.0))
    assert torch.allclose(part(x, params=[torch.ones(3, 4), bias]), x.sum(-1, keepdim=True) + bias)
    part.weight = torch.zeros(3, 4)
    assert torch.equal(part(x), bias.expand(2, 3))
    assert torch.equal(copy.deepcopy(part)(x), torch.vmap(part)(x))


@pytest.mark.parametrize("kind", [*KINDS, "a hook leads to it"])
def test_the_module_is_freed(kind: str) -> None:
    net = KINDS.get(kind, mlp)()
    if kind not in KINDS:
        net[2].register_forward_hook(lambda *args, net=net: None)
    inner_loop(net, "sgd")
    references = list(map(weakref.ref, [*net.modules(), *net.parameters(), *net.buffers()]))
    del net
    gc.collect()
    assert alive(references) == []


def test_what_a_module_no_longer_holds_is_freed(no_gc: None) -> None:
    net = KINDS["convolution"]()
    inner_loop(net, "sgd")
    references = list(map(weakref.ref, [net[0].weight, net[1].running_mean, net[3]]))
    net[0].weight, net[1].running_mean, net[3] = nn.Parameter(torch.zeros(2, 1, 3)), torch.zeros(2), nn.Linear(4, 1)
    assert alive(references) == []


def test_classes_are_made_once() -> None:
    class Layer(nn.Linear): ...

    for _ in range(200):
        higher.monkeypatch(nn.Sequential(Layer(1, 1), nn.Sequential(Layer(1, 1))))
        higher.monkeypatch(Layer(1, 1))
    assert sorted(made.__name__ for made in Layer.__subclasses__()) == ["FunctionalLayer", "InnerFunctionalLayer"]
