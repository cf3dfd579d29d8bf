"""Prior and noise as laplace-torch keeps them: tensors of the model's type that remember what they were computed from."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Hyperparameters:
    """Prior precision, prior mean, noise and temperature of a posterior.

    Attributes:
        temperature: τ, which divides the loss, but not the normaliser of a Gaussian.
        n_params: number of weights of the posterior; None before its last layer is known.
        n_layers: number of its parameter tensors.
    """

    model: nn.Module
    temperature: float
    n_params: int | None
    n_layers: int | None
    _prior_precision: Tensor
    _prior_mean: Tensor
    _sigma_noise: Tensor

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def _prior_lengths(self) -> tuple[int, ...] | None:
        """How many prior precisions there may be; None while that is not known."""
        return None if self.n_params is None or self.n_layers is None else (1, self.n_layers, self.n_params)

    @property
    def _n_prior_means(self) -> int | None:
        return self.n_params

    @property
    def prior_precision(self) -> Float[Tensor, " K"]:
        """δ: one, one for each parameter tensor, or one for each weight."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        value, lengths = self._real("prior_precision", prior_precision).reshape(-1), self._prior_lengths
        if lengths is not None and len(value) not in lengths:
            raise ValueError(f"prior_precision must have one of the lengths {sorted(set(lengths))}, got {len(value)}.")
        self._prior_precision = value

    @property
    def prior_mean(self) -> Tensor:
        """μ: one number, or one for each weight."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, prior_mean: float | Tensor) -> None:
        value, n_params = self._real("prior_mean", prior_mean), self._n_prior_means
        if n_params is not None and value.ndim and len(value) not in (1, n_params):
            raise ValueError(f"prior_mean must be one number or {n_params}, one for each weight, got {len(value)}.")
        self._prior_mean = value

    @property
    def sigma_noise(self) -> Float[Tensor, ""]:
        """σ."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        value = self._real("sigma_noise", sigma_noise)
        if value.numel() != 1:
            raise ValueError("sigma_noise is one number, the same for all outputs.")
        self._sigma_noise = value.reshape(())

    @property
    def _H_factor(self) -> Float[Tensor, ""]:
        return 1 / self.sigma_noise.square() / self.temperature

    def _real(self, name: str, value: Any) -> Tensor:
        """A number or a vector in the model's type, with its graph."""
        if not isinstance(value, (Real, Tensor)) or (isinstance(value, Tensor) and value.ndim > 1):
            raise ValueError(f"{name} must be a number or a tensor of at most one axis, got {value!r}.")
        return torch.as_tensor(value, device=self._device, dtype=self._dtype)
