"""`compiled`: the numbers of the plain loss, one compilation, and a named error for what compiled code cannot be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import assert_close, fresh, gradients, mlp, norm_problem, recurrent, regression, regression_batch
from torch import Tensor, nn

from statelessify import FirstOrder, Unroll, adapt, adapt_tasks, compiled, optim, over_tasks, stateless
from statelessify.errors import CompileError, DerivativeError, LossError, MutationError, RandomnessError

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:`FirstOrder")]

TASKS = 3


class Counted:
    """A backend that runs what it is given, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


def quick(loss: Callable[..., Any]) -> Any:
    return compiled(loss, backend="eager")


def tasks_once(loss: Any, params: Any, batches: Any, **options: Any) -> tuple[Any, Tensor]:
    options = {"optimizer": optim.sgd(lr=0.1), "steps": 3} | options
    adapted = adapt_tasks(loss, params, batches, **options)
    queries = tuple(value.flip(1) for value in batches)
    return adapted, over_tasks(loss, in_dims=0)(adapted.params, queries).mean() + adapted.losses.sum()


# The numbers -------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda lr: optim.sgd(lr=lr),
    "momentum, globs": lambda lr: optim.sgd(lr={"first.*": lr, "last.*": 0.1}, momentum=0.9),
    "adam": lambda lr: optim.adam(lr=lr),
    "schedule": lambda lr: optim.sgd(lr=lambda step: lr * 0.5**step),
    "per task": lambda lr: optim.sgd(lr=optim.per_task(lr * torch.arange(1.0, 1.0 + TASKS))),
    "own": lambda lr: optim.Optimizer(
        lambda p: lr, lambda p, g, s: ({name: p[name] - s * g[name].tanh() for name in p}, s * 0.9)
    ),
}


