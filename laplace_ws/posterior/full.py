"""Laplace posterior with dense curvature."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.kfac import DenseAccumulator
from laplace_ws.matrices import Dense
from laplace_ws.posterior.accumulated import AccumulatedLaplace


class FullLaplace(AccumulatedLaplace):
    """Laplace posterior with all covariances, for small models; takes the arguments of `BaseLaplace`."""

    hessian_structure = "full"
    _covers_single_weights = True
    _matrix = Dense

    def _make_accumulator(self, parameters: Mapping[str, nn.Parameter]) -> DenseAccumulator:
        return DenseAccumulator(parameters, self.subset.selection)

    @property
    def posterior_precision(self) -> Float[Tensor, "P P"]:
        """H/τ + Δ, float64."""
        return self.H.damped(*self._damping)  # type: ignore[attr-defined]
