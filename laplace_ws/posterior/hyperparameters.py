"""Hyperparameters of a posterior: prior precision and mean, observation noise, temperature; checked when they are set."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import expand_per_weight


class PosteriorHyperparameters(ABC):
    """Holds the hyperparameters of a posterior as float64 tensors on the model's device.

    Attributes:
        hessian_structure: name of the structure, for messages.
        per_weight_prior: whether every weight may have a prior precision of its own.
        likelihood: p(y | f).
        shapes: shape of each parameter, by name.
        n_params: number of weights.
        mean: θ*, flat.
    """

    hessian_structure: ClassVar[str]
    per_weight_prior: ClassVar[bool] = True
    likelihood: Likelihood
    shapes: Mapping[str, torch.Size]
    n_params: int
    mean: Float[Tensor, " P"]
    _device: torch.device
    _dtype: torch.dtype

    @property
    def prior_precision(self) -> Tensor:
        """Δ, float64: a scalar, one per parameter tensor, or one per weight."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        self._prior_precision = self._check_prior_precision(value)

    @property
    def prior_mean(self) -> Tensor:
        """μ, a scalar or one per weight."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        value = self._tensor(value)
        if value.shape not in ((), (self.n_params,)):
            raise ValueError(f"prior_mean must be a number or have shape [{self.n_params}], got {list(value.shape)}.")
        if not value.isfinite().all():
            raise ValueError("prior_mean must be finite.")
        self._prior_mean = value

    @property
    def sigma_noise(self) -> Tensor:
        """σ, in the units of the targets."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self._sigma_noise = self._check_sigma_noise(value)

    @property
    def temperature(self) -> Tensor:
        """τ."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        self._temperature = self._check_positive_scalar("temperature", value)

    def _tensor(self, value: float | Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=torch.float64, device=self._device)
        if not value.requires_grad:
            value = value.clone()  # what the caller does to theirs later is no change of ours
        return value.squeeze() if value.numel() == 1 else value

    def _check_positive_scalar(self, name: str, value: float | Tensor) -> Tensor:
        value = self._tensor(value)
        if value.ndim or not 0 < value < math.inf:
            raise ValueError(f"{name} must be one positive number, got {value.tolist()}.")
        return value

    def _check_sigma_noise(self, value: float | Tensor) -> Tensor:
        if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.numel() > 1):
            raise ValueError(
                "sigma_noise is one number; for outputs of unequal noise use Gaussian(output_scales=[…]), whose common factor it is."
            )
        value = self._check_positive_scalar("sigma_noise", value)
        if not self.likelihood.has_noise and value != 1:
            raise ValueError(f"the {self.likelihood.name} likelihood has no sigma_noise; leave it at 1.")
        return value

    def _check_prior_precision(self, value: float | Tensor) -> Tensor:
        value = self._tensor(value)
        shapes: list[tuple[int, ...]] = [(), (len(self.shapes),)]
        if self.per_weight_prior:
            shapes.append((self.n_params,))
        if tuple(value.shape) not in shapes:
            raise ValueError(
                f"prior_precision for {self.hessian_structure!r} must be of one of the shapes {[list(s) for s in shapes]} "
                f"(one for all, one per parameter tensor{', one per weight' if self.per_weight_prior else ''}), got {list(value.shape)}."
            )
        if not (value > 0).all():
            raise ValueError(f"prior_precision must be positive, but its smallest entry is {value.min().item():g}.")
        if not value.isfinite().all():
            raise ValueError(
                "prior_precision must be finite; freeze the parameters that are to stay at the prior mean."
            )
        return value

    @property
    def prior_precision_diag(self) -> Float[Tensor, " P"]:
        """Δ of every weight."""
        return expand_per_weight(self._prior_precision, self.shapes)

    def squared_deviation(self, *, per_weight: bool = False) -> Float[Tensor, " K"]:
        """(θ*−μ)² in float64: its sum over each parameter tensor, or one per weight."""
        if per_weight:
            return (self.mean.double() - self._prior_mean).square()
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.mean.split(sizes), self._prior_mean.expand(self.n_params).split(sizes), strict=True)
        deviations = (theta.double() - mu for theta, mu in parts)
        return torch.stack([deviation.dot(deviation) for deviation in deviations])

    def _prior_terms(self, delta: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """log det Δ and (θ*−μ)ᵀΔ(θ*−μ)."""
        if delta.ndim and len(delta) != len(self.shapes):
            return delta.log().sum(), delta.dot(self.squared_deviation(per_weight=True))
        sizes = torch.tensor(
            [shape.numel() for shape in self.shapes.values()], dtype=torch.float64, device=delta.device
        )
        delta = delta.expand(len(sizes))
        return sizes.dot(delta.log()), delta.dot(self.squared_deviation())
