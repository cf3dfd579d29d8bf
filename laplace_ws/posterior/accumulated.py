"""Posteriors whose curvature is summed up batch by batch, from what a backend hands out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from laplace_ws.curvature import CurvatureSum
from laplace_ws.curvature.backend import check_devices, evaluation_mode
from laplace_ws.curvature.checks import N_PROBED, check_linearisation
from laplace_ws.curvature.inputs import as_inputs
from laplace_ws.kfac import Accumulator
from laplace_ws.matrices import CurvatureMatrix
from laplace_ws.posterior.base import BaseLaplace
from laplace_ws.posterior.fitting import FitSums, Pairs


class AccumulatedLaplace(BaseLaplace):
    """A posterior whose fit is a sum over batches; takes the arguments of `BaseLaplace`."""

    @abstractmethod
    def _make_accumulator(self, parameters: Mapping[str, nn.Parameter]) -> Accumulator:
        """The sums that a fit takes."""

    def check(self, x: Any) -> None:
        """See `FittedPosterior.check`."""
        x = as_inputs(x, keys=self.keys)
        check_devices(self.model, x)
        with evaluation_mode(self.model), self.subset.active(self.model):
            parameters = self.subset.parameters(self.model)
            uses, outputs, _ = check_linearisation(self.backend, self.model, x[:N_PROBED], parameters)
            self._make_accumulator(parameters).start_batch(uses, outputs.ndim)

    def _take(self, pairs: Pairs, before: CurvatureMatrix | None) -> FitSums:
        return self._sum(pairs, self._make_accumulator)

    def _sum(self, pairs: Pairs, make_accumulator: Callable[[Mapping[str, nn.Parameter]], Accumulator]) -> FitSums:
        """The sums of one pass over the data."""
        total = CurvatureSum(
            self.model,
            self.likelihood.at_noise(1.0),
            make_accumulator,
            curvature=self.curvature,
            backend=self.backend,
            mc_samples=self.mc_samples,
            generator=self.generator,
        )
        total.add_all(pairs)
        assert total.output_shape is not None
        H = total.accumulator.result()
        return FitSums(H, total.nll_sum, total.n_examples, total.n_targets, total.output_shape)
