"""Modules that compute in their own way: own derivatives, solvers, flows, kernels, complex numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from zoo_member import Member
from zoo_modules import MLP

# ---------------------------------------------------------------- functions with derivatives of their own


class Reverse(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return -scale * grad_output, None


class OldSquare(torch.autograd.Function):
    """The old style, in which forward has the context: torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad_output


def reverse(x: Tensor) -> Tensor:
    return Reverse.apply(x, torch.full((), 0.7))


def old_square(x: Tensor) -> Tensor:
    return OldSquare.apply(x)


class OwnDerivative(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(3, 3), nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x).sin()))


class Surrogate(nn.Module):
    """Spikes forwards, a smooth slope backwards, over a state that leaks (a spiking network)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.leak = nn.Linear(3, 3), nn.Parameter(torch.tensor(0.5))
        self.register_buffer("potential", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        potential, spikes = self.potential, []
        for row in self.linear(x):
            potential = potential * self.leak.sigmoid() + row
            smooth = (4 * potential - 1).sigmoid()
            spike = ((potential > 0.25).to(x.dtype) - smooth).detach() + smooth
            potential = potential - spike
            spikes.append(spike)
        self.potential = potential.detach()
        return torch.stack(spikes)


# ---------------------------------------------------------------- gradients and solvers in forward


class InnerLoop(nn.Module):
    """Takes a gradient step of its child by `torch.func` in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.rate = MLP(), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        params = dict(self.child.named_parameters())
        loss = lambda own: functional_call(self.child, own, (x,)).square().mean()
        adapted = {name: params[name] - self.rate * slope for name, slope in grad(loss)(params).items()}
        return functional_call(self.child, adapted, (x,))


class Energy(nn.Module):
    """The negative slope of an energy by `torch.autograd.grad` in forward (a force field)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.head(self.body(x).tanh()).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return -slope


class Physics(nn.Module):
    """A network and its derivatives in the inputs, by vmap, grad and jacrev in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def value(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())[0]

    def forward(self, x: Tensor) -> Tensor:
        slope, curvature = vmap(grad(self.value))(x), vmap(jacrev(grad(self.value)))(x)
        return slope.square().sum(-1) + curvature.diagonal(dim1=-2, dim2=-1).sum(-1)


