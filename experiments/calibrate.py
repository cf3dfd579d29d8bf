"""How far the probabilities of a network can be trusted, by the way they are made, over several seeds.

    python experiments/calibrate.py --config configs/calibrate.yaml

Trains a network for each seed (other images, initialisation and order of batches) and scores it as `laplace-ws calibrate` does: MAP,
temperature scaling, Laplace posteriors and their rivals, on test images, on damaged ones, and in telling images of other things from
them. The further networks of a deep ensemble, and one with dropout, are trained by the way, on the images of the first. Prints mean and
standard error over the seeds, and writes the figures of every seed as JSON; the page of each seed lies in its run folder.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from study import read_config, write_result

from laplace_ws.calibration import (
    CalibrateConfig,
    CalibrationDataConfig,
    CalibrationResult,
    MethodResult,
    MethodsConfig,
    read_result,
    run_calibration,
)
from laplace_ws.calibration import write_result as write_calibration
from laplace_ws.calibration.run import RESULT, check_config
from laplace_ws.calibration.table import columns, uncertainty_columns
from laplace_ws.errors import InputError
from laplace_ws.experiment.config import ExperimentError, RunConfig
from laplace_ws.experiment.run import run_experiment
from laplace_ws.report.calibration_page import write_calibration_report
from laplace_ws.tables import Column

MEMBER_SEEDS = 1000
"""Distance of the seeds of an ensemble's networks, so that none is that of another network of the study."""


@dataclass(frozen=True)
class StudyConfig:
    """What is trained and scored.

    Attributes:
        seeds: one network each.
        train: the training run; name and seed are completed by the seed.
        ensemble_size: networks of the deep ensemble, the first included; 1 for no ensemble.
        dropout: model.dropout of the network for Monte Carlo dropout; none if not given.
        data: see `CalibrateConfig`.
        methods: see `CalibrateConfig`; the runs in ensemble and mc_dropout are those that the study trains.
        n_bins: see `CalibrateConfig`.
        ood_score: see `CalibrateConfig`.
        out: folder of the results.
        resume: go on where an earlier call of the same study ended: networks that are trained and seeds that are scored are kept.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: RunConfig = field(default_factory=RunConfig)
    ensemble_size: int = 1
    dropout: float | None = None
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    n_bins: int = 15
    ood_score: str = "confidence"
    out: str = "runs"
    resume: bool = False


def calibrate_seed(config: StudyConfig, seed: int) -> CalibrationResult:
    """Train the networks of a seed, and score them.

    Raises:
        ExperimentError: another run or study of this name is there.
    """
    run = run_of(config, seed)
    runs = (run, *further_runs(config, run))
    folder, *others = [run_experiment(each, resume=config.resume)[0] for each in runs]
    n_members = config.ensemble_size - 1
    calibration = calibration_of(
        config, run, [str(member) for member in others[:n_members]], next(map(str, others[n_members:]), None)
    )
    if config.resume and (folder / RESULT).exists():
        return scored_before(calibration, folder)
    result = run_calibration(calibration)
    write_calibration(result, folder)
    write_calibration_report(result, str(folder))
    return result


def scored_before(config: CalibrateConfig, folder: Path) -> CalibrationResult:
    """The scores of an earlier call.

    Raises:
        ExperimentError: other options were scored; names the first.
    """
    found, wanted = read_result(folder), asdict(config)
    for key, value in wanted.items():
        if found.config.get(key) != value:
            raise ExperimentError(
                f"{folder / RESULT} was scored with {key}={found.config.get(key)}, this study says {value}; choose another train.name"
            )
    return found


def run_of(config: StudyConfig, seed: int) -> RunConfig:
    """The training of the network that is scored."""
    return replace(config.train, name=f"{config.train.name}-seed{seed}", seed=seed, report=False)


def further_runs(config: StudyConfig, run: RunConfig) -> list[RunConfig]:
    """The further trainings on the same images: those of the ensemble, then that with dropout."""
    of_same_images = replace(run, data=replace(run.data, seed=run.data_seed))
    members = [
        replace(of_same_images, name=f"{run.name}-member{i}", seed=run.seed + MEMBER_SEEDS * i)
        for i in range(1, config.ensemble_size)
    ]
    if config.dropout is None:
        return members
    return [*members, replace(run, name=f"{run.name}-dropout", model=replace(run.model, dropout=config.dropout))]


def calibration_of(
    config: StudyConfig, run: RunConfig, members: Sequence[str] = (), dropped: str | None = None
) -> CalibrateConfig:
    """How a trained network is scored."""
    return CalibrateConfig(
        checkpoint=str(run.folder),
        seed=run.seed,
        device=run.device,
        threads=run.threads,
        n_bins=config.n_bins,
        ood_score=config.ood_score,
        data=config.data,
        methods=replace(config.methods, ensemble=list(members), mc_dropout=dropped),
    )


def check_study(config: StudyConfig) -> None:
    """Reject before the first training what would be rejected after it.

    Raises:
        ValueError: says what.
    """
    if config.ensemble_size < 1:
        raise ValueError(f"ensemble_size={config.ensemble_size} must be at least 1")
    if config.methods.ensemble or config.methods.mc_dropout is not None:
        raise ValueError(
            "methods.ensemble and methods.mc_dropout are trained by the study; give ensemble_size and dropout instead"
        )
    check_config(calibration_of(config, config.train))


def collect(results: Sequence[CalibrationResult]) -> dict[str, Any]:
    """By method, every figure of the table as a list with one entry a seed, and the scores on damaged images likewise."""
    table: dict[str, Any] = {}
    for methods in zip(*(result.methods for result in results), strict=True):
        row: dict[str, Any] = {"label": methods[0].label}
        shown = [*columns(), *uncertainty_columns()]
        row |= {column.title: [column.value(method) for method in methods] for column in shown}
        row["corrupted"] = [
            {"corruption": entries[0].corruption, "strength": entries[0].strength}
            | {score: [entry.scores[score] for entry in entries] for score in entries[0].scores}
            for entries in zip(*(method.corrupted for method in methods), strict=True)
        ]
        table[methods[0].name] = row
    return table


def as_markdown(table: dict[str, Any]) -> str:
    """Mean ± standard error over the seeds, and a second table for uncertainty; figures that no method has are left out."""
    parts = [markdown_table(table, columns())]
    sampled = {name: row for name, row in table.items() if None not in row[uncertainty_columns()[0].title]}
    if sampled:
        parts.append(markdown_table(sampled, uncertainty_columns()))
    return "\n\n".join(parts)


def markdown_table(table: dict[str, Any], given: Sequence[Column[MethodResult]]) -> str:
    """A table of some columns."""
    shown = [c for c in given if any(None not in row[c.title] for row in table.values())]
    titles = [f"{c.title} [{c.unit}]" if c.unit else c.title for c in shown]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row in table.values():
        cells = [
            mean_and_error([c.scale * v for v in row[c.title]], c.decimals) if None not in row[c.title] else "–"
            for c in shown
        ]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float], decimals: int) -> str:
    """Mean ± standard error; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{decimals}f}"


def main() -> None:
    config = read_config(StudyConfig, "Score predictives of trained networks over several seeds.")
    try:
        check_study(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        results = [calibrate_seed(config, seed) for seed in config.seeds]
    except InputError as error:
        sys.exit(f"error: {error}")
    table = collect(results)
    print(as_markdown(table))
    write_result(
        config, config.train.name, {"data": results[0].data, "environment": results[0].environment, "methods": table}
    )


if __name__ == "__main__":
    main()
