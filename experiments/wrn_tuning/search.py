"""The weight decay by a search of Optuna's, in a given CPU time."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_ws.data import ImageData, balanced_indices
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.evaluate import outputs
from laplace_ws.experiment.folder import Task, write_whole
from laplace_ws.experiment.records import TUNED
from laplace_ws.experiment.run import load_data, make_model, torch_settings
from laplace_ws.experiment.training import train_loader, training_options
from laplace_ws.marglik import TrainingDiverged, marglik_training
from laplace_ws.records import read_record
from wrn_tuning.config import Row, StudyConfig, StudyError, folder_of, run_of

SEARCH, FORMAT_VERSION = "search.json", 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        format_version: of the file.
        weight_decay: of the trial with the lowest NLL at its end.
        validation_nll: its NLL in nats per image.
        seconds: CPU time of the search.
        n_complete: trials that came to their end.
        n_pruned: those that did not: pruned, diverged, or cut off when the time had passed.
    """

    format_version: int = FORMAT_VERSION
    weight_decay: float
    validation_nll: float
    seconds: float
    n_complete: int
    n_pruned: int


class Clock:
    """The CPU time of a search, without what it need not have done.

    Attributes:
        seconds: that it has.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.process_time()

    @property
    def spent(self) -> float:
        """CPU time so far."""
        return time.process_time() - self._start

    @property
    def is_over(self) -> bool:
        """Whether the time has passed."""
        return self.spent > self.seconds

    def back_to(self, spent: float) -> None:
        """Leave out what came after so much time."""
        self._start += self.spent - spent


def load_optuna() -> Any:
    """The module.

    Raises:
        StudyError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise StudyError(
            "optuna, which searches, is not installed; pip install '.[experiments]', or set search.budgets=[]"
        ) from error
    return optuna


def search(config: StudyConfig, row: Row, seed: int, seconds: float) -> Found:
    """The weight decay that a search of so much CPU time finds, or found before.

    Each trial trains as the other rows do, on the training images that are not left out, and is judged by the NLL of those that are.

    Raises:
        StudyError: no trial came to its end; or Optuna is missing.
    """
    path = folder_of(config, row, seed) / SEARCH
    if path.exists():
        mend = "remove it, and the study searches anew"
        return read_record(Found, path, version=FORMAT_VERSION, absent=mend, broken=mend)
    optuna = load_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fit, validation = left_out(config, load_data(run_of(config, row, seed, config.search.lowest)), seed)
    clock = Clock(seconds)

    def objective(trial: Any) -> float:
        decay = trial.suggest_float("weight_decay", config.search.lowest, config.search.highest, log=True)
        return train_trial(config, row, seed, decay, fit, validation, trial, clock)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=optuna.pruners.MedianPruner())
    while not clock.is_over:
        study.optimize(objective, n_trials=1)
    found = found_by(study, optuna.trial.TrialState, clock.spent)
    write_whole(path, json.dumps(asdict(found), indent=2) + "\n")
    return found


def left_out(config: StudyConfig, data: ImageData, seed: int) -> tuple[ImageData, tuple[Tensor, Tensor]]:
    """The data without the training images that judge, and those."""
    is_judge = torch.zeros(len(data.y_train), dtype=torch.bool)
    is_judge[balanced_indices(data.y_train, config.search.n_validation, seed=seed)] = True
    fit = replace(data, x_train=data.x_train[~is_judge], y_train=data.y_train[~is_judge])
    return fit, (data.x_train[is_judge], data.y_train[is_judge])


def train_trial(
    config: StudyConfig,
    row: Row,
    seed: int,
    weight_decay: float,
    data: ImageData,
    validation: tuple[Tensor, Tensor],
    trial: Any,
    clock: Clock,
) -> float:
    """The NLL of the left-out images in nats per image after the last epoch of a training; that of each epoch may prune it.

    Raises:
        TrialPruned: by the pruner, as the training diverged, or as the time of the search has passed.
    """
    optuna = load_optuna()
    run = trial_run(config, row, seed, weight_decay, len(data.y_train))
    model = make_model(run, data)
    nll, spent = math.inf, clock.spent

    def judge(record: dict[str, Any]) -> None:
        nonlocal nll, spent
        nll = F.cross_entropy(outputs(model, validation[0]).double(), validation[1]).item()
        spent = clock.spent
        trial.report(nll, record["epoch"])
        if clock.is_over or trial.should_prune():
            raise optuna.TrialPruned

    schedule, options = training_options(run, Task(TUNED))
    with torch_settings(run.threads, run.seed):
        try:
            marglik_training(
                model,
                train_loader(run, data),
                run.likelihood,
                **vars(schedule),
                **vars(options),
                on_epoch=judge,
                progress_bar=False,
            )
        except TrainingDiverged as error:
            raise optuna.TrialPruned from error
    clock.back_to(spent)  # the fit after the last epoch is of no use here
    return nll


def trial_run(config: StudyConfig, row: Row, seed: int, weight_decay: float, n_images: int) -> RunConfig:
    """The training of a trial; the fit after its last epoch, which nobody needs, is the cheapest."""
    run = run_of(config, row, seed, weight_decay)
    prior_precision = weight_decay * n_images
    return replace(
        run,
        marglik=replace(run.marglik, prior_prec_init=prior_precision, final_curvature="ef", final_kfac_approx="reduce"),
    )


def found_by(study: Any, states: Any, seconds: float) -> Found:
    """The best of the trials that came to their end.

    Raises:
        StudyError: none did.
    """
    complete = [trial for trial in study.trials if trial.state == states.COMPLETE]
    if not complete:
        raise StudyError(f"no trial ended within {seconds:.0f} s of CPU time; raise search.budgets")
    best = min(complete, key=lambda trial: trial.value)
    return Found(
        weight_decay=best.params["weight_decay"],
        validation_nll=best.value,
        seconds=seconds,
        n_complete=len(complete),
        n_pruned=len(study.trials) - len(complete),
    )
