"""`check_over_tasks`: quiet about functions of many tasks that are right, and what it says of those that are wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad

from statelessify import adapt, adapt_tasks, errors, optim, over_tasks, stateless
from statelessify.testing import check_over_tasks
from statelessify.testing.checks import _over_tasks

# Quiet -------------------------------------------------------------------------------------------------------------


def problem(tasks: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any]:
    """A shared tree of parameters, and for each task inputs and targets."""
    generator = torch.Generator().manual_seed(tasks)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return {"w": draw(3), "b": draw(())}, draw(tasks, 5, 3), draw(tasks, 5)


def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return (x @ params["w"] + params["b"] - y).square().mean()


def adapted(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """A step by hand, and the loss after it."""
    grads = grad(loss)(params, x, y)
    return loss({name: params[name] - 0.1 * grads[name] for name in params}, x, y)


@settings(max_examples=20)
@given(st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([loss, adapted]))
def test_right_functions(tasks: int, dtype: torch.dtype, fn: Callable[..., Any]) -> None:
    arguments = problem(tasks, dtype)
    check_over_tasks(fn, *arguments)
    check_over_tasks(fn, *arguments, mapped=torch.vmap(fn, (None, 0, 0)))


def test_tasks_in_any_dimension_and_keyword_arguments() -> None:
    x, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def fn(x: Any, y: Tensor, *, scale: Tensor) -> Any:
        return {"sum": (x["a"] * y[:, None] * scale).sum(0), "name": "loss", "count": torch.tensor(3)}

    check_over_tasks(fn, {"a": x}, y, in_dims=({"a": -1}, 0), kwargs={"scale": torch.tensor(2.0).double()})
    check_over_tasks(lambda x, y: x.mT @ y, x, y, in_dims=[2, 0])


def test_statistics_of_a_batch_norm() -> None:
    apply, params, buffers = stateless(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double())
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    check_over_tasks(apply, params, buffers, x, in_dims=(None, None, 0))


def test_adapt_tasks_is_adapt_in_a_loop() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    apply, params, buffers = stateless(model, params="detach")

    def inner(params: Any, batch: Any) -> Tensor:
        return F.mse_loss(apply(params, buffers, batch[0])[0][:, 0], batch[1])

    def one(params: Any, support: Any, query: Any) -> Any:
        return inner(adapt(inner, params, support, optimizer=optim.adam(0.1), steps=2).params, query)

    def many(params: Any, support: Any, query: Any) -> Any:
        found = adapt_tasks(inner, params, support, optimizer=optim.adam(0.1), steps=2)
        return over_tasks(inner, in_dims=0)(found.params, query)

    _, x, y = problem(3)
    check_over_tasks(one, params, (x, y), (x + 1, y), mapped=many)


def test_a_loop_of_functions_that_torch_cannot_batch() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return w * x if x.sum() > 0 else w - x

    x = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])
    check_over_tasks(fn, torch.ones(2), x, backends=("loop",))
    with pytest.raises(errors.VmapError, match="cannot batch `fn`"):
        check_over_tasks(fn, torch.ones(2), x)


def test_what_cannot_be_differentiated_is_compared() -> None:
    check_over_tasks(lambda x: x.argmax(), torch.randn(3, 4), in_dims=0)
    check_over_tasks(lambda p, x: p.detach() * x, torch.ones(2), torch.randn(3, 2))


def noisy(p: Tensor, x: Tensor) -> Tensor:
    return F.dropout(x * p, 0.5)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers(randomness: Any) -> None:
    for width in (1, 3):  # masks of one unit are often equal
        x = torch.randn(3, width)
        check_over_tasks(noisy, torch.ones(width), x, randomness=randomness)
        mapped = torch.vmap(noisy, (None, 0), randomness=randomness)
        check_over_tasks(noisy, torch.ones(width), x, mapped=mapped, randomness=randomness)


def test_draws_that_do_not_matter() -> None:
    check_over_tasks(lambda p, x: (torch.rand(()), x * p)[1], torch.ones(2), torch.randn(3, 2))


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize("zeros", [[0, 1, 2], [0], [2]])
def test_draws_that_do_not_matter_to_zeros(zeros: list[int], randomness: Any) -> None:
    """All masks make zeros of zeros, and other gradients."""
    x = torch.randn(3, 4)
    x[zeros] = 0.0
    check_over_tasks(noisy, torch.ones(4), x, randomness=randomness)


def test_shared_draws_are_seen_where_one_task_is_zero() -> None:
    x = torch.randn(3, 4)
    x[0] = 0.0
    shared = torch.vmap(noisy, (None, 0), randomness="same")
    with pytest.raises(AssertionError, match="draw the same numbers"):
        check_over_tasks(noisy, torch.ones(4), x, mapped=shared)


# Found -------------------------------------------------------------------------------------------------------------


def chunked(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """Two tasks at once, without the rest."""
    parts = [slice(i, i + 2) for i in range(0, len(x) - 1, 2)]
    return torch.cat([torch.vmap(loss, (None, 0, 0))(params, x[part], y[part]) for part in parts])


def chunked_with_zeros(params: Any, x: Tensor, y: Tensor) -> Tensor:
    found = chunked(params, x, y)
    return torch.cat([found, found.new_zeros(len(x) - len(found))])


def averaged(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.vmap(loss, (None, 0, 0))(params, x, y).mean()


def averaged_and_expanded(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return averaged(params, x, y).expand(len(x))


def mean_of_the_gradient(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """The value is right; the shared parameters get the mean of the tasks' gradients."""
    cut = {name: p / len(x) + p.detach() * (1 - 1 / len(x)) for name, p in params.items()}
    return torch.vmap(loss, (None, 0, 0))(cut, x, y)


