"""Laplace posterior with the leading eigenpairs of the curvature."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_ws.curvature.backend import check_devices, evaluation_mode
from laplace_ws.curvature.checks import N_PROBED
from laplace_ws.curvature.inputs import as_inputs, call_model, own_copy
from laplace_ws.curvature.lowrank import low_rank_curvature
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import CurvatureMatrix, LowRank
from laplace_ws.posterior.base import BaseLaplace
from laplace_ws.posterior.fitting import FitSums, Pairs


class LowRankLaplace(BaseLaplace):
    """Laplace posterior that knows the directions in which the data say most, across layers; in all others it is the prior.

    A fit finds the leading eigenpairs by Lanczos' method without a backend, so it covers any network that can be differentiated twice. It
    takes two to four passes over the data for each pair, 22 at least. Predictions with `pred_type="nn"` cover as many networks; those with
    "glm" need a backend that knows the uses of the parameters.

    Args:
        model: a trained network.
        likelihood: see `BaseLaplace`.
        rank: how many eigenpairs at most.
        **options: see `BaseLaplace`.
    """

    hessian_structure = "lowrank"
    _reads_data_again = True
    _matrix = LowRank

    def __init__(self, model: nn.Module, likelihood: str | Likelihood, *, rank: int = 20, **options: Any):
        super().__init__(model, likelihood, **options)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        self.rank = rank

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"rank": self.rank}

    def check(self, x: Any) -> None:
        """See `FittedPosterior.check`."""
        x = as_inputs(x, keys=self.keys)
        check_devices(self.model, x)
        with evaluation_mode(self.model):
            call_model(self.model, own_copy(x[:N_PROBED]))

    def _take(self, pairs: Pairs, before: CurvatureMatrix | None) -> FitSums:
        found = low_rank_curvature(
            self.model,
            self.likelihood.at_noise(1.0),
            pairs,
            rank=self.rank,
            curvature=self.curvature,
            mc_samples=self.mc_samples,
            generator=self.generator,
        )
        return FitSums(found.H, found.nll_sum, found.n_examples, found.n_targets, found.output_shape)
