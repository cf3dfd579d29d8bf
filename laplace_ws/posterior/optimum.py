"""Prior precisions and noise at which the log marginal likelihood of a fitted posterior is highest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.posterior.groups import PriorGroups, PriorStructure, prior_groups
from laplace_ws.posterior.newton import decreasing_root, joint_optimum, log_ratio, separate_optimum, uphill

if TYPE_CHECKING:
    from laplace_ws.posterior.base import BaseLaplace

BOUNDS = (1e-6, 1e8)
"""No hyperparameter leaves this interval while it is tuned."""


@dataclass(frozen=True)
class Box:
    """Limits of the logarithms; equal ones hold a value fixed.

    Attributes:
        log_delta: of the prior precision of each group.
        log_sigma: of the noise.
    """

    log_delta: tuple[Float[Tensor, " G"], Float[Tensor, " G"]]
    log_sigma: tuple[float, float]


class Evidence:
    """The log marginal likelihood of a fitted posterior, at its temperature, over log δ of each group and log σ.

    With q_g = ‖θ_g−μ_g‖² and γ_g the effective number of parameters, its derivatives are ½(γ_g − δ_g q_g) and −∂L/∂log σ/τ − ½ Γ
    ∂log s/∂log σ, where Γ = Σ γ_g and s is the scale of the curvature. It is concave in all of them together (log det is convex in
    the logarithms of the summands' weights), so what is stationary is the optimum.

    Args:
        la: a fitted posterior; its own δ and σ play no part.
        groups: which weights share a δ.
    """

    def __init__(self, la: BaseLaplace, groups: PriorGroups) -> None:
        self.la, self.groups = la, groups
        self.index = groups.index.to(la.mean.device)
        n_groups = len(groups.names)
        squares = la.squared_deviation(per_weight=len(self.index) != len(la.shapes))
        self.square_sums = squares.new_zeros(n_groups).index_add_(0, self.index, squares)
        self.is_separate = la.H.is_separable or n_groups == 1

    def value(self, log_delta: Float[Tensor, " G"], log_sigma: float) -> float:
        """Log marginal likelihood in nats."""
        with torch.no_grad():
            delta = self.groups.spread(log_delta.exp())
            return self.la.log_marginal_likelihood(delta, math.exp(log_sigma)).item()

    def effective(
        self, log_sigma: float, delta: Float[Tensor, " G"]
    ) -> tuple[Float[Tensor, " G"], Float[Tensor, "*G G"]]:
        """γ by group, and −∂γ/∂log δ."""
        return self.la.H.effective_parameters(
            self.la._scale(self._sigma(log_sigma), self.la.temperature), delta, self.index
        )

    def optimum(self, log_delta: Float[Tensor, " G"], log_sigma: float, box: Box) -> tuple[Float[Tensor, " G"], float]:
        """The point of the box where the value is highest, found from any start."""

        def noise_slope(u: float) -> float:
            nonlocal log_delta
            log_delta = self._best_prior(log_delta, u, box)
            return self._noise_slopes(u, self.effective(u, log_delta.exp())[0])[0]

        low, high = box.log_sigma
        if low < high:
            log_sigma = decreasing_root(noise_slope, within(log_sigma, low, high), low, high)
        return self._best_prior(log_delta, log_sigma, box), log_sigma

    def mackay(self, log_delta: Float[Tensor, " G"], log_sigma: float, box: Box) -> tuple[Float[Tensor, " G"], float]:
        """One update δ ← γ/q, σ² ← SSE/(n − τΓ) in a box [MacKay 1992], shortened until the value does not fall.

        With the empirical Fisher, whose scale is σ⁻⁴, the noise's is SSE/(n − 2τΓ).
        """
        log_delta, log_sigma = log_delta.clamp(*box.log_delta), within(log_sigma, *box.log_sigma)
        gamma = self.effective(log_sigma, log_delta.exp())[0]
        log_delta_step = (log_delta + log_ratio(gamma, self.square_sums, log_delta)).clamp(*box.log_delta) - log_delta
        log_sigma_step = within(self._mackay_noise(log_sigma, gamma), *box.log_sigma) - log_sigma
        origin = torch.cat([log_delta, log_delta.new_tensor([log_sigma])])
        step = torch.cat([log_delta_step, log_delta.new_tensor([log_sigma_step])])
        end = uphill(lambda x: self.value(x[:-1], x[-1].item()), origin, step)
        return end[:-1], end[-1].item()

    def _sigma(self, log_sigma: float) -> Float[Tensor, ""]:
        return torch.tensor(log_sigma, dtype=torch.float64, device=self.index.device).exp()

    def _best_prior(self, start: Tensor, log_sigma: float, box: Box) -> Float[Tensor, " G"]:
        def effective(delta: Tensor) -> tuple[Tensor, Tensor]:
            return self.effective(log_sigma, delta)

        if self.is_separate:
            return separate_optimum(effective, self.square_sums, start, *box.log_delta)
        return joint_optimum(effective, lambda t: self.value(t, log_sigma), self.square_sums, start, *box.log_delta)

    def _noise_slopes(self, log_sigma: float, gamma: Tensor) -> tuple[float, float]:
        """∂ log p(D)/∂log σ at fixed δ, and the part −∂L/∂log σ of it, which is SSE/σ² − n."""
        with torch.enable_grad():
            u = torch.tensor(log_sigma, dtype=torch.float64, device=gamma.device, requires_grad=True)
            fit = -self.la._nll_sum(u.exp())
            scale = self.la._scale(u.exp(), self.la.temperature).log()
            (fit_slope,), (scale_slope,) = torch.autograd.grad(fit, u), torch.autograd.grad(scale, u)
        slope = fit_slope / self.la.temperature - 0.5 * gamma.sum() * scale_slope
        return slope.item(), fit_slope.item()

    def _mackay_noise(self, log_sigma: float, gamma: Tensor) -> float:
        if not self.la.likelihood.has_noise:
            return log_sigma
        slope, fit_slope = self._noise_slopes(log_sigma, gamma)
        n, tau = self.la._n_targets, self.la.temperature.item()
        square_error, n_free = n + fit_slope, n - tau * slope + fit_slope  # SSE/σ² and n − τΓ, or n − 2τΓ
        if n_free <= 0 or square_error <= 0:
            return math.inf if n_free <= 0 else -math.inf
        return log_sigma + 0.5 * math.log(square_error / n_free)


def within(value: float, low: float, high: float) -> float:
    """The nearest value between two limits."""
    return min(max(value, low), high)


def optimal_prior_and_noise(
    la: BaseLaplace, prior_structure: PriorStructure | str, *, fix_noise: bool
) -> tuple[Tensor, Float[Tensor, ""]]:
    """The optimum within `BOUNDS`, of the prior precisions at the noise of `la` or of both.

    Returns:
        Δ as `BaseLaplace` takes it, and σ.

    Source: MacKay 1992, "Bayesian interpolation", whose stationary point is found here by Newton's method.
    """
    structure = PriorStructure(prior_structure)
    structure.check(la.hessian_structure)
    groups = prior_groups(la.shapes, structure)
    low, high = (math.log(bound) for bound in BOUNDS)
    start = la.prior_precision.log().mean().expand(len(groups.names))
    log_sigma = la.sigma_noise.log().item()
    limits = torch.full_like(start, low), torch.full_like(start, high)
    box = Box(limits, (log_sigma, log_sigma) if fix_noise else (low, high))
    log_delta, log_sigma = Evidence(la, groups).optimum(start, log_sigma, box)
    return groups.spread(log_delta.exp()), torch.tensor(log_sigma, dtype=torch.float64, device=la.mean.device).exp()
