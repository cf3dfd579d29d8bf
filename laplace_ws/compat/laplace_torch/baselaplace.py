"""The posteriors over all weights, by laplace-torch's names and calls."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface
from laplace_ws.compat.laplace_torch.parametric import BaseLaplace, ParametricLaplace
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood
from laplace_ws.compat.laplace_torch.utils.matrix import Kron, KronDecomposed, factors_of
from laplace_ws.compat.laplace_torch.utils.utils import invsqrt_precision
from laplace_ws.matrices import Dense, Diag, LowRank
from laplace_ws.matrices import Kron as OurKron
from laplace_ws.posterior import Fit

__all__ = [
    "BaseLaplace",
    "DiagLaplace",
    "FullLaplace",
    "FunctionalLaplace",
    "KronLaplace",
    "LowRankLaplace",
    "ParametricLaplace",
]


class FullLaplace(ParametricLaplace):
    """All covariances."""

    _key = ("all", "full")
    _structure = "full"

    @property
    def H(self) -> Any:
        """Curvature at σ = 1 and τ = 1, `[P, P]`; zeros before a fit."""
        if self._posterior is None:
            n_params = len(self.prior_precision_diag)
            return torch.zeros(n_params, n_params, device=self._device, dtype=self._dtype)
        found = self._posterior.H
        assert isinstance(found, Dense)
        return (found.matrix * self._ef_factor).to(self._dtype)

    @property
    def posterior_precision(self) -> Float[Tensor, "P P"]:
        """P = H/(τσ²) + Δ."""
        return self._H_factor * self.H + torch.diag(self.prior_precision_diag)

    @property
    def posterior_scale(self) -> Float[Tensor, "P P"]:
        """The lower triangular L with L Lᵀ = P⁻¹."""
        return invsqrt_precision(self.posterior_precision)

    @property
    def posterior_covariance(self) -> Float[Tensor, "P P"]:
        """P⁻¹."""
        scale = self.posterior_scale
        return scale @ scale.mT


class DiagLaplace(ParametricLaplace):
    """Independent weights."""

    _key = ("all", "diag")
    _structure = "diag"

    @property
    def H(self) -> Any:
        """Curvature at σ = 1 and τ = 1, `[P]`; zeros before a fit."""
        if self._posterior is None:
            return torch.zeros_like(self.prior_precision_diag)
        found = self._posterior.H
        assert isinstance(found, Diag)
        return (found.values * self._ef_factor).to(self._dtype)

    @property
    def posterior_precision(self) -> Float[Tensor, " P"]:
        """P = H/(τσ²) + Δ."""
        return self._H_factor * self.H + self.prior_precision_diag

    @property
    def posterior_scale(self) -> Float[Tensor, " P"]:
        """Standard deviation of each weight."""
        return self.posterior_precision.rsqrt()

    @property
    def posterior_variance(self) -> Float[Tensor, " P"]:
        """Variance of each weight."""
        return 1 / self.posterior_precision


class KronLaplace(ParametricLaplace):
    """One Kronecker product for each parameter tensor, by K-FAC-expand unless `asdl_fisher_kwargs` says otherwise."""

    _key = ("all", "kron")
    _structure = "kron"
    _decomposed: tuple[Fit, KronDecomposed] | None = None

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        damping: bool = False,
        backend_kwargs: MutableMapping[str, Any] | None = None,
        asdl_fisher_kwargs: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.damping: bool = damping
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            dict_key_x,
            dict_key_y,
            backend,
            backend_kwargs,
            asdl_fisher_kwargs,
        )

    @property
    def _prior_lengths(self) -> tuple[int, ...] | None:
        lengths = super()._prior_lengths
        return None if lengths is None else lengths[:2]

    @property
    def _structure_options(self) -> dict[str, Any]:
        return {**super()._structure_options, "kfac_approx": self._asdl_fisher_kwargs.get("kfac_approx", "expand")}

    @property
    def H_facs(self) -> Kron | None:
        """The Kronecker factors; None before a fit."""
        if self._posterior is None:
            return None
        found = self._posterior.H
        assert isinstance(found, OurKron)
        return Kron([[factor.to(self._dtype) for factor in F] for F in factors_of(found)]) * self._ef_factor

    @property
    def H(self) -> Any:
        """Curvature at σ = 1 and τ = 1, by its eigenvectors; factors of zeros before a fit."""
        factors = self.H_facs
        if factors is None or self._posterior is None:
            return Kron.init_from_model(self._covered, self._device, self._dtype)
        fit = self._posterior.fitted
        if self._decomposed is None or self._decomposed[0] is not fit:
            self._decomposed = fit, factors.decompose(damping=self.damping)
        return self._decomposed[1]

    @property
    def posterior_precision(self) -> KronDecomposed:
        """P = H/(τσ²) + Δ; an `AttributeError` before a fit."""
        _ = self.posterior
        return self.H * self._H_factor + self.prior_precision


class LowRankLaplace(ParametricLaplace):
    """The leading eigenpairs of the curvature, of the GGN here; `backend_kwargs={"low_rank": k}` says how many."""

    _key = ("all", "lowrank")
    _structure = "lowrank"

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        backend: type[CurvatureInterface] | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend_kwargs: MutableMapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            dict_key_x,
            dict_key_y,
            backend,
            backend_kwargs,
        )

    @property
    def _own_backend_kwargs(self) -> dict[str, Any]:
        return {key: value for key, value in self._backend_kwargs.items() if key != "low_rank"}

    @property
    def _structure_options(self) -> dict[str, Any]:
        return {**super()._structure_options, "rank": self._backend_kwargs.get("low_rank", 10)}

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """See `BaseLaplace.fit`; data are not added."""
        if not override:
            raise ValueError(
                "eigenpairs of one fit do not add to those of another; fit all the data with override=True."
            )
        super().fit(train_loader, override, progress_bar)

    @property
    def H(self) -> Any:
        """Eigenvectors and eigenvalues at σ = 1 and τ = 1; None before a fit."""
        if self._posterior is None:
            return None
        found = self._posterior.H
        assert isinstance(found, LowRank)
        return found.vectors.to(self._dtype), (found.values * self._ef_factor).to(self._dtype)

    @property
    def posterior_precision(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Eigenvectors and eigenvalues of H/(τσ²), and Δ."""
        _ = self.posterior
        vectors, values = self.H
        return (vectors, self._H_factor * values), self.prior_precision_diag


class FunctionalLaplace:
    """A posterior in function space, which is not offered here.

    Raises:
        NotImplementedError: always; says what is nearest.
    """

    _key = ("all", "gp")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            'a Gaussian process in function space is not offered here; hessian_structure="full", of the last layer for a large network, '
            "predicts the same where the data are few."
        )
