"""Laplace posterior with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.kfac import FactorPrecision, KfacApproxSpec, KronAccumulator, approximation_by_parameter
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import Kron, expand_per_weight
from laplace_ws.posterior.base import BaseLaplace


@dataclass(frozen=True)
class KronPrecision:
    """scale·H + diag(δ) with H Kronecker-factored.

    Attributes:
        H: the curvature.
        scale: what the curvature is multiplied by.
        delta: prior precision, a scalar or one a parameter tensor.
    """

    H: Kron
    scale: Tensor
    delta: Tensor

    def log_det(self) -> Float[Tensor, ""]:
        """Log determinant, float64."""
        return self.H.log_det(self.scale, self.delta)

    def solve(self, vectors: Float[Tensor, "S P"]) -> Float[Tensor, "S P"]:
        """Product of the inverse with each row."""
        return self.H.solve(vectors, self.scale, self.delta)

    def to_dense(self) -> Float[Tensor, "P P"]:
        """The precision in full."""
        return self.H.to_dense().double() * self.scale + torch.diag(expand_per_weight(self.delta, self.H.shapes))


class KronLaplace(BaseLaplace):
    """Laplace posterior whose precision is, for each parameter, a Kronecker product plus the prior's precision.

    Args:
        model: a trained network.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        kfac_approx: "auto", "expand", "reduce", or a mapping from patterns of parameter names to them.
        factor_precision: of the products that make up the factors: "float32", "tf32" or "bf16", see `FactorPrecision`.
        **options: see `BaseLaplace`.
    """

    hessian_structure = "kron"
    per_weight_prior = False
    _matrix = Kron

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        kfac_approx: KfacApproxSpec = "auto",
        factor_precision: str | FactorPrecision = "float32",
        **options: Any,
    ):
        super().__init__(model, likelihood, **options)
        self.factor_precision = FactorPrecision(factor_precision)
        self.approximations = approximation_by_parameter(kfac_approx, self.parameter_names)

    def _make_accumulator(self, parameters: Mapping[str, nn.Parameter]) -> KronAccumulator:
        return KronAccumulator(parameters, self.approximations, self.factor_precision)

    def _options(self) -> dict[str, Any]:
        approximations = {name: a.value for name, a in self.approximations.items()}
        return super()._options() | {"kfac_approx": approximations, "factor_precision": self.factor_precision.value}

    @property
    def posterior_precision(self) -> KronPrecision:
        """H/τ + Δ; its `log_det`, `solve` and `to_dense` use the factors' eigenvalues."""
        return KronPrecision(self.H, *self._damping)  # type: ignore[arg-type]
