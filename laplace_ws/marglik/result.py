"""What a run has done so far, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from laplace_ws.posterior import Laplace

Record = dict[str, Any]
"""What is known of one epoch, by name."""


@dataclass
class Progress:
    """What a run has done so far; plain numbers, apart from model snapshots.

    Attributes:
        tuning_cost: what a tuning costs by those so far, the fields of `budget.TuningCost`; None before the first.
        changes: settings that were changed when it was resumed, each as "epoch" (the last before it), "setting", "was" and "now".
    """

    epoch: int = 0
    losses: list[float] = field(default_factory=list[float])
    margliks: list[float] = field(default_factory=list[float])
    history: list[Record] = field(default_factory=list[Record])
    best: dict[str, Any] | None = None
    train_seconds: float = 0.0
    curvature_seconds: float = 0.0
    tuning_cost: dict[str, float] | None = None
    changes: list[Record] = field(default_factory=list[Record])


@dataclass(frozen=True)
class MarglikResult:
    """What `marglik_training` returns. Unpacks as `la, model, margliks, losses = marglik_training(...)`.

    Attributes:
        la: the posterior of the model, fitted on all the data; where its factors are by another approximation than those of the
            tuning, with prior precisions of its own.
        model: the model that was passed, now trained.
        margliks: log marginal likelihood in nats at each tuning; higher is better. Values from fits to different numbers of batches
            ("fit_batches" in `history`) do not compare: the fewer, the higher they are on average.
        losses: the MAP objective of each epoch, in nats per example.
        history: one record per epoch, as `on_epoch` left them.
        prior_precision: under which it was trained, of every parameter by name; a geometric mean where every weight has its own.
        prior_group: which group each parameter shares its prior precision with.
        best_epoch: the epoch whose weights and hyperparameters were kept: the last, or, with keep="best", the one with the highest log
            marginal likelihood.
        collapsed: groups of parameters whose prior precision ended at its upper limit.
        train_seconds: wall time of the training and the last fit, without `on_epoch`.
        curvature_seconds: the part of it that went into fits and steps on the hyperparameters.
        final_fit_seconds: the part of this that went into the last fit.
        curvature_budget: within which tunings were chosen; None where nothing was left to choose.
        changes: settings that were changed when the run was resumed after it had diverged, each as "epoch" (the last before the change),
            "setting", "was" and "now".
    """

    la: Laplace
    model: nn.Module
    margliks: list[float]
    losses: list[float]
    history: list[Record]
    prior_precision: dict[str, float]
    prior_group: dict[str, str]
    best_epoch: int
    collapsed: list[str]
    train_seconds: float
    curvature_seconds: float
    final_fit_seconds: float
    curvature_budget: float | None = None
    changes: list[Record] = field(default_factory=list[Record])

    @property
    def gradient_seconds(self) -> float:
        """Wall time of the gradient steps."""
        return self.train_seconds - self.curvature_seconds

    @property
    def tuning_overhead(self) -> float:
        """Seconds of the tunings by second of gradient steps."""
        return (self.curvature_seconds - self.final_fit_seconds) / self.gradient_seconds

    @property
    def final_fit_overhead(self) -> float:
        """Seconds of the last fit by second of gradient steps."""
        return self.final_fit_seconds / self.gradient_seconds

    @property
    def over_budget(self) -> float | None:
        """By how much tunings and last fit together pass the budget, in seconds by second of gradient steps; 0 within it, None without."""
        if self.curvature_budget is None:
            return None
        return max(0.0, self.tuning_overhead + self.final_fit_overhead - self.curvature_budget)

    def __getitem__(self, place: int) -> Any:
        return tuple(self)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.la, self.model, self.margliks, self.losses))
