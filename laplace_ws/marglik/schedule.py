"""When a run tunes, and the error that ends one early."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laplace_ws.values import real_number, whole_number

_LONGEST_DEFAULT_BURNIN = 20


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
    """When a run tunes, and how far.

    Attributes:
        n_epochs: epochs of gradient steps.
        n_epochs_burnin: epochs before the first tuning; where not given, a fifth of `n_epochs` and at most 20.
        marglik_frequency: epochs between two tunings; after the last epoch there always is one.
        n_hypersteps: steps on the hyperparameters at each tuning, 0 to train at fixed ones; Newton's method takes as many as it needs.
        fit_fraction: share of the batches that the fit before a tuning sees.
        max_log_step: largest change of the logarithm of any hyperparameter at one tuning.
    """

    n_epochs: int = 100
    n_epochs_burnin: int | None = None
    marglik_frequency: int = 5
    n_hypersteps: int = 50
    fit_fraction: float = 1.0
    max_log_step: float = 1.0


@dataclass(frozen=True)
class Schedule(ScheduleOptions):
    """`ScheduleOptions` that are in their ranges.

    Raises:
        ValueError: one of them is not.
    """

    def __post_init__(self) -> None:
        for name, least in (("n_epochs", 1), ("n_epochs_burnin", 0), ("marglik_frequency", 1), ("n_hypersteps", 0)):
            value = getattr(self, name)
            if value is None and name == "n_epochs_burnin":
                continue
            if whole_number(name, value) < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 < real_number("fit_fraction", self.fit_fraction, finite=False) <= 1:
            raise ValueError(f"fit_fraction={self.fit_fraction} must lie in (0, 1]")
        if not real_number("max_log_step", self.max_log_step, finite=False) > 0:
            raise ValueError(f"max_log_step={self.max_log_step} must be positive")
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

    def settings(self) -> dict[str, Any]:
        """All entries by name, the burn-in as it is in effect."""
        return {**asdict(self), "n_epochs_burnin": self.burnin}

    def is_round(self, epoch: int) -> bool:
        """Whether a tuning is due after `epoch`; after the last epoch it always is."""
        past = epoch - self.burnin
        return epoch == self.n_epochs or (past >= 0 and past % self.marglik_frequency == 0)

    def tunes(self, epoch: int) -> bool:
        """Whether the hyperparameters are tuned after `epoch`."""
        return self.n_hypersteps > 0 and self.is_round(epoch)
