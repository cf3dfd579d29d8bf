"""The objective whose minimum is the mode: negative log likelihood plus negative log prior, per example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def neg_log_joint_mean(
    nll_mean: Tensor,
    parameters: Sequence[Tensor],
    prior_precisions: Sequence[Tensor],
    n_data: int,
    temperature: float = 1.0,
) -> Tensor:
    """The MAP objective N⁻¹(L/τ + ½ Σ_p δ_p‖θ_p‖²), given the mean negative log likelihood L/N of some examples.

    Each of `prior_precisions` is a scalar, or one value per weight. Training adds the gradient of the
    second term with `PriorGradient`; this form is for differentiation and comparison.
    """
    square_sum = sum((delta * p.square()).sum() for p, delta in zip(parameters, prior_precisions, strict=True))
    return nll_mean / temperature + 0.5 * square_sum / n_data


class PriorGradient:
    """Adds the gradient of scale·½ Σ_p δ_p‖θ_p‖²/N to the `.grad` of the parameters, for any optimiser.

    Args:
        parameters: the tensors θ_p that are trained.
        prior_precision: δ, one value per tensor or one per weight.
        scale: factor on the regulariser.
        n_data: number of examples N.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], prior_precision: Tensor, *, n_data: int, scale: float = 1.0
    ) -> None:
        self.parameters: list[nn.Parameter] = list(parameters)
        self.n_data = n_data
        self.scale = scale
        self.prior_precisions: list[Tensor] = split_by_parameter(prior_precision.detach(), self.parameters)
        coefficients = [delta * (scale / n_data) for delta in self.prior_precisions]
        self.one_per_tensor: bool = all(c.ndim == 0 for c in coefficients)
        self.scalars: list[float] = torch.stack(coefficients).tolist() if self.one_per_tensor else []
        self.tensors: list[Tensor] = (
            [] if self.one_per_tensor else [c.to(p) for c, p in zip(coefficients, parameters, strict=True)]
        )

    @torch.no_grad()
    def add_(self) -> None:
        """Add to `.grad`; a parameter without one (not used in this step) gets one."""
        gradient = torch._foreach_mul(self.parameters, self.scalars or self.tensors)  # pyright: ignore
        missing = [p for p in self.parameters if p.grad is None]
        for p in missing:
            p.grad = torch.zeros_like(p)
        torch._foreach_add_([p.grad for p in self.parameters], gradient)  # pyright: ignore

    @torch.no_grad()
    def penalty_mean(self) -> float:
        """½ Σ_p δ_p‖θ_p‖²/N at the current weights, in nats per example."""
        terms = [(d * p.double().square()).sum() for p, d in zip(self.parameters, self.prior_precisions, strict=True)]
        return 0.5 * torch.stack(terms).sum().item() / self.n_data


def split_by_parameter(prior_precision: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Split [n_tensors] into scalars, or [n_params] into tensors shaped like the parameters."""
    if prior_precision.numel() == len(parameters):
        return list(prior_precision.unbind())
    parts = prior_precision.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
