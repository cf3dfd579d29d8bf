"""The folder of a run: what is written into it, and when that is allowed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from laplace_ws.experiment.config import ExperimentError, RunConfig
from laplace_ws.experiment.lock import LOCK
from laplace_ws.experiment.records import FIXED, METRICS, SUMMARY, TUNED, ModelResult, RunResult
from laplace_ws.files import replacing
from laplace_ws.marglik.checkpoint import check_settings, load_training
from laplace_ws.marglik.trainer import Record
from laplace_ws.options import config_keys, flatten
from laplace_ws.tables import Column, as_text

CONFIG, PAGE, PARTIAL = "config.json", "report.html", "run.partial"
SAFE_TO_CHANGE = ("marglik.lr", "marglik.max_grad_norm", "marglik.lr_hyp", "marglik.max_log_step")
"""Settings with which a run may go on at other values after a training has diverged, as in `laplace_ws.marglik.checkpoint`."""
PAGE_MARK = '<meta name="generator" content="laplace_ws">'
"""What tells a page of ours from others."""
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


def check_name(name: str, option: str = "--name") -> None:
    """Refuse a name that does not name a folder of its own below the one it is to be in.

    Raises:
        ExperimentError: it is empty, absolute, or leads out.
    """
    path = PurePath(name)
    leads_out = path.is_absolute() or path.drive or ".." in path.parts or not path.parts
    if leads_out or "\0" in name or name != name.strip():
        raise ExperimentError(
            f"{option} {name!r} does not name a folder of its own; give a name such as 'run', or 'group/run'"
        )


def tasks_of(fixed_prior_precisions: Iterable[float]) -> list[Task]:
    """The networks of a run: the tuned one, and its baselines."""
    return [Task(TUNED), *(Task(f"{FIXED}{delta:g}", delta) for delta in fixed_prior_precisions)]


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


def check_free(path: Path, what: str, overwrite: bool) -> None:
    """Refuse to replace a result without being told to.

    Args:
        path: of the result.
        what: it is, as in "a calibration".
        overwrite: whether it may be replaced.

    Raises:
        ExperimentError: it is there.
    """
    if path.exists() and not overwrite:
        raise ExperimentError(
            f"'{path.parent}' holds {what} already, '{path.name}'; choose another folder, or replace it by --overwrite"
        )


def check_page(path: Path) -> None:
    """Refuse to replace a page that is none of ours.

    Raises:
        ExperimentError: somebody else put it there.
    """
    if path.exists() and PAGE_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ExperimentError(
            f"'{path}' was not written by this version of laplace_ws and would be replaced; move it elsewhere first"
        )


def prepare_folder(folder: Path, config: RunConfig, tasks: Sequence[Task], resume: bool, overwrite: bool) -> Path:
    """Find or make the folder in which a run works until it has finished, and write its settings there.

    That is the run folder itself where it is new, or was begun there; `folder/run.partial` where the run will replace another.

    Raises:
        ExperimentError: a run is there that may not be replaced, or a file of somebody else is in the way.
        CheckpointError: the run to be resumed has other settings.
    """
    flat = flatten(config.settings(), config_keys(RunConfig))
    settings = {key: value for key, value in flat.items() if not any(k.startswith(f"{key}.") for k in flat)}
    partial = folder / PARTIAL
    begun = _begun(folder, tasks)
    if resume and (partial / CONFIG).exists():  # also before its first checkpoint
        work = partial
    elif _begun(partial, tasks):
        raise ExperimentError(
            f"'{partial}' holds an unfinished run that is to replace the one in '{folder}'; go on with it by --resume, or "
            f"remove '{partial}'"
        )
    elif resume or not (begun or (folder / SUMMARY).exists()):
        work = folder
    elif overwrite:
        work = partial
    elif begun and not (folder / SUMMARY).exists():
        raise ExperimentError(
            f"'{folder}' holds an unfinished run; go on with it by --resume, choose another --name, or replace it at the end of this "
            "one by --overwrite"
        )
    else:
        raise ExperimentError(
            f"'{folder}' holds a finished run; choose another --name, or replace it at the end of this one by --overwrite"
        )
    check_foreign(folder, tasks)
    make_writable(work, "--out or --name")
    states = [load_training(path) for path in _begun(work, tasks)] if resume else []
    if resume and (work / CONFIG).exists():
        may_differ = SAFE_TO_CHANGE if any(state.get("diverged", False) for state in states) else ()
        check_settings(work / CONFIG, stored_settings(work / CONFIG), settings, may_differ)
    if (work / SUMMARY).exists():
        return work
    write_metrics(work, [state["progress"]["history"] for state in states])
    write_whole(work / CONFIG, json.dumps(settings, indent=2) + "\n")
    return work


def _begun(folder: Path, tasks: Sequence[Task]) -> list[Path]:
    """The checkpoints of a run."""
    return [path for path in (folder / task.checkpoint for task in tasks) if path.exists()]


def check_foreign(folder: Path, tasks: Sequence[Task]) -> None:
    """Refuse to write a run where files of its names are none of ours.

    Raises:
        ExperimentError: names the file.
    """
    check_page(folder / PAGE)
    names = [CONFIG, METRICS, SUMMARY, *(task.checkpoint for task in tasks)]
    present = [name for name in names if (folder / name).exists()]
    if present and not is_run_folder(folder):
        raise ExperimentError(
            f"'{folder / present[0]}' belongs to no run, as no '{CONFIG}' of one is beside it; choose another --name, or move it elsewhere"
        )


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds the settings of a run."""
    try:
        return "marglik.n_epochs" in stored_settings(folder / CONFIG)
    except (OSError, ExperimentError):
        return False


