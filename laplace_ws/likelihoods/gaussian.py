"""Gaussian noise: with one standard deviation, with one per output, or with one that the model itself predicts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods.base import (
    RegressionLikelihood,
    at_least_float32,
    check_floating,
    check_same_shape,
    standard_normal,
    unit_columns,
)
from laplace_ws.values import real_number, shown

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Gaussian(RegressionLikelihood):
    """y_c = f_c + σ s_c ε_c with ε ~ N(0, I); targets have the shape of f.

    Args:
        sigma_noise: σ, in the units of the targets; the value that `sigma_noise` of a posterior replaces and that is tuned.
        output_scales: s_c, how much noisier one output is than another, one number for each entry of the last axis of f; 1 where
            not given. They stay fixed.

    Attributes:
        output_scales: s_c as a tuple, None where all are 1.
    """

    name = "regression"
    has_noise = True
    has_linear_mean = True

    def __init__(self, sigma_noise: float = 1.0, output_scales: Sequence[float] | Tensor | None = None):
        self.sigma_noise: float = real_number("sigma_noise", sigma_noise, above=0)
        self.output_scales: tuple[float, ...] | None = None
        if output_scales is not None:
            if not isinstance(output_scales, (Sequence, Tensor, np.ndarray)) or isinstance(output_scales, str):  # pyright: ignore
                raise TypeError(f"output_scales must be positive numbers, one per output, got {shown(output_scales)}.")
            self.output_scales = tuple(real_number("a number of output_scales", s, finite=False) for s in output_scales)
            if not self.output_scales or not all(0 < scale < math.inf for scale in self.output_scales):
                raise ValueError(f"output_scales must be positive numbers, one per output, got {self.output_scales}.")

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        check_same_shape("regression", f, y)
        check_floating(y)
        n_outputs = f.shape[-1] if f.ndim > 1 else 1
        if self.output_scales is not None and len(self.output_scales) != n_outputs:
            raise InvalidBatchError(
                f"the regression likelihood has {len(self.output_scales)} output_scales, but the last axis of the outputs "
                f"{tuple(f.shape)} has {n_outputs}; give one scale per output."
            )

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        half_square_error = 0.5 * ((f - y) / self._noise(f)).square().sum()
        return half_square_error + y.numel() * (math.log(self.sigma_noise) + self._log_scale + _HALF_LOG_TWO_PI)

    def hessian_columns(self, f: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Unit vectors divided by σ s_c."""
        return unit_columns(torch.ones_like(f) / self._noise(f), mask)

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        return standard_normal(f, generator) / self._noise(f)

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        return (f - y) / self._noise(f) ** 2

    def predictive_mean(self, f: Tensor) -> Tensor:
        """The outputs themselves."""
        return f

    def moments(self, f_mean: Tensor, f_var: Tensor) -> tuple[Tensor, Tensor]:
        """See `RegressionLikelihood.moments`."""
        return f_mean, f_var

    def noise_variance(self, f_mean: Tensor, f_var: Tensor, sigma_noise: float | Tensor) -> Tensor:
        """(σ s_c)² for every output, whatever f."""
        return (torch.ones_like(f_mean) * self._scales(f_mean) * sigma_noise).square()

    def at_noise(self, sigma_noise: float) -> Gaussian:
        """See `Likelihood.at_noise`."""
        other = copy.copy(self)
        other.sigma_noise = float(sigma_noise)
        return other

    def nll_at_noise(self, unit_nll_sum: Tensor, n_targets: float, sigma_noise: Tensor) -> Tensor:
        """See `Likelihood.nll_at_noise`."""
        constant = n_targets * (self._log_scale + _HALF_LOG_TWO_PI)
        return (unit_nll_sum - constant) / sigma_noise**2 + n_targets * sigma_noise.log() + constant

    def curvature_scale(self, sigma_noise: Tensor, curvature: str) -> Tensor:
        """σ⁻² for the GGN; σ⁻⁴ for the empirical Fisher, whose gradients themselves carry σ⁻²."""
        return sigma_noise ** (-4 if curvature == "ef" else -2)

    def options(self) -> dict[str, Any]:
        """See `Likelihood.options`."""
        scales = {} if self.output_scales is None else {"output_scales": list(self.output_scales)}
        return {"sigma_noise": self.sigma_noise, **scales}

    @property
    def _log_scale(self) -> float:
        """Mean of log s_c over the outputs, which equals that over the targets."""
        return (
            0.0
            if self.output_scales is None
            else math.fsum(map(math.log, self.output_scales)) / len(self.output_scales)
        )

    def _scales(self, f: Tensor) -> float | Float[Tensor, " C"]:
        if self.output_scales is None:
            return 1.0
        return torch.tensor(self.output_scales, dtype=f.dtype, device=f.device)

    def _noise(self, f: Tensor) -> float | Float[Tensor, " C"]:
        """σ s_c."""
        return self.sigma_noise * self._scales(f)


