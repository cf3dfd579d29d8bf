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
        changes: settings that were changed when it was resumed, each as "epoch" (the last before it), "setting", "was" and "now".
    """

    epoch: int = 0
    losses: list[float] = field(default_factory=list[float])
    margliks: list[float] = field(default_factory=list[float])
    history: list[Record] = field(default_factory=list[Record])
    best: dict[str, Any] | None = None
    train_seconds: float = 0.0
    curvature_seconds: float = 0.0
    changes: list[Record] = field(default_factory=list[Record])


@dataclass(frozen=True)
class MarglikResult:
    """What `marglik_training` returns. Unpacks as `la, model, margliks, losses = marglik_training(...)`.

    Attributes:
        la: the posterior of the best model, fitted on all the data; where its factors are by another approximation than those of the
            tuning, with prior precisions of its own.
        model: the model that was passed, now at its best.
        margliks: log marginal likelihood in nats at each tuning; higher is better.
        losses: the MAP objective of each epoch, in nats per example.
        history: one record per epoch, as `on_epoch` left them.
        prior_precision: under which it was trained, of every parameter by name; a geometric mean where every weight has its own.
        prior_group: which group each parameter shares its prior precision with.
        best_epoch: the epoch whose weights and hyperparameters were kept: the one with the highest log marginal likelihood,
            or the last where the temperature was tuned.
        collapsed: groups of parameters whose prior precision ended at its upper limit.
        train_seconds: wall time of the training and the last fit, without `on_epoch`.
        curvature_seconds: the part of it that went into fits and steps on the hyperparameters.
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
    changes: list[Record] = field(default_factory=list[Record])

    def __getitem__(self, place: int) -> Any:
        return tuple(self)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.la, self.model, self.margliks, self.losses))
