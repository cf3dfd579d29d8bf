"""Binary targets: one label, several, or one per pixel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods.base import Likelihood, check_same_shape, unit_columns


class Bernoulli(Likelihood):
    """Independent binary targets y ∈ {0, 1} with logits f of the same shape.

    One label `[N, 1]`, several `[N, C]` (multi-label), or one per pixel `[N, 1, H, W]` (segmentation).
    """

    name = "binary"

    def check(self, f: Tensor, y: Tensor) -> None:
        """See `Likelihood.check`."""
        check_same_shape("binary", f, y)
        if y.is_complex():
            raise InvalidBatchError(f"binary targets must be 0 or 1, but they are {y.dtype}; recode them.")
        if y.numel() and not ((y == 0) | (y == 1)).all():
            raise InvalidBatchError(
                f"binary targets must be 0 or 1, but they span {y.min().item():g} … {y.max().item():g}; recode them, or use "
                'likelihood="classification" for more classes.'
            )

    def nll_sum(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.nll_sum`."""
        return F.binary_cross_entropy_with_logits(f, y.to(f.dtype), reduction="sum")

    def hessian_columns(self, f: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Unit vectors times √(p(1 − p)), in a form that does not lose small p to rounding."""
        return unit_columns((F.logsigmoid(f) + F.logsigmoid(-f)).mul(0.5).exp(), mask)

    def sampled_column(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Likelihood.sampled_column`."""
        p = f.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    def gradient_column(self, f: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.gradient_column`."""
        return f.sigmoid() - y.to(f.dtype)

    def predictive_mean(self, f: Tensor) -> Tensor:
        """Probabilities of y = 1."""
        return f.sigmoid()

    def most_probable(self, probabilities: Tensor) -> Tensor:
        """1 where it is more probable than 0, in the shape of the outputs."""
        return (probabilities > 0.5).long()

    def predictive_nll(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `Likelihood.predictive_nll`."""
        return F.binary_cross_entropy(prediction, y.to(prediction.dtype))