class Equilibrium(nn.Module):
    """A fixed point by a fixed number of steps without a graph, and one step with it."""

    def __init__(self, steps: int | None = 20) -> None:
        super().__init__()
        self.inner, self.outer, self.steps = nn.Linear(3, 3), nn.Linear(3, 3), steps

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return (0.3 * self.inner(z) + self.outer(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(self.steps or 200):
                before, z = z, self.step(z, x)
                if self.steps is None and (z - before).norm() < 1e-12:
                    break
        return self.step(z, x)


class Trajectory(nn.Module):
    """A differential equation by Runge-Kutta steps, of which each calls a method of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.evaluations = 0

    def slope(self, time: float, state: Tensor) -> Tensor:
        self.evaluations += 1
        return self.field(torch.cat([state, torch.full_like(state[..., :1], time)], -1))

    def forward(self, x: Tensor) -> Tensor:
        for step in range(2):
            first = self.slope(step / 2, x)
            x = x + 0.5 * self.slope(step / 2 + 0.25, x + 0.25 * first)
        return x * self.evaluations


# ---------------------------------------------------------------- densities and kernels


class Flow(nn.Module):
    """Affine couplings, a linear map by its LU factors, and the log-determinant of both."""

    def __init__(self) -> None:
        super().__init__()
        self.couple = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4))
        self.lower, self.upper = nn.Parameter(0.3 * torch.randn(4, 4)), nn.Parameter(0.3 * torch.randn(4, 4))
        self.log_diagonal = nn.Parameter(0.1 * torch.randn(4))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("sign", torch.tensor([1.0, -1.0, 1.0, 1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x[:, self.order].chunk(2, -1)
        log_scale, shift = self.couple(left).tanh().chunk(2, -1)
        x = torch.cat([left, right * log_scale.exp() + shift], -1)
        upper = self.upper.triu(1) + (self.sign * self.log_diagonal.exp()).diag()
        return x @ (self.lower.tril(-1) + torch.eye(4)) @ upper, log_scale.sum(-1) + self.log_diagonal.sum()


class GaussianProcess(nn.Module):
    """The posterior mean and variance at the training inputs, which it keeps, under a learned kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.log_length, self.log_noise = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("points", torch.randn(5, 3))
        self.register_buffer("values", torch.randn(5))

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return (-0.5 * ((a[:, None] - b) * (-self.log_length).exp()).square().sum(-1)).exp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gram = self.kernel(self.points, self.points) + self.log_noise.exp() * torch.eye(5)
        factor = torch.linalg.cholesky(gram)
        cross = self.kernel(x, self.points)
        mean = cross @ torch.cholesky_solve(self.values[:, None], factor)
        half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
        return mean[:, 0], 1 - half.square().sum(0)


class Codebook(nn.Module):
    """Vector quantization: nearest code, straight-through gradient, codes that move by running means."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 2), nn.Linear(2, 3)
        self.register_buffer("codes", torch.randn(4, 2))
        self.register_buffer("counts", torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        hot = (torch.cdist(z, self.codes).argmin(-1)[:, None] == torch.arange(4)).to(z.dtype)
        quantized = hot @ self.codes
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                means = hot.T @ z / hot.sum(0).clamp(min=1)[:, None]
                self.codes += 0.1 * hot.sum(0).clamp(max=1)[:, None] * (means - self.codes)
        return self.decode(z + (quantized - z).detach()), (z - quantized.detach()).square().mean()


class Normalizer(nn.Module):
    """Statistics over all inputs seen so far, by Welford's rule, in float64 and an integer count."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("squares", torch.ones(3))
        self.register_buffer("count", torch.tensor(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            seen = self.count + len(x)
            shift = x.detach().mean(0) - self.mean
            self.squares.add_((x.detach() - x.detach().mean(0)).square().sum(0))
            self.squares.add_(shift.square() * self.count * len(x) / seen)
            self.mean.add_(shift * len(x) / seen)
            self.count.copy_(seen)
        return self.policy(((x - self.mean) / (self.squares / self.count).sqrt()).clamp(-3, 3))


class NoisyLinear(nn.Module):
    """Weights with learned noise, drawn into buffers by each training call."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.full((2, 3), 0.1))
        self.register_buffer("noise", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.noise.copy_(torch.randn(2, 1) * torch.randn(3))
        return F.linear(x, self.mean + self.scale * self.noise)


# ---------------------------------------------------------------- complex numbers, encodings


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        out = (x.to(self.weight.dtype) @ self.weight) * self.phase
        self.phase = self.phase * 1j
        return out.abs()


class StateSpace(nn.Module):
    """A diagonal state-space layer: complex poles, its kernel by powers, its convolution by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay, self.frequency = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.rand(3, 2))
        self.readout = nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        pole = torch.complex(-self.log_decay.exp(), self.frequency * math.pi)
        powers = (pole[..., None] * torch.arange(len(x))).exp()
        kernel = (torch.view_as_complex(self.readout)[..., None] * powers).sum(1)
        spectrum = torch.fft.rfft(x.T, n=2 * len(x)) * torch.fft.rfft(kernel.real, n=2 * len(x))
        return torch.fft.irfft(spectrum, n=2 * len(x))[:, : len(x)].T


class Rays(nn.Module):
    """Positions in many frequencies, densities and colours, composed along each ray."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 4))
        self.register_buffer("bands", 2.0 ** torch.arange(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        points = x[:, None] * torch.linspace(0.5, 1.5, 4)[:, None]
        angles = (points[..., None] * self.bands).flatten(-2)
        density, colour = self.field(torch.cat([angles.sin(), angles.cos()], -1)).split([1, 3], -1)
        alpha = 1 - (-F.softplus(density)).exp()
        passed = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        return (passed * alpha * colour.sigmoid()).sum(1)


MEMBERS = {
    "reverse": Member(functools.partial(OwnDerivative, reverse)),
    "old_square": Member(functools.partial(OwnDerivative, old_square), blocked="a legacy autograd.Function"),
    "surrogate": Member(Surrogate),
    "inner_loop": Member(InnerLoop),
    "energy": Member(Energy, blocked="torch.autograd.grad of what vmap has wrapped"),
    "physics": Member(Physics),
    "equilibrium": Member(Equilibrium),
    "until_converged": Member(
        functools.partial(Equilibrium, None), blocked="how many steps it takes depends on the data"
    ),
    "trajectory": Member(Trajectory),
    "flow": Member(Flow, (3, 4)),
    "gaussian_process": Member(GaussianProcess),
    "codebook": Member(Codebook),
    "normalizer": Member(Normalizer),
    "noisy": Member(NoisyLinear, random=True),
    "complex": Member(Complex, compiles=True),
    "state_space": Member(StateSpace),
    "rays": Member(Rays, (2, 3)),
}