def stored_settings(path: Path) -> Json:
    """The settings that a run wrote, by dotted keys.

    Raises:
        ExperimentError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ExperimentError(
            f"'{path}', the settings of the run, is damaged ({error}); remove the folder and train again"
        ) from error
    if not isinstance(settings, dict):
        raise ExperimentError(
            f"'{path}', the settings of the run, is damaged: no JSON object; remove the folder and train again"
        )
    return settings


def put_in_place(partial: Path, folder: Path) -> None:
    """Replace the run in `folder` by the finished one in `partial`; where this is cut off, it can be done again.

    At no moment does `folder` look finished while it holds files of both. Files that belong to neither run stay.
    """
    replaced = partial / "replaced"
    if (partial / CONFIG).exists():  # nothing has been moved into place yet
        replaced.mkdir(exist_ok=True)
        for name in (SUMMARY, CONFIG):
            if (folder / name).exists():
                os.replace(folder / name, replaced / name)
        for name in [*_checkpoints_named_in(replaced / CONFIG), PAGE]:
            (folder / name).unlink(missing_ok=True)
        os.replace(partial / CONFIG, folder / CONFIG)
    for path in partial.iterdir():
        if path.is_file() and path.name not in (SUMMARY, LOCK):
            os.replace(path, folder / path.name)
    shutil.rmtree(replaced, ignore_errors=True)
    (partial / LOCK).unlink(missing_ok=True)
    os.replace(partial / SUMMARY, folder / SUMMARY)
    partial.rmdir()


def _checkpoints_named_in(path: Path) -> list[str]:
    """Names of the checkpoints of the run with these settings."""
    fixed = stored_settings(path).get("baselines.fixed_prior_precisions", []) if path.exists() else []
    return [task.checkpoint for task in tasks_of(fixed)]


def check_whole(folder: Path) -> None:
    """Refuse to read a run that is just being replaced.

    Raises:
        ExperimentError: the replacement was cut off.
    """
    if (folder / PARTIAL / SUMMARY).exists():
        raise ExperimentError(
            f"the run in '{folder}' was about to be replaced when that was cut off; complete it by the same command with --resume"
        )


def write_metrics(folder: Path, histories: Sequence[Sequence[Record]]) -> None:
    """Write the metrics file anew, network by network."""
    lines = [json.dumps(record) + "\n" for history in histories for record in history]
    write_whole(folder / METRICS, "".join(lines))


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: at every moment it is the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    with replacing(path) as file:
        file.write(text.encode())


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
