"""The log marginal likelihood of a fit, and the prior precisions and the noise at which it is highest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.posterior.fit import Fit
from laplace_ws.posterior.groups import PriorGroups, PriorStructure, prior_groups
from laplace_ws.posterior.newton import decreasing_root, joint_optimum, log_ratio, separate_optimum, uphill
from laplace_ws.posterior.prior import Prior

BOUNDS = (1e-6, 1e8)
"""Interval that every hyperparameter stays within while it is tuned."""


def log_marginal_likelihood(fit: Fit, prior: Prior) -> Float[Tensor, ""]:
    """Laplace approximation of log p(D) in nats, float64, differentiable in the values of the prior [Immer et al. 2021]:

    −L(θ*)/τ − ½ (θ*−μ)ᵀΔ(θ*−μ) − ½ [log det(s·H + Δ) − log det Δ], where s is the scale of the curvature at σ and τ.
    """
    log_det_prior, penalty = prior.log_det_and_penalty(fit.mean)
    log_det_ratio = fit.H.log_det(*fit.damping(prior)) - log_det_prior
    return -fit.nll_sum(prior.sigma_noise) / prior.temperature - 0.5 * penalty - 0.5 * log_det_ratio


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
    """The log marginal likelihood of a fit, at the temperature of a prior, over log δ of each group and log σ.

    With q_g = ‖θ_g−μ_g‖² and γ_g the effective number of parameters, its derivatives are ½(γ_g − δ_g q_g) and −∂L/∂log σ/τ − ½ Γ
    ∂log s/∂log σ, where Γ = Σ γ_g and s is the scale of the curvature. It is concave in all of them together (log det is convex in
    the logarithms of the summands' weights), so any stationary point is the optimum.

    Args:
        fit: curvature and sums over the data.
        prior: only its mean and temperature are used, not its δ and σ.
        groups: which weights share a δ.
    """

    def __init__(self, fit: Fit, prior: Prior, groups: PriorGroups) -> None:
        self.fit = fit
        self.prior = prior
        self.groups = groups
        self.index: Tensor = groups.index.to(fit.mean.device)
        n_groups = len(groups.names)
        squares = prior.squared_deviation(fit.mean, per_weight=len(self.index) != len(prior.shapes))
        self.square_sums: Tensor = squares.new_zeros(n_groups).index_add_(0, self.index, squares)
        self.is_separate: bool = fit.H.is_separable or n_groups == 1

    def value(self, log_delta: Float[Tensor, " G"], log_sigma: float) -> float:
        """Log marginal likelihood in nats."""
        with torch.no_grad():
            delta, sigma = self.groups.spread(log_delta.exp()), self._sigma(log_sigma)
            return log_marginal_likelihood(self.fit, replace(self.prior, precision=delta, sigma_noise=sigma)).item()

    def effective(
        self, log_sigma: float, delta: Float[Tensor, " G"]
    ) -> tuple[Float[Tensor, " G"], Float[Tensor, "*G G"]]:
        """γ by group, and −∂γ/∂log δ."""
        scale = self.fit.scale(self._sigma(log_sigma), self.prior.temperature)
        return self.fit.H.effective_parameters(scale, delta, self.index)

    def optimum(self, log_delta: Float[Tensor, " G"], log_sigma: float, box: Box) -> tuple[Float[Tensor, " G"], float]:
        """The point of the box where the value is highest, found from any starting point."""

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
            log_likelihood = -self.fit.nll_sum(u.exp())
            scale = self.fit.scale(u.exp(), self.prior.temperature).log()
            (fit_slope,), (scale_slope,) = torch.autograd.grad(log_likelihood, u), torch.autograd.grad(scale, u)
        slope = fit_slope / self.prior.temperature - 0.5 * gamma.sum() * scale_slope
        return slope.item(), fit_slope.item()

    def _mackay_noise(self, log_sigma: float, gamma: Tensor) -> float:
        if not self.fit.likelihood.has_noise:
            return log_sigma
        slope, fit_slope = self._noise_slopes(log_sigma, gamma)
        n, tau = self.fit.totals.n_targets, self.prior.temperature.item()
        square_error, n_free = n + fit_slope, n - tau * slope + fit_slope  # SSE/σ² and n − τΓ, or n − 2τΓ
        if n_free <= 0 or square_error <= 0:
            return math.inf if n_free <= 0 else -math.inf
        return log_sigma + 0.5 * math.log(square_error / n_free)


def within(value: float, low: float, high: float) -> float:
    """The nearest value between two limits."""
    return min(max(value, low), high)


def optimal_prior_and_noise(
    fit: Fit, prior: Prior, prior_structure: PriorStructure | str, *, fix_noise: bool
) -> tuple[Tensor, Float[Tensor, ""]]:
    """The optimum within `BOUNDS`, of the prior precisions at the prior's noise or of both.

    Returns:
        Δ as `Prior` takes it, and σ.

    Source: MacKay 1992, "Bayesian interpolation", whose stationary point is found here by Newton's method.
    """
    groups = prior_groups(prior.shapes, PriorStructure(prior_structure).checked(prior.structure))
    low, high = (math.log(bound) for bound in BOUNDS)
    start = prior.precision.log().mean().expand(len(groups.names))
    log_sigma = prior.sigma_noise.log().item()
    limits = torch.full_like(start, low), torch.full_like(start, high)
    box = Box(limits, (log_sigma, log_sigma) if fix_noise else (low, high))
    log_delta, log_sigma = Evidence(fit, prior, groups).optimum(start, log_sigma, box)
    return groups.spread(log_delta.exp()), torch.tensor(log_sigma, dtype=torch.float64, device=start.device).exp()
