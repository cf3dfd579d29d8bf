"""What is trained, by which optimisers, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """The task.

    Attributes:
        task: "molecules" (melting points, mean absolute error in K) or "images" (classes, error in %).
        root: for images, a folder with train/<class>/ and test/<class>/.
        cache: folder in which the data are kept as tensors.
        n_train: training examples; None for all.
        n_validation: examples of the training data that tuning is scored on.
        seed: of the splits.
    """

    task: str
    root: str | None = None
    cache: str = "runs/train_kfac"
    n_train: int | None = None
    n_validation: int = 1137
    seed: int = 0


@dataclass(frozen=True)
class Contestant:
    """An optimiser and its trials.

    Attributes:
        optimizer: "nadamw", "adamw", "sgd", "muon", "soap" or "kfac".
        role: "reference" (its best sets the target), "rival" (a target of its own) or "kfac".
        trials: options of each trial, as many for every contestant; a single one needs no tuning, and is not run as a trial.
        options: what all trials share.
        tuned_at: share of the horizon at which trials are run.
        budgets: shares of the horizon that are run with all seeds.
        batch_size: examples of a step, if other than the study's.
    """

    optimizer: str
    role: str
    trials: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    tuned_at: float = 1.0
    budgets: list[float] = field(default_factory=lambda: [1.0])
    batch_size: int | None = None


@dataclass(frozen=True)
class TrainKfacConfig:
    """The study.

    Attributes:
        data: the task.
        model: options of its network.
        contestants: by name.
        horizon: T, steps of the references.
        batch_size: examples of a step.
        warmup: share of a budget over which the learning rate rises; it falls to zero by a cosine over the rest.
        seeds: of the trainings that are reported; trials take one of their own.
        tuning_seed: that one.
        device: of the trainings.
        threads: of torch.
        share: "i/n": this process runs every n-th training, from the i-th (from 0).
        report_only: write the report of what is there, and train nothing.
        out: folder of the results.
    """

    data: DataConfig
    contestants: dict[str, Contestant]
    horizon: int
    model: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 128
    warmup: float = 0.05
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    tuning_seed: int = 1000
    device: str = "cpu"
    threads: int = 1
    share: str = "0/1"
    report_only: bool = False
    out: str = "runs/train_kfac"

    def __post_init__(self) -> None:
        numbers = {name: len(contestant.trials) for name, contestant in self.contestants.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"contestants must have equally many trials, got {numbers}")
        if not any(contestant.role == "reference" for contestant in self.contestants.values()):
            raise ValueError('no contestant has the role "reference", whose best sets the target')
