"""How far the probabilities of a network can be trusted, by the way they are made, over several seeds.

    python experiments/calibrate.py --config configs/calibrate.yaml

Trains a network for each seed (other images, initialisation and order of batches) and scores it as `laplace-ws calibrate` does: MAP,
temperature scaling and Laplace posteriors, on test images, on damaged ones, and in telling images of other things from them. Prints mean
and standard error over the seeds, and writes the figures of every seed as JSON; the page of each seed lies in its run folder.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from study import read_config, write_result

from laplace_ws.calibration import (
    CalibrateConfig,
    CalibrationDataConfig,
    CalibrationResult,
    MethodsConfig,
    run_calibration,
)
from laplace_ws.calibration import write_result as write_calibration
from laplace_ws.calibration.table import columns
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.run import run_experiment
from laplace_ws.report.calibration_page import write_calibration_report


@dataclass(frozen=True)
class StudyConfig:
    """What is trained and scored.

    Attributes:
        seeds: one network each.
        train: the training run; name and seed are completed by the seed.
        data: see `CalibrateConfig`.
        methods: see `CalibrateConfig`.
        n_bins: see `CalibrateConfig`.
        ood_score: see `CalibrateConfig`.
        out: folder of the results.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: RunConfig = field(default_factory=RunConfig)
    data: CalibrationDataConfig = field(default_factory=CalibrationDataConfig)
    methods: MethodsConfig = field(default_factory=MethodsConfig)
    n_bins: int = 15
    ood_score: str = "confidence"
    out: str = "runs"


def calibrate_seed(config: StudyConfig, seed: int) -> CalibrationResult:
    """Train and score one network."""
    run = dataclasses.replace(config.train, name=f"{config.train.name}-seed{seed}", seed=seed, report=False)
    folder, _ = run_experiment(run)
    result = run_calibration(
        CalibrateConfig(
            checkpoint=str(folder),
            seed=seed,
            device=run.device,
            threads=run.threads,
            n_bins=config.n_bins,
            ood_score=config.ood_score,
            data=config.data,
            methods=config.methods,
        )
    )
    write_calibration(result, folder)
    write_calibration_report(result, folder)
    return result


def collect(results: Sequence[CalibrationResult]) -> dict[str, Any]:
    """By method, every figure of the table as a list with one entry a seed, and the scores on damaged images likewise."""
    table: dict[str, Any] = {}
    for methods in zip(*(result.methods for result in results), strict=True):
        row: dict[str, Any] = {"label": methods[0].label}
        row |= {column.title: [column.value(method) for method in methods] for column in columns()}
        row["corrupted"] = [
            {"corruption": entries[0].corruption, "strength": entries[0].strength}
            | {score: [entry.scores[score] for entry in entries] for score in entries[0].scores}
            for entries in zip(*(method.corrupted for method in methods), strict=True)
        ]
        table[methods[0].name] = row
    return table


def as_markdown(table: dict[str, Any]) -> str:
    """Mean ± standard error over the seeds; figures that no method has are left out."""
    shown = [c for c in columns() if any(None not in row[c.title] for row in table.values())]
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
    results = [calibrate_seed(config, seed) for seed in config.seeds]
    table = collect(results)
    print(as_markdown(table))
    write_result(
        config, config.train.name, {"data": results[0].data, "environment": results[0].environment, "methods": table}
    )


if __name__ == "__main__":
    main()
