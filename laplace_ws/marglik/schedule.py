"""When a run tunes, what it leaves, and the error that ends one early."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from laplace_ws.marglik.budget import Budget
from laplace_ws.values import real_number, whole_number

Keep = Literal["last", "best"]
"""Whose weights and hyperparameters a run leaves: see `ScheduleOptions`."""
_LONGEST_DEFAULT_BURNIN = 20
_FREQUENCY, _FRACTION = 5, 1.0
"""Epochs between two tunings and share of the batches, where neither they nor a budget are given."""


class TrainingDiverged(RuntimeError):
    """The loss or the marginal likelihood became NaN or infinite.

    Attributes:
        epoch: the epoch in which it happened, counted from 1.
        checkpoint_path: the last checkpoint on disk, if any.
    """

    def __init__(self, what: str, epoch: int, checkpoint_path: Path | None) -> None:
        super().__init__(what, epoch, checkpoint_path)
        self.what = what
        self.epoch = epoch
        self.checkpoint_path = checkpoint_path

    def __str__(self) -> str:
        mend = "lower the learning rate or the prior precision"
        if self.checkpoint_path:
            mend = f"go on from '{self.checkpoint_path}' at a lower learning rate"
        return (
            f"{self.what} in epoch {self.epoch}; the model is back at its state after epoch {self.epoch - 1}; {mend}, or look for NaN in "
            "the data"
        )


@dataclass(frozen=True)
class ScheduleOptions:
    """When a run tunes, how far, and what it leaves.

    Attributes:
        n_epochs: epochs of gradient steps.
        n_epochs_burnin: epochs before the first tuning; where not given, a fifth of `n_epochs` and at most 20.
        marglik_frequency: epochs between two tunings; after the last epoch there always is one. Chosen within curvature_budget where not
            given, 5 without one.
        n_hypersteps: steps on the hyperparameters at each tuning, 0 to train at fixed ones; Newton's method takes as many as it needs.
        fit_fraction: share of the batches that the fit before a tuning sees. Chosen within curvature_budget where not given, 1 without one.
        max_log_step: largest change of the logarithm of any hyperparameter at one tuning.
        curvature_budget: most seconds of fits and steps on the hyperparameters by second of gradient steps, in (0, 1]; of no effect where
            marglik_frequency and fit_fraction are both given.
        keep: whose weights and hyperparameters the run leaves: "last", those of its last epoch, or "best", those of the tuning with the
            highest log marginal likelihood.
    """

    n_epochs: int = 100
    n_epochs_burnin: int | None = None
    marglik_frequency: int | None = None
    n_hypersteps: int = 50
    fit_fraction: float | None = None
    max_log_step: float = 1.0
    curvature_budget: float | None = 0.1
    keep: Keep = "last"


@dataclass(frozen=True)
class Schedule(ScheduleOptions):
    """`ScheduleOptions` that are in their ranges.

    Raises:
        ValueError: one of them is not.
    """

    def __post_init__(self) -> None:
        for name, least in (("n_epochs", 1), ("n_epochs_burnin", 0), ("marglik_frequency", 1), ("n_hypersteps", 0)):
            value = getattr(self, name)
            if value is None and name in ("n_epochs_burnin", "marglik_frequency"):
                continue
            if whole_number(name, value) < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name, without in (
            ("curvature_budget", f"tune every {_FREQUENCY} epochs on all the data"),
            ("fit_fraction", "leave it to curvature_budget"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < real_number(name, value, finite=False) <= 1:
                raise ValueError(f"{name}={value} must lie in (0, 1]; give None to {without}")
        if not real_number("max_log_step", self.max_log_step, finite=False) > 0:
            raise ValueError(f"max_log_step={self.max_log_step} must be positive")
        if self.keep not in (known := get_args(Keep)):
            raise ValueError(f"keep={self.keep!r} is not one of {list(known)}")
        if self.keep == "best" and self.budget_in_effect is not None and self.fit_fraction is None:
            raise ValueError(
                "keep='best' compares log marginal likelihoods, and those of fits to different numbers of batches, which curvature_budget "
                "chooses, do not compare; give fit_fraction, or keep='last'"
            )
        if self.n_hypersteps and self.burnin > self.n_epochs:
            raise ValueError(
                f"n_epochs_burnin={self.burnin} leaves none of n_epochs={self.n_epochs} to tune in; "
                "shorten the burn-in, or set n_hypersteps=0 to train at fixed hyperparameters"
            )

    @property
    def burnin(self) -> int:
        """Epochs before the first tuning, as given or by default."""
        if self.n_epochs_burnin is not None:
            return self.n_epochs_burnin
        return min(_LONGEST_DEFAULT_BURNIN, self.n_epochs // 5)

    @property
    def budget_in_effect(self) -> float | None:
        """The budget where something is left to it, otherwise None."""
        is_left = self.n_hypersteps > 0 and (self.marglik_frequency is None or self.fit_fraction is None)
        return self.curvature_budget if is_left else None

    def settings(self) -> dict[str, Any]:
        """All entries by name, as they are in effect."""
        in_effect: dict[str, Any] = {"n_epochs_burnin": self.burnin, "curvature_budget": self.budget_in_effect}
        if self.budget_in_effect is None:
            in_effect |= {"marglik_frequency": self._frequency, "fit_fraction": self._fraction}
        return {**asdict(self), **in_effect}

    def is_round(self, epoch: int) -> bool:
        """Whether `epoch` is one of every `marglik_frequency` after the burn-in, every five by default, or the last."""
        past = epoch - self.burnin
        return epoch == self.n_epochs or (past >= 0 and past % self._frequency == 0)

    def tunes(self, epoch: int) -> bool:
        """Whether the hyperparameters are tuned after `epoch`, where this is not left to a budget."""
        return self.n_hypersteps > 0 and self.is_round(epoch)

    def fit_batches(self, n_batches: int) -> int:
        """How many of the batches a fit sees, where this is not left to a budget."""
        return math.ceil(self._fraction * n_batches)

    def budget(self, n_batches: int, final_fit_cost: float = 1.0) -> Budget | None:
        """What decides on tunings where something is left to it, otherwise None.

        Args:
            n_batches: of an epoch.
            final_fit_cost: of a batch in the last fit, in units of one in a tuning.
        """
        share = self.budget_in_effect
        if share is None:
            return None
        rounds = frozenset(epoch for epoch in range(1, self.n_epochs + 1) if self.is_round(epoch))
        return Budget(
            share=share,
            first_epoch=max(1, self.burnin),
            n_epochs=self.n_epochs,
            n_batches=n_batches,
            fit_batches=None if self.fit_fraction is None else self.fit_batches(n_batches),
            rounds=None if self.marglik_frequency is None else rounds,
            final_fit_cost=final_fit_cost,
        )

    @property
    def _frequency(self) -> int:
        return _FREQUENCY if self.marglik_frequency is None else self.marglik_frequency

    @property
    def _fraction(self) -> float:
        return _FRACTION if self.fit_fraction is None else self.fit_fraction