def gradient_of_one_task(params: Any, x: Tensor, y: Tensor) -> Tensor:
    constant = {name: p.detach() for name, p in params.items()}
    rest = torch.vmap(loss, (None, 0, 0))(constant, x[1:], y[1:])
    return torch.cat([loss(params, x[0], y[0])[None], rest])


def data_detached(params: Any, x: Tensor, y: Tensor) -> Tensor:
    kept = torch.cat([x[:2], x[2:3].detach(), x[3:]])
    return torch.vmap(loss, (None, 0, 0))(params, kept, y)


def clipped_together(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """A step whose gradients are clipped by their norm over all tasks."""
    grads = torch.vmap(grad(loss), (None, 0, 0))(params, x, y)
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    fast = {name: params[name] - 0.1 * g * (1 / norm).clamp(max=1) for name, g in grads.items()}
    return torch.vmap(loss)(fast, x, y)


def clipped(params: Any, x: Tensor, y: Tensor) -> Tensor:
    grads = grad(loss)(params, x, y)
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    return loss({name: params[name] - 0.1 * g * (1 / norm).clamp(max=1) for name, g in grads.items()}, x, y)


def writing(params: Any, x: Tensor, y: Tensor) -> Tensor:
    x.sub_(x[3].mean())
    return torch.vmap(loss, (None, 0, 0))(params, x, y)


def writing_into_a_task(params: Any, x: Tensor, y: Tensor) -> Tensor:
    found = torch.vmap(loss, (None, 0, 0))(params, x, y)
    with torch.no_grad():
        x[2, 1, 0] = 7
    return found


def reversed_tasks(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.vmap(loss, (None, 0, 0))(params, x, y).flip(0)


def one_for_all(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.vmap(loss, (None, 0, None))(params, x, y[0])


def of_fixed_data(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """The results are right as long as the data are those that it remembers."""
    fixed = problem()[1:]
    extra = torch.vmap(loss, (None, 0, 0))(params, x, y) - torch.vmap(loss, (None, 0, 0))(
        params, x.detach(), y.detach()
    )
    return torch.vmap(loss, (None, 0, 0))(params, *fixed) + extra


def not_recorded(params: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.vmap(loss, (None, 0, 0))(params, x, y)


def leaking_if_large(params: Any, x: Tensor, y: Tensor) -> Tensor:
    """Task 0 takes part in the others only with other data than were given."""
    found = torch.vmap(loss, (None, 0, 0))(params, x, y)
    return found + (x[0, 0, 0] - problem()[1][0, 0, 0]).square()


def popping(params: Any, x: Tensor, y: Tensor) -> Tensor:
    found = torch.vmap(loss, (None, 0, 0))(dict(params), x, y)
    params.pop("b")
    return found


FOUND: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "last chunk": (loss, chunked, r"shape \(4,\), the loop \(5,\)\n.*5 tasks and 4 results: task 4 has none"),
    "last chunk, zeros": (loss, chunked_with_zeros, r"in its results:\n  task 4: .*worst at \[4\]: `mapped` 0.0"),
    "mean": (loss, averaged, r"has shape \(\), the loop \(5,\)\n  the task dimension is missing"),
    "expanded mean": (loss, averaged_and_expanded, r"tasks 0, 1, 2, 3, 4 of 5 differ\n  task 1 changes when only the"),
    "mean of the gradient": (
        loss,
        mean_of_the_gradient,
        r"gradients by shared arguments.*leaf `args.0.b`: .*it is the mean over the tasks in place of the sum",
    ),
    "gradient of one task": (loss, gradient_of_one_task, r"by shared arguments, which are sums.*`args.0.b`"),
    "data without gradient": (loss, data_detached, r"by mapped arguments:\n  task 2: leaf `args.1`: .*at \[2, "),
    "clipped together": (clipped, clipped_together, r"task \d changes when only the data of task 0 do"),
    "writing": (
        loss,
        writing,
        r"`mapped` wrote into its arguments:\n  task \d: leaf `args.1`: .*tasks 0, 1, 2, 3, 4 of",
    ),
    "writing into a task": (loss, writing_into_a_task, r"wrote into.*task 2: leaf `args.1`: .*\[2, 1, 0\]: after 7.0"),
    "order": (loss, reversed_tasks, r"tasks 0, 1, 3, 4 of 5 differ"),
    "one for all": (loss, one_for_all, r"tasks 1, 2, 3, 4 of 5 differ"),
    "remembered data": (loss, of_fixed_data, r"in its results, with the tasks in reverse order:\n  task"),
    "no graph": (loss, not_recorded, r"gradients by mapped arguments"),
    "containers": (loss, popping, r"`mapped` put other tensors into the containers"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_mistake_is_found(name: str) -> None:
    fn, mapped, words = FOUND[name]
    arguments = problem(4 if name == "remembered data" else 5)
    with pytest.raises(AssertionError, match=re.compile(words, re.DOTALL)) as caught:
        check_over_tasks(fn, *arguments, mapped=mapped)
    last = str(caught.value).splitlines()[-1]
    assert last.startswith(f"  to reproduce: check_over_tasks({fn.__name__}, {{'w': torch.tensor([")
    assert last.endswith(f"mapped={mapped.__name__})")


def test_swapped_dimensions() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="its tasks lie in dimension 1, and should lie in dimension 0"):
        check_over_tasks(lambda w, x: x * w, torch.ones(3).double(), x, mapped=lambda w, x: (x * w).mT)
    with pytest.raises(AssertionError, match=r"task \d: 9 of 9|task \d: \d of 9 entries differ"):
        check_over_tasks(lambda w, x: x * w, torch.ones(3).double(), x, mapped=torch.vmap(torch.mul, (None, 1)))
    wide = torch.randn(3, 4)
    with pytest.raises(AssertionError, match=r"shape \(4, 3\), the loop \(3, 4\)\n  its tasks lie in dimension 1"):
        check_over_tasks(lambda w, x: x * w, torch.ones(4), wide, mapped=lambda w, x: (x * w).mT)


def test_statistics_that_leak_between_tasks() -> None:
    norm = nn.BatchNorm1d(3).double()
    params, buffers = dict(norm.named_parameters()), dict(norm.named_buffers())

    def one(params: Any, x: Tensor) -> Tensor:
        return functional_call(norm, (params, {k: v.clone() for k, v in buffers.items()}), x)

    def together(params: Any, x: Tensor) -> Tensor:
        return one(params, x.flatten(0, 1)).unflatten(0, x.shape[:2])

    with pytest.raises(
        AssertionError, match=r"task \d: (?s:.*)task 1 changes when only the data of task 0 do"
    ) as caught:
        check_over_tasks(one, params, problem(3)[1], mapped=together)
    assert "tasks 0, 1, 2 of 3 differ" in str(caught.value)


def test_a_function_that_writes_into_its_input() -> None:
    def centred(w: Tensor, x: Tensor) -> Tensor:
        return (x.sub_(x.mean()) * w).sum()

    words = r"`fn` wrote into its arguments:\n  task \d: leaf `args.1`: \d+ of 6 entries"
    with pytest.raises(AssertionError, match=words):
        check_over_tasks(centred, torch.ones(2), torch.tensor([[1.0, 2], [3, 5], [8, 1]]))


def test_a_leak_that_the_data_as_given_do_not_show() -> None:
    def leaking(params: Any, x: Tensor, y: Tensor) -> Tensor:
        found = torch.vmap(loss, (None, 0, 0))(params, x, y)
        first = (x[0] - problem()[1][0]).square().sum()
        last = (x[3] - problem()[1][3]).square().sum()
        return found + first * last * (1 - torch.eye(4)[0])  # zero unless both have changed, which they do in reverse

    with pytest.raises(AssertionError, match="in reverse order"):
        check_over_tasks(loss, *problem(), mapped=leaking)


@pytest.mark.parametrize("tasks", [4, 5])
def test_chunks_of_the_library(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk is wrong if it is not full: of four tasks one is left out to see it."""

    def broken(fn: Any, *, chunk_size: int | None, **options: Any) -> Any:
        def many(*args: Any) -> Tensor:
            found = over_tasks(fn, chunk_size=chunk_size, **options)(*args)
            full = len(found) - len(found) % (chunk_size or 1)
            return torch.cat([found[:full], found[full:] * 2])

        return many

    monkeypatch.setattr(_over_tasks, "over_tasks", broken)
    words = r'`over_tasks\(fn, backend="vmap", chunk_size=2\)` differs .*without the last task:\n  task 2'
    with pytest.raises(AssertionError, match=words if tasks == 4 else r"chunk_size=2\)` differs .*:\n  task 4: "):
        check_over_tasks(loss, *problem(tasks))


def test_random_numbers_that_are_alike() -> None:
    p, x = torch.ones(3), torch.randn(4, 3)
    alike, unlike = (torch.vmap(noisy, (None, 0), randomness=kind) for kind in ("same", "different"))
    with pytest.raises(AssertionError, match='tasks 0 and 1 of `mapped` draw the same numbers, not `"different"` ones'):
        check_over_tasks(noisy, p, x, mapped=alike)
    with pytest.raises(AssertionError, match=r'tasks \d and \d of `mapped` draw different numbers, not the `"same"`'):
        check_over_tasks(noisy, p, x, mapped=unlike, randomness="same")
    with pytest.raises(AssertionError, match='draws random numbers, which `randomness="error"` forbids'):
        check_over_tasks(noisy, p, x, randomness="error")
    with pytest.raises(
        AssertionError, match=r"lets tasks influence each other:\n  task \d changes when only the data of"
    ):
        check_over_tasks(noisy, p, x, mapped=lambda p, x: unlike(p, x + x.mean()))
    with pytest.raises(AssertionError, match=r"has shape \(3,\), the loop \(4, 3\)"):
        check_over_tasks(noisy, p, x, mapped=lambda p, x: unlike(p, x).mean(0))


def test_a_function_that_remembers() -> None:
    calls: list[int] = []

    def counting(w: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return w * x * len(calls)

    with pytest.raises(AssertionError, match="`fn` gives other numbers when it is called again"):
        check_over_tasks(counting, torch.ones(2), torch.ones(3, 2))


@dataclasses.dataclass
class Pair:
    """No container to torch's vmap."""

    value: Tensor


# Misuse ------------------------------------------------------------------------------------------------------------


def test_misuse() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(errors.TaskError, match=r"does not fit the 2 arguments; write one entry for each"):
        check_over_tasks(torch.add, x, x, in_dims=(0,))
    with pytest.raises(errors.TaskError, match=r"dimension 2 of `args.0`, whose shape is \(3, 2\)"):
        check_over_tasks(torch.neg, x, in_dims=2)
    with pytest.raises(
        errors.TaskError, match=r"one number of tasks, at least one, and have \{'args.0': 3, 'args.1': 2\}"
    ):
        check_over_tasks(torch.add, x, x, in_dims=(0, 1))
    with pytest.raises(errors.TaskError, match="have no task dimension"):
        check_over_tasks(torch.neg, x)
    with pytest.raises(errors.TaskError, match="`backend='vamp'` is not one of"):
        check_over_tasks(torch.neg, x, in_dims=0, backends=("vamp",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(errors.TreeError, match=r"result `` has shape \(2,\) in task 1, and \(1,\) in task 0"):
        check_over_tasks(lambda x: x[x > 0], torch.tensor([[1.0, -1], [1, 1]]), in_dims=0)
    with pytest.raises(errors.TreeError, match="is no tensor, and True in task 1, False in task 0"):
        check_over_tasks(lambda x: bool(x > 0), torch.tensor([-1.0, 1]), in_dims=0)
    with pytest.raises(errors.TreeError, match=r"is no tensor, and Pair\(value=tensor"):
        check_over_tasks(Pair, torch.arange(3.0), in_dims=0)
    with pytest.raises(errors.TreeError, match="task 1 returned another structure than task 0"):
        check_over_tasks(lambda x: {"a": x} if x > 0 else {"b": x}, torch.tensor([-1.0, 1]), in_dims=0)
