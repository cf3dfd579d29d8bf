"""The folder of a run: what is written into it, and when that is allowed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laplace_ws.experiment.config import ExperimentError, RunConfig
from laplace_ws.experiment.records import METRICS, SUMMARY, TUNED, ModelResult, RunResult
from laplace_ws.marglik.checkpoint import check_settings, load_training
from laplace_ws.marglik.trainer import Record
from laplace_ws.options import config_keys, flatten
from laplace_ws.tables import Column, as_text

CONFIG = "config.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One network to train.

    Attributes:
        run: "tuned", or "fixed-" and the prior precision.
        prior_precision: fixed; None where it is tuned.
    """

    run: str
    prior_precision: float | None = None

    @property
    def checkpoint(self) -> str:
        """Name of its checkpoint in the run folder."""
        return "checkpoint.pt" if self.prior_precision is None else f"checkpoint-{self.run}.pt"


def make_writable(folder: Path, options: str) -> None:
    """Make a folder and write into it, so that what could fail at the end fails now.

    Args:
        folder: where results will go.
        options: the options that set it, for the message.

    Raises:
        ExperimentError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"laplace_ws")
    except OSError as error:
        raise ExperimentError(
            f"the folder '{folder}' cannot be written ({error.strerror}); set another with {options}"
        ) from error


def prepare_folder(folder: Path, config: RunConfig, tasks: Sequence[Task], resume: bool) -> None:
    """Make the run folder and write into it, so that what could fail at the end fails now.

    A finished run of the same name is replaced; an unfinished one can only be resumed.
    """
    flat = flatten(config.settings(), config_keys(RunConfig))
    settings = {key: value for key, value in flat.items() if not any(k.startswith(f"{key}.") for k in flat)}
    make_writable(folder, "--out or --name")
    checkpoints = [folder / task.checkpoint for task in tasks]
    begun = [path for path in checkpoints if path.exists()]
    if resume:
        if (folder / CONFIG).exists():
            check_settings(folder / CONFIG, json.loads((folder / CONFIG).read_text()), settings)
        histories = [load_training(path)["progress"]["history"] for path in begun]
        write_metrics(folder, histories)
    else:
        if begun and not (folder / SUMMARY).exists():
            raise ExperimentError(
                f"'{folder}' holds an unfinished run; go on with it by --resume, choose another --name, "
                "or remove the folder"
            )
        for path in [*folder.glob("checkpoint*.pt"), folder / SUMMARY, folder / "report.html"]:
            path.unlink(missing_ok=True)
        write_metrics(folder, [])
    write_whole(folder / CONFIG, json.dumps(settings, indent=2) + "\n")


def write_metrics(folder: Path, histories: Sequence[Sequence[Record]]) -> None:
    """Write the metrics file anew, network by network."""
    lines = [json.dumps(record) + "\n" for history in histories for record in history]
    write_whole(folder / METRICS, "".join(lines))


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: at every moment it is the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def summary_table(result: RunResult) -> str:
    """The main results as text, one line per network."""
    models = {TUNED: result.tuned, **{f"fixed {delta}": model for delta, model in result.fixed.items()}}
    return as_text(_COLUMNS, list(models.items()))


_COLUMNS: tuple[Column[tuple[str, ModelResult]], ...] = (
    Column("", "", lambda row: row[0]),
    Column("log marglik", "nats", lambda row: row[1].log_marginal_likelihood, 1),
    Column("test NLL", "nats", lambda row: row[1].test_nll, 4),
    Column("test acc.", "%", lambda row: row[1].test_accuracy, 1, scale=100.0),
    Column("test ECE", "%", lambda row: row[1].test_ece, 1, scale=100.0),
    Column("time", "s", lambda row: row[1].train_seconds, 1),
    Column("curvature", "s", lambda row: row[1].curvature_seconds, 1),
)