@pytest.mark.parametrize("gradient", [Unroll(), FirstOrder()], ids=["unroll", "first order"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tasks_have_the_numbers_of_the_plain_loss(name: str, gradient: Any) -> None:
    """Values, states, and the gradient of parameters, rate, batch and a tensor that the loss closes over."""
    params, batches, scale = fresh(mlp()), regression_batch(TASKS), torch.tensor(1.3, requires_grad=True)
    batches = tuple(value.requires_grad_() for value in batches)
    lr = torch.tensor(0.1, requires_grad=True)
    leaves = {**params, "lr": lr, "scale": scale, "x": batches[0]}

    def loss(params: Any, batch: Any) -> Tensor:
        return scale * regression(params, batch)

    found, expected = (
        tasks_once(each, params, batches, optimizer=OPTIMIZERS[name](lr), gradient=gradient)
        for each in (quick(loss), loss)
    )
    for ours, theirs in ((found[0].params, expected[0].params), (found[0].losses, expected[0].losses)):
        assert_close(ours, theirs)
    if name not in ("own", "schedule"):
        assert_close(found[0].opt_state.slots, expected[0].opt_state.slots)
        assert_close(found[0].opt_state.step, expected[0].opt_state.step)
    assert_close(gradients(found[1], leaves), gradients(expected[1], leaves))


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adam"]], ids=["sgd", "adam"])
def test_one_task_has_the_numbers_of_the_plain_loss(make: Any) -> None:
    params = {"w": torch.randn(3, requires_grad=True)}
    batch, hidden = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    lr = torch.tensor(0.1, requires_grad=True)
    leaves = {**params, "batch": batch, "hidden": hidden, "lr": lr}

    def run(loss: Any) -> Any:
        half = optim.Optimizer(*make(lr)[:2])
        adapted = adapt(
            loss,
            params,
            batch,
            optimizer=half,
            steps=3,
            carry=hidden,
            grad_transform=lambda grads: {name: 0.5 * grad for name, grad in grads.items()},
        )
        return adapted, gradients(adapted.losses.sum() + adapted.carry.sum() + adapted.params["w"].prod(), leaves)

    ours, theirs = run(quick(recurrent)), run(recurrent)
    assert_close(ours[0].params, theirs[0].params)
    assert_close(ours[0].carry, theirs[0].carry)
    assert_close(ours[1], theirs[1])


def test_a_later_step_may_be_compiled_for_itself() -> None:
    """The carry has no graph at the first step, and one at the second, whose inputs depend on each other."""
    params, lr = {"w": torch.randn(3, requires_grad=True)}, torch.tensor(0.1, requires_grad=True)

    def run(loss: Any) -> Any:
        adapted = adapt(loss, params, torch.ones(3), optimizer=optim.sgd(lr=lr), steps=3, carry=torch.ones(3))
        return gradients(adapted.losses.sum() + adapted.carry.sum(), {**params, "lr": lr})

    assert_close(run(quick(recurrent)), run(recurrent))


@pytest.mark.parametrize("norm", ["layer", "batch, running", "instance, running", "F.batch_norm"])
def test_norms_with_running_statistics(norm: str) -> None:
    problem = norm_problem(norm, TASKS)
    params = fresh(problem.params)

    def run(loss: Any) -> Any:
        adapted = adapt_tasks(
            loss, params, problem.batches, carry=problem.buffers, optimizer=optim.sgd(lr=0.05), steps=2
        )
        values, _ = over_tasks(loss, in_dims=0)(adapted.params, adapted.carry, problem.batches)
        return adapted.params, adapted.carry, gradients(values.sum() + adapted.losses.sum(), params)

    assert_close(run(quick(problem.loss)), run(problem.loss))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where inductor is imported
def test_inductor_has_the_numbers_of_the_plain_loss() -> None:
    params, batches = fresh(mlp()), regression_batch(TASKS)
    fast = compiled(regression)

    def meta(loss: Any) -> Any:
        adapted = adapt_tasks(loss, params, batches, optimizer=optim.sgd(lr=0.1), steps=3)
        return adapted.params, gradients(adapted.losses.sum(), params)

    assert_close(meta(fast), meta(regression))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where inductor is imported
def test_inductor_keeps_the_rate_of_a_gradient_that_is_a_product() -> None:
    """Of a sum with a product of matrices it makes one operation, which forgot `alpha`."""
    start, batch = {"w": torch.randn(4, 1), "v": torch.randn(1, 4)}, (torch.randn(10, 1), torch.randn(10, 1))

    def loss(p: Any, batch: Any) -> Tensor:
        return ((torch.relu(batch[0] @ p["w"].T) @ p["v"].T - batch[1]) ** 2).mean()

    def run(loss: Any) -> Any:
        params = fresh(start)
        adapted = adapt(loss, params, batch, optimizer=optim.sgd(lr=0.01), steps=2)
        return adapted.params, gradients(adapted.losses.sum(), params)

    assert_close(run(compiled(loss)), run(loss))


@pytest.mark.parametrize("needs", [True, False])
def test_a_loss_that_reads_the_initial_parameters(needs: bool) -> None:
    """At the first step they are also what it is given; afterwards no longer."""
    params, batch = mlp(), regression_batch()
    params = {name: value.requires_grad_(needs) for name, value in params.items()}
    lr = torch.tensor(0.1, requires_grad=True)

    def loss(now: Any, batch: Any) -> Tensor:
        return regression(now, batch) + sum(((now[n] - params[n]) ** 2).sum() for n in params)

    def run(loss: Any) -> Any:
        adapted = adapt(loss, params, batch, optimizer=optim.sgd(lr=lr), steps=4)
        return adapted.params, torch.autograd.grad(
            regression(adapted.params, batch), [lr, *params.values()][: 1 + 5 * needs]
        )

    assert_close(run(quick(loss)), run(loss))


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"in_dims": (0, 0)}, {"backend": "loop"}], ids=str)
def test_every_way_to_map_tasks(options: Any) -> None:
    params, batches = mlp(), regression_batch(TASKS)
    if "in_dims" in options:
        params = {name: torch.stack([value, -value, 2 * value]) for name, value in params.items()}
    params = fresh(params)
    found, expected = (tasks_once(each, params, batches, **options) for each in (quick(regression), regression))
    assert_close(found[0].params, expected[0].params)
    assert_close(gradients(found[1], params), gradients(expected[1], params))


def test_one_task_among_tasks_and_no_step() -> None:
    params, batches, fast = fresh(mlp()), regression_batch(1), quick(regression)
    assert_close(tasks_once(fast, params, batches)[0].params, tasks_once(regression, params, batches)[0].params)
    assert adapt_tasks(fast, params, batches, optimizer=optim.sgd(), steps=0).losses.shape == (1, 0)


