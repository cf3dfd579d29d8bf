"""How a budget becomes tunings: after which epochs, and on how many batches each."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALLEST_SHARE = 0.1
"""Share of the batches below which a tuning waits for more to accrue, as fewer say little of the data."""
FEWEST_TUNINGS = 5
"""Tunings that a run gets in any case, since each moves a prior precision only so far from its start."""
OTHER_APPROXIMATION = 2.0
"""Cost per batch of a last fit by another approximation over that of the tunings: by expand over reduce, on Wide ResNets."""
FINAL_FIT_SHARE = 0.5
"""Largest share of what a run may spend that is put aside for its last fit, so that a costly one does not starve the tunings."""


@dataclass(frozen=True)
class TuningCost:
    """What a tuning costs, as far as it has been measured.

    Attributes:
        fixed_seconds: of what comes after the fit: eigenvalues and steps on the hyperparameters.
        batch_seconds: of the fit by batch, its set-up included.
    """

    fixed_seconds: float
    batch_seconds: float

    def seconds(self, n_batches: int) -> float:
        """Predicted wall time of a tuning on a number of batches."""
        return self.fixed_seconds + n_batches * self.batch_seconds

    def learned_after(self, before: TuningCost | None) -> TuningCost:
        """What is known once this is measured too: a lower cost counts at once, a higher one half, as a disturbance only adds time."""
        if before is None:
            return self
        return TuningCost(
            min(self.fixed_seconds, (self.fixed_seconds + before.fixed_seconds) / 2),
            min(self.batch_seconds, (self.batch_seconds + before.batch_seconds) / 2),
        )


@dataclass(frozen=True)
class Spent:
    """What a run has spent so far.

    Attributes:
        gradient_seconds: wall time of its gradient steps.
        tuning_seconds: of its tunings.
        n_tunings: how many these were.
        cost: what one costs; None before the first.
    """

    gradient_seconds: float
    tuning_seconds: float
    n_tunings: int
    cost: TuningCost | None = None


@dataclass(frozen=True)
class Budget:
    """When to tune, and on how many batches, so that this takes at most a given share of the time of the gradient steps.

    What a run may spend is `share` times the seconds that its gradient steps will take, as foretold by those so far. The last fit is put
    aside for, as a fit of all batches at `final_fit_cost` times the cost per batch of the tunings, but at most with half of it
    (`FINAL_FIT_SHARE`). The rest
    accrues evenly over the epochs from `first_epoch` on. After each of them, a tuning takes place on as many batches as what has accrued
    and is not spent pays for, when these are a tenth of all (`SMALLEST_SHARE`) or more, and a tuning of this size is left for the last
    epoch; otherwise it waits. The first tuning, whose cost is not known, sees a tenth.

    In any case there is a tuning after the last epoch and after each of `rounds`; and, where the number of batches is free,
    `FEWEST_TUNINGS` evenly spread ones. Such a tuning sees as many batches as are paid for, where need be a single one. So tunings pass
    the budget only by the error of a prediction, or in a run too short to pay for these.

    Attributes:
        share: seconds of tunings, and of the last fit, by second of gradient steps.
        first_epoch: the first epoch after which a tuning may take place.
        n_epochs: of the run.
        n_batches: of an epoch.
        fit_batches: that each fit sees; None where the budget chooses.
        rounds: the epochs after which tunings take place; None where the budget chooses.
        final_fit_cost: of a batch in the last fit, in units of one in a tuning.
    """

    share: float
    first_epoch: int
    n_epochs: int
    n_batches: int
    fit_batches: int | None = None
    rounds: frozenset[int] | None = None
    final_fit_cost: float = 1.0

    @property
    def varies(self) -> bool:
        """Whether fits see different numbers of batches."""
        return self.fit_batches is None

    @property
    def smallest(self) -> int:
        """The fewest batches for which a tuning does not wait."""
        return self.fit_batches or max(1, math.ceil(SMALLEST_SHARE * self.n_batches))

    def batches_after(self, epoch: int, spent: Spent) -> int:
        """Number of batches on which to tune after an epoch, 0 to wait.

        Args:
            epoch: from 1.
            spent: up to its gradient steps.
        """
        if epoch < self.first_epoch or not (self.rounds is None or epoch in self.rounds):
            return 0
        if spent.cost is None:
            return self.smallest
        paid_for = min(self._paid_for(epoch, spent, spent.cost), self.fit_batches or self.n_batches)
        if paid_for >= self.smallest:
            return paid_for
        if self.rounds is not None or epoch == self.n_epochs or self._starves(epoch, spent.n_tunings):
            return self.fit_batches or max(1, paid_for)
        return 0

    def _share_gone(self, epoch: int) -> float:
        """Share of the epochs after which a tuning may take place that have gone by."""
        return (epoch - self.first_epoch + 1) / (self.n_epochs - self.first_epoch + 1)

    def _paid_for(self, epoch: int, spent: Spent, cost: TuningCost) -> int:
        """Number of batches that what has accrued and is not spent pays for; negative where it does not pay for the rest of a tuning."""
        whole = self.share * spent.gradient_seconds * self.n_epochs / epoch
        for_tunings = whole - min(FINAL_FIT_SHARE * whole, self.n_batches * self.final_fit_cost * cost.batch_seconds)
        left = for_tunings * self._share_gone(epoch) - spent.tuning_seconds
        if epoch < self.n_epochs:
            left = min(left, for_tunings - spent.tuning_seconds - cost.seconds(self.smallest))
        if cost.batch_seconds <= 0:
            return self.n_batches if left >= cost.fixed_seconds else -1
        return math.floor((left - cost.fixed_seconds) / cost.batch_seconds)

    def _starves(self, epoch: int, n_tunings: int) -> bool:
        return self.varies and n_tunings < math.floor(FEWEST_TUNINGS * self._share_gone(epoch))
