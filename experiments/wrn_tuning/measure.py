"""The figures of one row and seed: its training, its evidences, its times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_curvature.tuning import seconds_by_part, tuning_by

from laplace_ws import Laplace
from laplace_ws.data import ImageData, TensorLoader
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import Task, write_whole
from laplace_ws.experiment.kept import Kept, kept_by_training
from laplace_ws.experiment.records import TUNED, EpochRecord, read_epochs
from laplace_ws.experiment.run import load_data, run_experiment, torch_settings
from laplace_ws.experiment.training import train_loader, training_options
from laplace_ws.marglik import prepare
from laplace_ws.records import read_record
from wrn_tuning.config import Row, StudyConfig, folder_of, run_of

FIGURES, FORMAT_VERSION = "figures.json", 1
SCORES = ("nll", "accuracy", "ece")


@dataclass(frozen=True, kw_only=True)
class TuningSeconds:
    """CPU time of one tuning, part by part, at the weights that were kept.

    Attributes:
        fit: of the curvature, on all training images.
        eigenvalues: of its factors.
        hypersteps: all steps on the hyperparameters.
    """

    fit: float
    eigenvalues: float
    hypersteps: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one row and seed gave.

    Attributes:
        format_version: of the file.
        row: name of the row.
        seed: of the training.
        weight_decay: None where it was tuned.
        test_nll: nats per image.
        test_accuracy, test_ece: fractions.
        evidence_expand: log marginal likelihood in nats by K-FAC-expand, of all training images at the prior of the training.
        evidence_own: the same by the approximation that tuned; that by expand where none did.
        best_epoch: whose weights were kept.
        n_tunings: in the training.
        gradient_seconds: CPU time of the gradient steps.
        tuning_seconds: CPU time of all tunings.
        search_seconds: CPU time of the search of the weight decay.
        tuning: parts of one more tuning; None where nothing was tuned.
    """

    format_version: int = FORMAT_VERSION
    row: str
    seed: int
    weight_decay: float | None = None
    test_nll: float
    test_accuracy: float
    test_ece: float
    evidence_expand: float
    evidence_own: float
    best_epoch: int
    n_tunings: int
    gradient_seconds: float
    tuning_seconds: float
    search_seconds: float = 0.0
    tuning: TuningSeconds | None = None

    @property
    def total_seconds(self) -> float:
        """CPU time of all that led to the network."""
        return self.gradient_seconds + self.tuning_seconds + self.search_seconds


def figures_path(config: StudyConfig, row: Row, seed: int) -> Path:
    """The file with the figures of a row and seed, which is there when it is finished."""
    return folder_of(config, row, seed) / FIGURES


def read_figures(path: Path) -> Figures:
    """The figures of a file.

    Raises:
        RecordError: it is missing or damaged.
    """
    mend = "remove it, and the study makes it anew"
    return read_record(Figures, path, version=FORMAT_VERSION, absent="start the study", broken=mend)


def train_and_measure(
    config: StudyConfig, row: Row, seed: int, weight_decay: float | None, search_seconds: float = 0.0
) -> Figures:
    """Train the network of a row on all training images, or go on with it, and keep its figures."""
    run = run_of(config, row, seed, weight_decay)
    folder, result = run_experiment(run, resume=True)
    epochs, _ = read_epochs(folder)
    gradient_seconds, tuning_seconds = split_seconds(epochs)
    data = load_data(run)
    kept = kept_by_training(folder / Task(TUNED).checkpoint, run, data)
    with torch_settings(run.threads, seed):
        evidences = {approx: evidence(config, kept, approx, data) for approx in dict.fromkeys(["expand", row.approx])}
        tuning = seconds_of_tuning(run, kept, data) if weight_decay is None else None
    scores: dict[str, Any] = {f"test_{name}": getattr(result.tuned, f"test_{name}") for name in SCORES}
    figures = Figures(
        row=row.name,
        seed=seed,
        weight_decay=weight_decay,
        **scores,
        evidence_expand=evidences["expand"],
        evidence_own=evidences[row.approx],
        best_epoch=kept.epoch,
        n_tunings=sum(epoch.log_marginal_likelihood is not None for epoch in epochs),
        gradient_seconds=gradient_seconds,
        tuning_seconds=tuning_seconds,
        search_seconds=search_seconds,
        tuning=tuning,
    )
    write_whole(figures_path(config, row, seed), json.dumps(asdict(figures), indent=2) + "\n")
    return figures


def split_seconds(epochs: Sequence[EpochRecord]) -> tuple[float, float]:
    """CPU time of the gradient steps and of the tunings; where both are in one epoch, its gradient steps take the median of the others."""
    seconds = [epoch.cpu_seconds or 0.0 for epoch in epochs]
    plain = [s for s, epoch in zip(seconds, epochs, strict=True) if epoch.log_marginal_likelihood is None]
    gradient = sum(plain) + (len(epochs) - len(plain)) * statistics.median(plain)
    return gradient, sum(seconds) - gradient


def evidence(config: StudyConfig, kept: Kept, approx: str, data: ImageData) -> float:
    """Log marginal likelihood in nats of all training images, neither cropped nor flipped, at the prior of the training."""
    la = Laplace(kept.model, config.likelihood, curvature=config.evidence_curvature, kfac_approx=approx)
    la.prior_precision = kept.prior_precision
    la.fit(TensorLoader(data.x_train, data.y_train, batch_size=config.data.batch_size))
    return la.log_marginal_likelihood().item()


def seconds_of_tuning(run: RunConfig, kept: Kept, data: ImageData) -> TuningSeconds:
    """The parts of a tuning as the training has it; the check of the model, which it does once, is done before."""
    loader, m = train_loader(run, data), run.marglik
    trainer = prepare(kept.model, loader, run.likelihood, *training_options(run, Task(TUNED)), progress_bar=False)
    trainer.la.fit([next(iter(loader))])
    tuning = tuning_by(trainer.la, loader, trainer.hyper, m.n_hypersteps)
    seconds = seconds_by_part(tuning, torch.device("cpu"))
    return TuningSeconds(fit=seconds["fit"], eigenvalues=seconds["decomposition"], hypersteps=seconds["hyper-steps"])
