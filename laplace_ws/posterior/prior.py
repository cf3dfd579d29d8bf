"""The prior of the weights, with the noise and the temperature of the likelihood: the arguments of the evidence of a fit."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves the types of split, tolist and cholesky_ex open

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import expand_per_weight
from laplace_ws.posterior.structure import Structure
from laplace_ws.values import shown

Value = float | Tensor


@dataclass(frozen=True)
class Prior:
    """Hyperparameters of a posterior: float64, on the device of the weights, each checked when it is changed.

    Attributes:
        shapes: shape of the covered part of each parameter, by name.
        likelihood: p(y | f), which may have a noise parameter.
        structure: of the posterior, which may allow each weight a prior precision of its own.
        precision: Δ: a scalar, one per parameter tensor, or one per weight.
        mean: μ: a scalar, or one per weight.
        sigma_noise: σ, in the units of the targets.
        temperature: τ.
    """

    shapes: Mapping[str, torch.Size]
    likelihood: Likelihood
    structure: Structure
    precision: Tensor
    mean: Tensor
    sigma_noise: Tensor
    temperature: Tensor

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, torch.Size],
        likelihood: Likelihood,
        structure: Structure,
        device: torch.device,
        *,
        precision: Value = 1.0,
        mean: Value = 0.0,
        sigma_noise: Value | None = None,
        temperature: Value = 1.0,
    ) -> Prior:
        """Check the values and create a prior; σ is the likelihood's own where it is not given."""
        unset = torch.ones((), dtype=torch.float64, device=device)
        sigma_noise = likelihood.sigma_noise if sigma_noise is None else sigma_noise
        return cls(shapes, likelihood, structure, unset, unset, unset, unset).changed(
            precision=precision, mean=mean, sigma_noise=sigma_noise, temperature=temperature
        )

    def changed(
        self,
        *,
        precision: Value | None = None,
        mean: Value | None = None,
        sigma_noise: Value | None = None,
        temperature: Value | None = None,
    ) -> Prior:
        """A copy with other values, those that are None left as they are.

        Raises:
            TypeError: one is no number.
            ValueError: one is out of its range, or of another shape.
        """
        changes = {}
        if precision is not None:
            changes["precision"] = self._checked_precision(precision)
        if mean is not None:
            changes["mean"] = self._checked_mean(mean)
        if sigma_noise is not None:
            changes["sigma_noise"] = self._checked_noise(sigma_noise)
        if temperature is not None:
            changes["temperature"] = self._positive_scalar("temperature", temperature)
        return replace(self, **changes)

    def precision_per_weight(self) -> Float[Tensor, " P"]:
        """Δ of every weight."""
        return expand_per_weight(self.precision, self.shapes)

    def squared_deviation(self, weights: Float[Tensor, " P"], *, per_weight: bool = False) -> Float[Tensor, " K"]:
        """(θ−μ)² in float64: its sum over each parameter tensor, or one per weight."""
        if per_weight:
            return (weights.double() - self.mean).square()
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(weights.split(sizes), self.mean.expand(len(weights)).split(sizes), strict=True)
        deviations = (theta.double() - mu for theta, mu in parts)
        return torch.stack([deviation.dot(deviation) for deviation in deviations])

    def log_det_and_penalty(self, weights: Float[Tensor, " P"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """log det Δ and (θ−μ)ᵀΔ(θ−μ)."""
        delta = self.precision
        if delta.ndim and len(delta) != len(self.shapes):
            return delta.log().sum(), delta.dot(self.squared_deviation(weights, per_weight=True))
        sizes = [shape.numel() for shape in self.shapes.values()]
        delta = delta.expand(len(sizes))
        log_det = torch.tensor(sizes, dtype=torch.float64, device=delta.device).dot(delta.log())
        return log_det, delta.dot(self.squared_deviation(weights))

    # ---------------------------------------------------------------- checks

    def _tensor(self, name: str, value: Value) -> Tensor:
        try:
            if isinstance(value, (bool, str)) or (isinstance(value, Tensor) and value.is_complex()):
                raise TypeError
            value = torch.as_tensor(value, dtype=torch.float64, device=self.precision.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be a number or a tensor of numbers, got {shown(value)}.") from None
        if not value.requires_grad:
            value = value.clone()  # later changes to the caller's tensor must not change ours
        return value.squeeze() if value.numel() == 1 else value

    def _positive_scalar(self, name: str, value: Value) -> Tensor:
        value = self._tensor(name, value)
        if value.ndim or not 0 < value < math.inf:
            raise ValueError(f"{name} must be one positive number, got {value.tolist()}.")
        return value

    def _checked_noise(self, value: Value) -> Tensor:
        if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.numel() > 1):
            raise ValueError(
                "sigma_noise is one number; for outputs of unequal noise use Gaussian(output_scales=[…]), whose common factor it is."
            )
        value = self._positive_scalar("sigma_noise", value)
        if not self.likelihood.has_noise and value != 1:
            raise ValueError(f"the {self.likelihood.name} likelihood has no sigma_noise; leave it at 1.")
        return value

    def _checked_mean(self, value: Value) -> Tensor:
        value, n_params = self._tensor("prior_mean", value), sum(shape.numel() for shape in self.shapes.values())
        if value.shape not in ((), (n_params,)):
            raise ValueError(f"prior_mean must be a number or have shape [{n_params}], got {list(value.shape)}.")
        if not value.isfinite().all():
            raise ValueError("prior_mean must be finite.")
        return value

    def _checked_precision(self, value: Value) -> Tensor:
        value, per_weight = self._tensor("prior_precision", value), self.structure.prior_per_weight
        shapes = [[], [len(self.shapes)]]
        if per_weight:
            shapes.append([sum(shape.numel() for shape in self.shapes.values())])
        if list(value.shape) not in shapes:
            raise ValueError(
                f"prior_precision for {self.structure.name!r} must be of one of the shapes {shapes} (one for all, one per parameter "
                f"tensor{', one per weight' if per_weight else ''}), got {list(value.shape)}."
            )
        if not (value > 0).all():
            raise ValueError(f"prior_precision must be positive, but its smallest entry is {value.min().item():g}.")
        if not value.isfinite().all():
            raise ValueError(
                "prior_precision must be finite; freeze the parameters that are to stay at the prior mean."
            )
        return value
