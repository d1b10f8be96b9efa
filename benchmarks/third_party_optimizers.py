"""Which third-party optimizers does `optim.from_torch` take? All that pytorch_optimizer has, with their defaults.

- class, live: five steps under `torch.no_grad()` of the pure optimizer, made from the class or from a live optimizer,
  give the numbers of the real, stateful one. `-`: the real one does not run here, or not without more than parameters.
- derivative: one of a loss after three steps, along a random direction of initial parameters and data together, agrees
  with a central difference in float64; or it is refused, and the reason names the operation that cuts the graph.

`WRONG` is a bug of ours: numbers that differ, or that are not the derivative, without an error. `error` is one that the
optimizer or torch raises, where a named one of ours should stand.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _report import Row, parser, report
from pytorch_optimizer import get_supported_optimizers, load_optimizer
from torch import Tensor, nn
from tqdm import tqdm

from statelessify import adapt, optim, stateless
from statelessify.errors import StatelessifyError

STEPS, STEPS_OF_DERIVATIVE = 5, 3
DIFFERENCE, TOLERANCE = 1e-6, 1e-4
LONGEST = 110
SOME = ("adabelief", "lamb", "lion", "sophiah")  # for `--check`
Kind = type[torch.optim.Optimizer]


class Found(NamedTuple):
    optimizer: str
    from_class: str = "-"
    from_live: str = "-"
    derivative: str = "-"
    reason: str = ""


class Problem:
    """A network with matrices and vectors, data, and a live optimizer of the network's parameters."""

    def __init__(self, kind: Kind) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.batch = torch.randn(8, 3), torch.randn(8, 2)
        self.kind = kind
        taken = inspect.signature(kind).parameters
        known: dict[str, Any] = {"num_data": 8, "num_iterations": 100}
        self.options = {name: value for name, value in known.items() if name in taken}
        matrices = [p for p in self.net.parameters() if p.ndim == 2]
        vectors = [p for p in self.net.parameters() if p.ndim == 1]
        self.needs_more = True
        if "model" in taken:
            first: Any = self.net
        elif "optimizer" in taken:
            first = torch.optim.SGD(self.net.parameters(), lr=0.1)
        elif any(base.__name__ == "MuonBase" for base in kind.__mro__):
            first = [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}]
        elif kind.__name__ == "SpectralSphere":
            first = matrices
        else:
            first, self.needs_more = self.net.parameters(), False
        self.live = kind(first, **self.options)
        self.apply, self.params, self.buffers = stateless(self.net, params="detach")

    def loss(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self.apply(params, self.buffers, batch[0])[0], batch[1])

    def pure(self, live: bool) -> optim.Optimizer:
        if live:
            return optim.from_torch(self.live, module=self.net)
        return optim.from_torch(self.kind, **self.options)

    def stateful(self) -> dict[str, Tensor]:
        """What the real optimizer makes of the network."""
        torch.manual_seed(1)
        for _ in range(STEPS):
            self.live.zero_grad()
            F.mse_loss(self.net(self.batch[0]), self.batch[1]).backward()
            self.live.step()
        return {name: value.detach() for name, value in self.net.named_parameters()}

    def adapted(self, params: Any, batch: Any, *, steps: int, live: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return adapt(self.loss, params, batch, optimizer=self.pure(live), steps=steps).params


def reason_of(error: Exception) -> str:
    """One short line; of an operation that cuts the graph its name and place alone."""
    cut = re.search(r"cuts the graph \((.*?)\)", str(error))
    words = f"{type(error).__name__}: {cut[1] if cut else str(error)}".replace("|", "/").split("\n")[0]
    return words if len(words) <= LONGEST else words[: LONGEST - 3] + "..."


def values_of(kind: Kind, expected: dict[str, Tensor], live: bool) -> tuple[str, str]:
    """Whether the numbers are those of the real optimizer, and why not."""
    try:
        problem = Problem(kind)
        with torch.no_grad():
            found = problem.adapted(problem.params, problem.batch, steps=STEPS, live=live)
    except StatelessifyError as error:
        return "refused", reason_of(error)
    except Exception as error:  # theirs, or torch's
        return "error", reason_of(error)
    far = max((found[name] - expected[name]).abs().max().item() for name in found)
    return ("same", "") if far <= 1e-12 else ("WRONG", f"values are off by {far:.1e}")


def derivative_of(kind: Kind, live: bool) -> tuple[str, str]:
    problem = Problem(kind)
    leaves = {**problem.params, "x": problem.batch[0], "y": problem.batch[1]}
    direction = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}

    def after(values: dict[str, Tensor]) -> Tensor:
        params, batch = {name: values[name] for name in problem.params}, (values["x"], values["y"])
        return problem.loss(problem.adapted(params, batch, steps=STEPS_OF_DERIVATIVE, live=live), batch)

    def moved(by: float) -> Tensor:
        return after({name: leaf.detach() + by * direction[name] for name, leaf in leaves.items()})

    inputs = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    try:
        gradients = torch.autograd.grad(after(inputs), list(inputs.values()), allow_unused=True, materialize_grads=True)
    except StatelessifyError as error:
        return "refused", reason_of(error)
    except Exception as error:
        return "error", reason_of(error)
    slope = torch.stack([(g * direction[name]).sum() for g, name in zip(gradients, inputs, strict=True)]).sum().item()
    with torch.no_grad():
        expected = ((moved(DIFFERENCE) - moved(-DIFFERENCE)) / (2 * DIFFERENCE)).item()
    if abs(slope - expected) <= TOLERANCE * max(abs(expected), 1e-3):
        return "works", ""
    return "WRONG", f"the derivative is {slope:.6g}, the difference quotient {expected:.6g}"


