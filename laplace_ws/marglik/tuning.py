"""One tuning: a fit at the current weights, and the ascent of the hyperparameters on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from laplace_ws.curvature.batches import Batches
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.marglik.budget import TuningCost
from laplace_ws.marglik.checks import DataFacts
from laplace_ws.marglik.hyperparameters import Hyperparameters
from laplace_ws.marglik.passes import same_order_after
from laplace_ws.matrices import CurvatureMatrix
from laplace_ws.posterior import Laplace
from laplace_ws.posterior.averages import CurvatureAverages


@dataclass(frozen=True)
class Tuning:
    """What a tuning gave.

    Attributes:
        log_marglik: log marginal likelihood after it, in nats; of a fit to a part of the batches an estimate for all the data.
        n_batches: that its fit saw; 0 where the curvature is that of the optimiser.
        fit_seconds: wall time of the fit.
        seconds: of all of it.
    """

    log_marglik: float
    n_batches: int
    fit_seconds: float
    seconds: float

    @property
    def cost(self) -> TuningCost:
        """What it says of the cost of others."""
        if self.n_batches == 0:
            return TuningCost(self.seconds, 0.0)
        return TuningCost(self.seconds - self.fit_seconds, self.fit_seconds / self.n_batches)


NEWEST = 0.3
"""Least weight of the newest fit in the average of those that each see a part of the batches."""


@dataclass
class Tuner:
    """Tunes the hyperparameters of a posterior at the current weights of its model.

    Attributes:
        la: the posterior, whose hyperparameters are kept equal to `hyper`.
        hyper: the hyperparameters.
        batches: the training data.
        facts: of them.
        n_hypersteps: steps on the hyperparameters.
        max_log_step: largest change of the logarithm of any of them.
        stiffness: upper limit of prior precisions, see `Hyperparameters.ascend`.
        generator: of the choice of batches.
        optimizer: one that averages the curvature of the steps, such as `optim.KFAC`, which is then taken in place of a fit; None for fits.
        averages: whether curvature is averaged over the tunings. A fit to a few batches knows few directions of the weight space, and takes
            the data to say nothing of the others; priors tuned by it alone come out loose. An average knows those of earlier batches too.
        earlier: this average so far, of N examples; None before the first tuning.
    """

    la: Laplace
    hyper: Hyperparameters
    batches: Batches
    facts: DataFacts
    n_hypersteps: int
    max_log_step: float
    stiffness: float
    generator: torch.Generator
    optimizer: CurvatureAverages | None = None
    averages: bool = False
    earlier: CurvatureMatrix | None = None

    def tune(self, n_batches: int, nll_sum: float, clock: Callable[[], float]) -> Tuning:
        """Fit to a number of batches, unless the optimiser has the curvature, and go up the log marginal likelihood.

        Args:
            n_batches: all of them, or a fresh random choice.
            nll_sum: negative log likelihood of all the data in nats, at σ = 1, as it was over the last epoch.
            clock: tells the time in seconds.
        """
        start = clock()
        la = self._of_optimizer(nll_sum)
        if la is None:
            la = self._fitted(n_batches)
        else:
            n_batches = 0
        fitted = clock()
        self.hyper.ascend(la, self.n_hypersteps, max_log_step=self.max_log_step, stiffness=self.stiffness)
        self._agree(la)
        log_marglik = la.log_marginal_likelihood().item()
        self.hyper.assign_to(self.la)
        return Tuning(log_marglik, n_batches, fitted - start, clock() - start)

    def _of_optimizer(self, nll_sum: float) -> Laplace | None:
        """The posterior by the averages of the optimiser; None where it has none, or not of all weights."""
        if self.optimizer is None:
            return None
        try:
            return Laplace.from_optimizer(
                self.optimizer,
                self.la.likelihood,
                n_data=self.facts.n_data,
                nll_sum=nll_sum,
                temperature=self.la.temperature,
            )
        except UnsupportedParameterError:
            self.optimizer = None
            return None

    def _fitted(self, n_batches: int) -> Laplace:
        """The posterior by a fit."""
        with same_order_after(self.batches.loader):
            self.la.fit(
                self._some_batches(n_batches),
                n_data=self.facts.n_data,
                recheck=False,
                averaged_with=self._averaged_with(n_batches),
            )
        if self.averages:
            self.earlier = self.la.H
        return self.la

    def _averaged_with(self, n_batches: int) -> tuple[CurvatureMatrix, float] | None:
        """The average so far, and its weight: none beside a fit to all batches."""
        newest = max(NEWEST, n_batches / self.facts.n_batches)
        return None if self.earlier is None or newest == 1 else (self.earlier, 1 - newest)

    def _agree(self, la: Laplace) -> None:
        """Take the hyperparameters of the first process, from which those of another machine may differ by rounding."""
        if self.batches.processes.size > 1:
            with torch.no_grad():
                self.batches.processes.broadcast_([p.data for p in self.hyper.tuned], 0)
            self.hyper.assign_to(la)

    def _some_batches(self, n_chosen: int) -> Batches:
        if n_chosen == self.facts.n_batches:
            return self.batches
        order = torch.randperm(self.facts.n_batches, generator=self.generator)
        return replace(self.batches, chosen=frozenset(order[:n_chosen].tolist()))