class HeteroscedasticGaussian(RegressionLikelihood):
    """y_d = m_d + exp(v_d / 2) ε_d with ε ~ N(0, I), mean m and log-variance v both outputs of the model.

    Outputs are `[N, ..., 2D]`, on the last axis the D means and then the D log-variances; targets are `[N, ..., D]`. Initialise
    the log-variances near those of the residuals, for example through the bias of the last layer.

    The Hessian of −log p in (m, v) is indefinite, so all curvature but the empirical Fisher is of the **Fisher information**
    diag(exp(−v), ½), its mean over y, which is positive [Martens 2020, "New insights and perspectives on the natural gradient method"].
    """

    name = "heteroscedastic_regression"
    has_linear_mean = True

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        if f.ndim < 2 or f.shape[-1] % 2 or y.shape != (*f.shape[:-1], f.shape[-1] // 2):
            raise InvalidBatchError(
                "the heteroscedastic_regression likelihood needs outputs [N, ..., 2D], means and then log-variances, and targets "
                f"[N, ..., D], but the model gave {tuple(f.shape)} and the targets are {tuple(y.shape)}; give the model two outputs a "
                "target."
            )
        check_floating(y)

    @staticmethod
    def split(f: Float[Tensor, "N ... 2*D"]) -> tuple[Float[Tensor, "N ... D"], Float[Tensor, "N ... D"]]:
        """Means and log-variances."""
        mean, log_variance = f.chunk(2, -1)
        return mean, log_variance

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        mean, log_variance = self.split(f)
        square_error = (y - mean).square() * (-log_variance).exp()
        return 0.5 * (log_variance + square_error).sum() + y.numel() * _HALF_LOG_TWO_PI

    def hessian_columns(self, f: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Unit vectors times exp(−v/2) and √½: roots of the Fisher information, which stands in for the Hessian."""
        _, log_variance = self.split(at_least_float32(f))
        roots = torch.cat([(-0.5 * log_variance).exp(), torch.full_like(log_variance, 0.5**0.5)], -1)
        return unit_columns(roots.to(f.dtype), mask)

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        mean, log_variance = self.split(f)
        noise = standard_normal(mean, generator)
        return torch.cat([-noise * (-0.5 * log_variance).exp(), 0.5 * (1 - noise.square())], -1)

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        mean, log_variance = self.split(f)
        precision = (-log_variance).exp()
        return torch.cat([(mean - y) * precision, 0.5 * (1 - (y - mean).square() * precision)], -1)

    def predictive_mean(self, f: Tensor) -> Tensor:
        """The means, `[N, ..., D]`."""
        return self.split(f)[0]

    def moments(self, f_mean: Tensor, f_var: Tensor) -> tuple[Tensor, Tensor]:
        """See `RegressionLikelihood.moments`: those of the means alone."""
        mean, _ = self.split(f_mean)
        of_means = slice(mean.shape[-1])
        return mean, f_var[..., of_means, of_means] if f_var.ndim > f_mean.ndim else f_var[..., of_means]

    def noise_variance(self, f_mean: Tensor, f_var: Tensor, sigma_noise: float | Tensor) -> Tensor:
        """E[exp(v)] = exp(E[v] + ½ var[v]); σ plays no part in it."""
        return (self.split(f_mean)[1] + 0.5 * self.split(f_var)[1]).exp()