def test_twice_k_steps_are_two_k_steps() -> None:
    params, batches, fast = fresh(mlp()), regression_batch(TASKS), quick(regression)
    optimizer = optim.adam(lr=0.1)
    half = adapt_tasks(fast, params, batches, optimizer=optimizer, steps=2)
    rest = adapt_tasks(fast, half.params, batches, optimizer=optimizer, steps=2, in_dims=0, opt_state=half.opt_state)
    whole = adapt_tasks(regression, params, batches, optimizer=optimizer, steps=4)
    assert_close(rest.params, whole.params)
    assert_close(gradients(rest.losses.sum(), params), gradients(whole.losses[:, 2:].sum(), params))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode: Any) -> None:
    params, batches = fresh(mlp()), regression_batch(TASKS)
    expected, value = tasks_once(regression, params, batches)
    with mode():
        adapted, found = tasks_once(quick(regression), params, batches)
    assert not found.requires_grad
    assert not adapted.losses.requires_grad
    assert_close(adapted.params, {name: p.detach() for name, p in expected.params.items()})
    assert_close(found, value.detach())


def test_inside_a_transform_the_plain_loss_runs() -> None:
    params, batches, backend = mlp(), regression_batch(TASKS), Counted()

    def meta(loss: Any) -> Any:
        return torch.func.grad(lambda p: tasks_once(loss, p, batches)[1])(params)

    assert_close(meta(compiled(regression, backend=backend)), meta(regression))
    assert backend.count == 0


class Attends(nn.Module):
    """Calls the attention of torch by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), x, x)


def _layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 1, 4, batch_first=True).eval()


FUSED: dict[str, Callable[[], nn.Module]] = {
    "attention": Attends,
    "encoder, evaluation": lambda: nn.TransformerEncoder(_layer(), 1, enable_nested_tensor=False).eval(),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of what dynamo runs before the rules are put in
@pytest.mark.parametrize("name", FUSED)
def test_kernels_without_a_second_derivative(name: str) -> None:
    apply, params, buffers = stateless(FUSED[name]())

    def loss(params: Any, batch: Any) -> Tensor:
        return F.mse_loss(apply(params, buffers, batch[0])[0], batch[1])

    batches = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    ours, theirs = (tasks_once(fn, params, batches)[1] for fn in (quick(loss), loss))
    assert_close(gradients(ours, params), gradients(theirs, params))


# What is compiled, and how often ------------------------------------------------------------------------------------


def test_a_hundred_calls_compile_once() -> None:
    """Two graphs for the step and two for the query loss, with everything made anew in each call."""
    params, batches, backend = fresh(mlp()), regression_batch(TASKS), Counted()
    fast = compiled(regression, backend=backend)
    tasks_once(fast, params, batches, optimizer=optim.adam(lr=0.1))
    assert backend.count == 4
    with torch.compiler.set_stance("fail_on_recompile"):
        for steps in [2, 7] * 50:
            tasks_once(fast, params, regression_batch(TASKS), optimizer=optim.adam(lr=0.1), steps=steps)
    assert backend.count == 4


def test_strides_of_dimensions_of_size_one_compile_nothing_again() -> None:
    """A rate that needs a gradient, and a step whose result is strided in another way than its input."""
    net, batches, backend = nn.Linear(1, 3), (torch.randn(TASKS, 4, 1), torch.randn(TASKS, 4, 3)), Counted()
    apply, params, buffers = stateless(net)
    lr = torch.tensor(0.1, requires_grad=True)

    def loss(params: Any, batch: Any) -> Tensor:
        return F.mse_loss(apply(params, buffers, batch[0])[0], batch[1])

    def run(loss: Any) -> Any:
        adapted = adapt_tasks(loss, params, batches, optimizer=optim.sgd(lr=lr), steps=3)
        return gradients(adapted.losses.sum(), {**params, "lr": lr})

    assert_close(run(compiled(loss, backend=backend)), run(loss))
    assert backend.count == 2


def test_what_the_loss_reads_may_change() -> None:
    params, batches, weight = fresh(mlp()), regression_batch(TASKS), 1.0

    def loss(params: Any, batch: Any) -> Tensor:
        return weight * regression(params, batch)

    fast = quick(loss)
    for weight in (1.0, 2.0):  # noqa: B007
        for lr in (0.1, 0.2):
            found, expected = (tasks_once(f, params, batches, optimizer=optim.sgd(lr=lr)) for f in (fast, loss))
            assert_close(found[0].params, expected[0].params)
            assert_close(gradients(found[1], params), gradients(expected[1], params))


def test_batches_that_are_made_in_each_step_may_change_what_the_loss_reads() -> None:
    params, seen, weight = fresh(mlp()), [], 1.0
    draws = [regression_batch(TASKS) for _ in range(3)]

    def batches(step: int, params: Any) -> Any:
        nonlocal weight
        weight = 1.0 + step
        seen.append(step)
        return draws[step]

    def loss(params: Any, batch: Any) -> Tensor:
        return weight * regression(params, batch)

    for run in (adapt_tasks, adapt):
        options: Any = {"optimizer": optim.sgd(lr=0.1), "steps": 3}
        found = run(quick(loss), params, batches, **options)
        assert seen == [0, 1, 2]
        assert_close(found.params, run(loss, params, batches, **options).params)
        seen.clear()
        draws[:] = [regression_batch() for _ in range(3)]


class Late:
    """A user's own mode: nothing is recorded before the last step."""

    def check(self, steps: int) -> None:
        pass

    def run(self, loop: Any, state: Any, steps: int) -> Any:
        losses = []
        for index in range(steps):
            with torch.set_grad_enabled(index == steps - 1):
                state, value = (loop.compiled or loop.step)(state, loop.batch_at(index, state), True)
            losses.append(value)
        return state, losses


