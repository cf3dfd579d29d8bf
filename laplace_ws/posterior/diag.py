"""Laplace posterior with diagonal curvature."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.kfac import DiagAccumulator
from laplace_ws.matrices import Diag
from laplace_ws.posterior.accumulated import AccumulatedLaplace


class DiagLaplace(AccumulatedLaplace):
    """Laplace posterior that treats the weights as independent; takes the arguments of `BaseLaplace`."""

    hessian_structure = "diag"
    _covers_single_weights = True
    _matrix = Diag

    def _make_accumulator(self, parameters: Mapping[str, nn.Parameter]) -> DiagAccumulator:
        return DiagAccumulator(parameters, self.subset.selection)

    @property
    def posterior_precision(self) -> Float[Tensor, " P"]:
        """The diagonal of H/τ + Δ, float64."""
        return self.H.damped(*self._damping)  # type: ignore[attr-defined]