def tried(name: str) -> Found:
    kind = load_optimizer(name)
    try:
        problem = Problem(kind)
        expected = problem.stateful()
    except Exception as error:
        return _not_running(name, kind, error)
    made, why = ("-", "") if problem.needs_more else values_of(kind, expected, live=False)
    live, why_live = values_of(kind, expected, live=True)
    derivative, lost = derivative_of(kind, live=True) if live in ("same", "WRONG") else ("-", "")
    reasons = dict.fromkeys(reason for reason in (why, why_live, lost) if reason)
    return Found(name, made, live, derivative, "; ".join(reasons))


def _not_running(name: str, kind: Kind, error: Exception) -> Found:
    """Of one that does not even run itself: whether that is refused beforehand."""
    try:
        Problem(kind).pure(live=True)
    except StatelessifyError as refused:
        return Found(name, "refused", "refused", "refused", reason_of(refused))
    except Exception:  # whatever it is, it is the first error that says why
        pass
    return Found(name, reason=f"itself {reason_of(error)}")


def table_of(rows: list[Found]) -> str:
    lines = ["| optimizer | class | live | derivative | reason |", "|---" * 5 + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def counts_of(rows: list[Found]) -> str:
    lines = [f"Of {len(rows)} optimizers:", ""]
    for field in ("from_class", "from_live", "derivative"):
        counts = Counter(getattr(row, field) for row in rows)
        lines.append(f"- {field.replace('_', ' ')}: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", help="names of optimizers")
    args = options.parse_args()
    names = args.only or (SOME if args.check else get_supported_optimizers())
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)

    rows: list[Found] = []
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        rows.append(tried(name))
    bad = {what: sum(what in (r.from_class, r.from_live, r.derivative) for r in rows) for what in ("WRONG", "error")}
    if args.check:
        if any(bad.values()):
            raise AssertionError(f"of {names}: {bad}")
        return
    print(table_of(rows))
    report(
        __file__,
        "Which third-party optimizers are taken?",
        [
            Row("optimizers with a wrong number", bad["WRONG"], most=0),
            Row("optimizers with an error that is not a named one of ours", bad["error"], most=0),
        ],
        out=args.out,
        details=counts_of(rows),
    )


if __name__ == "__main__":
    main()