def test_recording_may_begin_in_the_loop() -> None:
    params, batches, lr = mlp(), regression_batch(TASKS), torch.tensor(0.1, requires_grad=True)

    def run(loss: Any) -> Any:
        adapted = adapt_tasks(loss, params, batches, optimizer=optim.sgd(lr=lr), steps=3, gradient=Late())
        return gradients(sum(p.square().sum() for p in adapted.params.values()), {"lr": lr})  # pyright: ignore[reportArgumentType]

    assert_close(run(quick(regression)), run(regression))


def test_each_loss_has_its_own_limit() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for scale in (1.0, 2.0):
            fast = quick(lambda params, batch, scale=scale: scale * regression(params, batch))
            adapt(fast, mlp(), regression_batch(), optimizer=optim.sgd(), steps=2)


def test_too_many_recompilations_are_an_error() -> None:
    params, batches, fast = fresh(mlp()), regression_batch(TASKS), quick(regression)
    with torch._dynamo.config.patch(recompile_limit=2):
        for lr in (0.1, 0.2):
            adapt_tasks(fast, params, batches, optimizer=optim.sgd(lr=lr), steps=1)
        with pytest.raises(CompileError, match=r"compiled 2 times.*0-dim tensor"):
            adapt_tasks(fast, params, batches, optimizer=optim.sgd(lr=0.3), steps=1)


def test_what_was_compiled_goes_with_the_loss() -> None:
    fast, alive = _adapted_with_a_scale()
    del fast
    gc.collect()
    assert alive() is None


def _adapted_with_a_scale() -> tuple[Any, weakref.ref[Any]]:
    scale = nn.Linear(1, 1)
    fast = quick(lambda params, batch: scale.weight.sum() * regression(params, batch))
    adapt(fast, fresh(mlp()), regression_batch(), optimizer=optim.sgd(), steps=2).losses.sum().backward()
    return fast, weakref.ref(scale)


def test_the_object_itself() -> None:
    fast = quick(regression)
    params, batch = mlp(), regression_batch()
    assert fast(params, batch) == regression(params, batch)
    assert (fast.fn, compiled(fast).fn, fast.__name__) == (regression, regression, "regression")
    assert repr(fast).startswith("compiled(<function regression")
    adapt(fast, params, batch, optimizer=optim.sgd(), steps=1)
    other = copy.deepcopy(fast)
    assert_close(*(adapt(each, params, batch, optimizer=optim.sgd(), steps=2).params for each in (other, fast)))
    with pytest.raises(CompileError, match="takes a loss, not int"):
        compiled(3)  # pyright: ignore[reportArgumentType]


