"""What a run finds: the records of `metrics.jsonl` and `summary.json`, which these classes write and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laplace_ws.metrics import ReliabilityCurve
from laplace_ws.records import RecordError, from_dict, read_record, read_text

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
FORMAT_VERSION = 1
TUNED, FIXED = "tuned", "fixed-"
_ABSENT = "give the folder of a run that has finished"
_BROKEN = "run the training again to rewrite it"


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of `metrics.jsonl`: one epoch of one network. Losses in nats per example, log evidence in nats; None where not computed.

    Attributes:
        run: "tuned", or "fixed-" and the prior precision.
        epoch: from 1.
        train_nll, train_accuracy: running means over the epoch.
        test_nll, test_accuracy: after the epoch.
        loss: objective of the training, regulariser included.
        log_marginal_likelihood: of the fit in this epoch.
        fit_batches: that this fit saw; 0 where there was none.
        prior_precision: by parameter.
        sigma_noise: of a regression.
        temperature: of the likelihood.
        lr: step size of the weights.
        seconds: wall time.
        curvature_seconds: the part of it that went into the fit and steps on the hyperparameters.
    """

    run: str
    epoch: int
    train_nll: float | None = None
    train_accuracy: float | None = None
    test_nll: float | None = None
    test_accuracy: float | None = None
    loss: float | None = None
    log_marginal_likelihood: float | None = None
    fit_batches: int | None = None
    prior_precision: Mapping[str, float] = field(default_factory=dict)
    sigma_noise: float | None = None
    temperature: float | None = None
    lr: float | None = None
    seconds: float | None = None
    curvature_seconds: float | None = None

    def __post_init__(self) -> None:
        _check_from_one("epoch", self.epoch)


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """What training one network gave; None where a number was not computed.

    Attributes:
        log_marginal_likelihood: of the last fit, in nats.
        test_nll: nats per example.
        test_accuracy, test_ece: fractions.
        train_seconds: wall time of training, curvature included.
        curvature_seconds: the part of it that went into fits and steps on the hyperparameters.
        tuning_overhead: seconds of the tunings by second of gradient steps.
        final_fit_overhead: seconds of the last fit by second of gradient steps.
        over_budget: by how much the two together pass marglik.curvature_budget; 0 within it, None where nothing was left to it.
        best_epoch: whose weights were kept.
        prior_precision: by parameter.
        prior_group: the group with which a parameter shares it, by parameter.
        collapsed: groups whose prior precision ended at its upper limit.
        reliability: of the test set.
        changes: settings that were changed when it was resumed after it had diverged, see `laplace_ws.marglik.result.MarglikResult`.
    """

    log_marginal_likelihood: float | None = None
    test_nll: float | None = None
    test_accuracy: float | None = None
    test_ece: float | None = None
    train_seconds: float | None = None
    curvature_seconds: float | None = None
    tuning_overhead: float | None = None
    final_fit_overhead: float | None = None
    over_budget: float | None = None
    best_epoch: int | None = None
    prior_precision: Mapping[str, float] = field(default_factory=dict)
    prior_group: Mapping[str, str] = field(default_factory=dict)
    collapsed: tuple[str, ...] = ()
    reliability: ReliabilityCurve | None = None
    changes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Name of the data, and numbers of examples."""

    name: str = "data"
    n_train: int
    n_test: int | None = None

    def __post_init__(self) -> None:
        _check_from_one("n_train", self.n_train)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run found, as in `summary.json`.

    Attributes:
        name: of the run.
        format_version: of the file.
        config: settings by section.
        environment: versions, threads and device.
        data: what was trained and tested on.
        total_seconds: total wall time.
        tuned: the network whose prior precision was tuned.
        fixed: the others, by their prior precision as text.
    """

    name: str
    format_version: int = FORMAT_VERSION
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: DataFacts
    total_seconds: float | None = None
    tuned: ModelResult
    fixed: Mapping[str, ModelResult] = field(default_factory=dict)


def read_run(folder: Path) -> RunResult:
    """What a run found, from its folder.

    Raises:
        RecordError: naming the file, what is wrong and how to mend it.
    """
    return read_record(RunResult, folder / SUMMARY, version=FORMAT_VERSION, absent=_ABSENT, broken=_BROKEN)


def read_epochs(folder: Path) -> tuple[list[EpochRecord], list[str]]:
    """The epochs of all networks in the order of the file, and what a reader should know about the file.

    Raises:
        RecordError: naming the line, what is wrong and how to mend it.
    """
    path = folder / METRICS
    lines = [(i, line) for i, line in enumerate(read_text(path, _ABSENT).split("\n"), start=1) if line.strip()]
    records: list[EpochRecord] = []
    notes: list[str] = []
    for i, line in lines:
        where = f"{path}, line {i}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if i == lines[-1][0]:
                notes.append(f"The last line of {path.name} is cut off and was left out.")
                break
            raise RecordError(f"{where} is not valid JSON ({error.msg}); delete the line") from error
        records.append(from_dict(EpochRecord, values, where))
    if not records:
        raise RecordError(f"{path} holds no complete line; train for one epoch at least")
    return records, notes


def _check_from_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name!r} is {value!r}; write a whole number from 1")
