"""The posterior as a distribution of the weights: its moments, its density, and what it makes of linear functions of the weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor

from laplace_ws.matrices import Layout
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.posterior.predict import Predictor
from laplace_ws.values import flag, shown


class WeightDensity(ABC):
    """The methods of `Laplace` about N(θ*, P⁻¹), with P = (H/τ + Δ)/κ over the covered weights; each is algebra of its precision.

    Everything is in float64. Those that return a matrix over all weights, `[P, P]`, are for small posteriors.
    """

    @property
    @abstractmethod
    def predictor(self) -> Predictor:
        """The current posterior; raises `NotFittedError` before a fit."""

    @property
    def _precision(self) -> PosteriorPrecision:
        predictor = self.predictor
        return PosteriorPrecision(predictor.fit.H, *predictor.damping)

    @property
    def posterior_covariance(self) -> Float[Tensor, "P P"]:
        """P⁻¹ in full, whatever the structure."""
        return self._precision.inverse()

    @property
    def posterior_variance(self) -> Float[Tensor, " P"]:
        """The variance of each weight, the diagonal of P⁻¹; no matrix over all weights is formed, but for "full"."""
        return self._precision.inverse_diagonal()

    @property
    def scatter(self) -> Float[Tensor, ""]:
        """(θ*−μ)ᵀ Δ (θ*−μ), twice what the prior takes off the log joint; differentiable in the prior."""
        predictor = self.predictor
        return predictor.prior.log_det_and_penalty(predictor.fit.mean)[1]

    def square_norm(self, weights: Float[Tensor, "*S P"]) -> Float[Tensor, "*S"]:
        """(θ−θ*)ᵀ P (θ−θ*), the square of the Mahalanobis distance from the mode.

        Args:
            weights: θ, one vector or several.

        Raises:
            ValueError: they are not vectors over the covered weights.
        """
        mean = self.predictor.fit.mean
        if not isinstance(weights, Tensor) or weights.ndim not in (1, 2) or weights.shape[-1] != len(mean):  # pyright: ignore
            raise ValueError(f"weights must be of shape [{len(mean)}] or [S, {len(mean)}], {_found(weights)}.")
        deviation = weights.double() - mean.double()
        rows = deviation if deviation.ndim == 2 else deviation[None]
        squares = (rows * self._precision.times(rows)).sum(1)
        return squares if deviation.ndim == 2 else squares[0]

    def log_prob(self, weights: Float[Tensor, "*S P"], normalized: bool = True) -> Float[Tensor, "*S"]:
        """Log density of the posterior in nats.

        Args:
            weights: θ, one vector or several.
            normalized: with the terms that do not depend on θ.

        Raises:
            ValueError: they are not vectors over the covered weights.
        """
        exponent = -0.5 * self.square_norm(weights)
        if not flag("normalized", normalized):
            return exponent
        n_params = len(self.predictor.fit.mean)
        return exponent + 0.5 * (self._precision.log_det() - n_params * math.log(2 * math.pi))

    def jacobians(self, x: Any, *, backprop: bool = False) -> tuple[Float[Tensor, "N C P"], Float[Tensor, "N ..."]]:
        """∂f/∂θ of each example over the covered weights, the outputs of an example flattened, and f.

        Its memory is N·C·P numbers: `functional_moments` and predictions do without it.

        Args:
            x: inputs, as for a prediction.
            backprop: keep the graph to the inputs.
        """
        return self.predictor.jacobians(x, backprop=flag("backprop", backprop))

    def functional_variance(self, jacobians: Float[Tensor, "N C P"]) -> Float[Tensor, "N C C"]:
        """J P⁻¹ Jᵀ for each example: the covariance of C linear functions of the weights; differentiable in J.

        Args:
            jacobians: J, as `jacobians` gives it, or the coefficients of any linear functions.

        Raises:
            ValueError: it is not of this shape.
        """
        return self._pushed(jacobians, Layout.EXAMPLE)

    def functional_covariance(self, jacobians: Float[Tensor, "N C P"]) -> Float[Tensor, "NC NC"]:
        """J P⁻¹ Jᵀ over all examples and outputs, those of an example beside each other; otherwise as `functional_variance`."""
        return self._pushed(jacobians, Layout.JOINT)

    def _pushed(self, jacobians: Tensor, layout: Layout) -> Tensor:
        n_params = len(self.predictor.fit.mean)
        if not isinstance(jacobians, Tensor) or jacobians.ndim != 3 or jacobians.shape[-1] != n_params:  # pyright: ignore
            raise ValueError(f"jacobians must be of shape [N, C, {n_params}], {_found(jacobians)}.")
        return self._precision.pushed(jacobians.double(), layout)


def _found(value: Any) -> str:
    return f"got {list(value.shape)}" if isinstance(value, Tensor) else f"got {shown(value)}"