# What is refused ---------------------------------------------------------------------------------------------------


class Note:
    count = 0


NOTE, NOTES = Note(), list[Any]()


def _attribute(params: Any, batch: Any) -> Tensor:
    NOTE.count += 1
    return regression(params, batch)


def _append(params: Any, batch: Any) -> Tensor:
    NOTES.append(1)
    return regression(params, batch)


def _random(params: Any, batch: Any) -> Tensor:
    return F.dropout(regression(params, batch))


def _noise(params: Any, batch: Any) -> Tensor:
    return regression(params, batch) * torch.rand(())


def _branch(params: Any, batch: Any) -> Tensor:
    value = regression(params, batch)
    return value if value > 0 else -value


def _vector(params: Any, batch: Any) -> Tensor:
    return regression(params, batch).expand(2)


def _in_place(params: Any, batch: Any) -> Tensor:
    return regression(params, (batch[0].add_(1), batch[1]))


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "an attribute": (_attribute, CompileError, "changes an object outside it"),
    "a list": (_append, CompileError, "changes an object outside it"),
    "dropout": (_random, RandomnessError, "draws random numbers"),
    "noise": (_noise, RandomnessError, "draws random numbers"),
    "a branch": (_branch, CompileError, "cannot compile a step of `_branch`"),
    "a vector": (_vector, LossError, "not a scalar"),
}


@pytest.mark.filterwarnings("ignore:torch.vmap cannot batch")
@pytest.mark.parametrize("run", ["adapt", "adapt_tasks"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, run: str) -> None:
    loss, error, words = REFUSED[name]
    call, tasks = (adapt, ()) if run == "adapt" else (adapt_tasks, (TASKS,))
    with pytest.raises(error, match=words):
        call(quick(loss), fresh(mlp()), regression_batch(*tasks), optimizer=optim.sgd(lr=0.1), steps=2)


def test_a_function_that_writes_into_its_argument() -> None:
    params, batches = mlp(), regression_batch(TASKS)
    before = batches[0].clone()
    with pytest.raises(MutationError, match="writes in place"):
        over_tasks(quick(_in_place))(params, batches)
    assert_close(batches[0], before)


def test_a_module_with_dropout() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Linear(3, 1))
    apply, params, buffers = stateless(net)

    def loss(apply: Any) -> Any:
        return lambda params, batch: F.mse_loss(apply(params, buffers, batch[0])[0], batch[1])

    batches, options = regression_batch(TASKS), {"optimizer": optim.sgd(lr=0.1), "steps": 2}
    with pytest.raises(RandomnessError, match="draws random numbers"):
        adapt_tasks(quick(loss(apply)), params, batches, **options)
    off = loss(apply.eval())
    assert_close(*(adapt_tasks(each, params, batches, **options).params for each in (quick(off), off)))


@pytest.mark.parametrize("run", ["adapt", "adapt_tasks", "over_tasks"])
def test_a_second_derivative_of_the_meta_loss(run: str) -> None:
    params, batches = fresh(mlp()), regression_batch(TASKS)
    one, options = tuple(value[0] for value in batches), {"optimizer": optim.sgd(lr=0.1), "steps": 2}
    calls: dict[str, Any] = {
        "adapt": lambda: adapt(quick(regression), params, one, **options).losses.sum(),
        "adapt_tasks": lambda: adapt_tasks(quick(regression), params, batches, **options).losses.sum(),
        "over_tasks": lambda: over_tasks(quick(regression))(params, batches).sum(),
    }
    found = torch.autograd.grad(calls[run](), list(params.values()), create_graph=True)
    with pytest.raises(DerivativeError, match="second one"):
        sum(grad.square().sum() for grad in found).backward()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("wrong", "what"), [(0, "values"), (1, "derivatives")])
def test_a_compiler_that_errs(wrong: int, what: str) -> None:
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        factor = 1.01 if len(made) == wrong else 1.0
        made.append(graph)
        return lambda *args: [value * factor if value.is_floating_point() else value for value in graph(*args)]

    with pytest.raises(CompileError, match=f"has other {what} than the plain one"):
        adapt(compiled(regression, backend=backend), fresh(mlp()), regression_batch(), optimizer=optim.sgd(), steps=1)
