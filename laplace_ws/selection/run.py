"""A comparison of models: candidates trained or loaded, then ranked by log marginal likelihood."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from laplace_ws.data import ImageData
from laplace_ws.experiment.config import ModelConfig, RunConfig, read_config
from laplace_ws.experiment.environment import environment_record
from laplace_ws.experiment.folder import (
    PARTIAL,
    ExperimentError,
    Task,
    check_foreign,
    check_name,
    check_page,
    check_whole,
    make_writable,
    put_in_place,
    write_whole,
)
from laplace_ws.experiment.lock import sole_writer
from laplace_ws.experiment.records import SUMMARY, read_run
from laplace_ws.experiment.run import (
    device_of,
    explained,
    load_data,
    make_model,
    run_experiment,
)
from laplace_ws.experiment.training import check_config, check_training
from laplace_ws.experiment.workers import side_by_side
from laplace_ws.marglik.checkpoint import CheckpointError, check_settings
from laplace_ws.marglik.schedule import TrainingDiverged
from laplace_ws.selection.comparable import check_comparable, yardstick
from laplace_ws.selection.config import Candidate, SelectConfig, check_candidates
from laplace_ws.selection.ranking import PAGE, SELECTION, Entry, Selection, correlate, ranked

_TUNED = Task("tuned")


@dataclass(frozen=True)
class Member:
    """A candidate with its run.

    Attributes:
        name: of the candidate.
        run: its configuration.
        folder: of the run.
        is_trained: whether the comparison trains it, rather than loading it.
        n_train, n_test: numbers of examples of a loaded run.
    """

    name: str
    run: RunConfig
    folder: Path
    is_trained: bool = True
    n_train: int | None = None
    n_test: int | None = None


def run_selection(config: SelectConfig, *, resume: bool = False, overwrite: bool = False) -> Selection:
    """Train the candidates that need it, and rank all of them; writes select.json into the comparison's folder.

    Data, models and folders are checked before training starts. A candidate whose training diverges is left out of the
    ranking, and the reason is kept.

    Args:
        config: The comparison.
        resume: Keep the candidates that have finished, and continue with the others.
        overwrite: Replace a comparison of the same name when this one has finished.

    Raises:
        ExperimentError: something does not allow the comparison, such as candidates that are not on one scale, or a run
            to load that has not finished.
    """
    start = time.perf_counter()
    with explained(ValueError, OSError):
        check_name(config.name)
        if config.workers < 1:
            raise ValueError(f"workers={config.workers} must be at least 1")
        check_candidates(config.candidates)
        members = [find(config, candidate) for candidate in config.candidates]
        data = load_data(members[0].run)
        check_members(members, data)
        make_writable(config.folder, "--out or --name")
    with sole_writer(config.folder):
        partial = config.folder / PARTIAL
        with explained(OSError, CheckpointError):
            if (partial / SELECTION).exists():
                put_comparison_in_place(partial, config.folder)
            work = working_folder(config, members, resume, overwrite)
            members = [replace(m, folder=work / m.name) if m.is_trained else m for m in members]
            to_train = [m for m in members if m.is_trained and not (resume and is_finished(m))]
            for member in to_train:
                check_foreign(config.folder / member.name, [_TUNED])
                make_writable(member.folder, "--out or --name")
        with explained(BrokenProcessPool):
            failed = train(to_train, config.workers, resume)
        entries: list[Entry] = []
        for member in members:
            if member.name not in failed:
                entry = read_entry(member, data)
                if math.isfinite(entry.log_marginal_likelihood) and math.isfinite(entry.test_nll):
                    folder = config.folder / member.name if member.is_trained else member.folder
                    entries.append(replace(entry, folder=folder.as_posix()))
                else:
                    failed[member.name] = "its log marginal likelihood or its test NLL is not finite"
        selection = Selection(
            name=config.name,
            config=asdict(config),
            environment=environment_record(
                threads=config.threads, device=device_of(members[0].run), workers=config.workers
            ),
            data={"name": data.name, "n_train": len(data.y_train), "n_test": len(data.y_test)},
            ranking=ranked(entries),
            correlation=correlate(entries),
            failed=failed,
            total_seconds=time.perf_counter() - start,
        )
        write_whole(work / SELECTION, selection.to_json())
        if work != config.folder:
            put_comparison_in_place(work, config.folder)
    return selection


def find(config: SelectConfig, candidate: Candidate) -> Member:
    """A candidate's run: the one that will be trained, or the one that it names."""
    if candidate.run is None:
        run = config.run_config(candidate)
        return Member(candidate.name, run, Path(run.out) / run.name)
    folder = Path(candidate.run)
    check_whole(folder)
    found = read_run(folder)
    with named(candidate.name):
        run = replace(read_config(found.config), device=config.device)
    return Member(candidate.name, run, folder, False, found.data.n_train, found.data.n_test)


def check_members(members: Sequence[Member], data: ImageData) -> None:
    """Reject candidates that are not on one scale, or whose training could not start."""
    n_train, n_test = len(data.y_train), len(data.y_test)
    runs = {member.name: member.run for member in members}
    yardsticks = {m.name: yardstick(m.run, m.n_train or n_train, m.n_test or n_test) for m in members}
    check_comparable(yardsticks, runs)
    for member in members:
        if member.is_trained:
            with named(member.name):
                check_config(member.run, [_TUNED])
                check_training(member.run, make_model(member.run, data), data)


@contextmanager
def named(candidate: str) -> Iterator[None]:
    """Say which candidate is rejected."""
    try:
        yield
    except ValueError as error:
        raise ExperimentError(f"candidate '{candidate}': {error}") from error


def working_folder(config: SelectConfig, members: Sequence[Member], resume: bool, overwrite: bool) -> Path:
    """Where the comparison works until it has finished: its own folder, or `run.partial` in it where it will replace another.

    Raises:
        ExperimentError: a comparison is there that may not be replaced, or a page of somebody else.
    """
    folder, partial = config.folder, config.folder / PARTIAL
    check_page(folder / PAGE)
    if resume and partial.exists():  # also before its first checkpoint
        return partial
    if _has_begun(partial, members):
        raise ExperimentError(
            f"'{partial}' holds an unfinished comparison that is to replace the one in '{folder}'; go on with it by --resume, or "
            f"remove '{partial}'"
        )
    if resume or not ((folder / SELECTION).exists() or _has_begun(folder, members)):
        return folder
    if overwrite:
        return partial
    state = "a finished" if (folder / SELECTION).exists() else "an unfinished"
    raise ExperimentError(
        f"'{folder}' holds {state} comparison; go on with it by --resume, choose another --name, or replace it at the end of this one "
        "by --overwrite"
    )


def _has_begun(folder: Path, members: Sequence[Member]) -> bool:
    names = (_TUNED.checkpoint, SUMMARY)
    return any((folder / member.name / name).exists() for member in members if member.is_trained for name in names)


def put_comparison_in_place(partial: Path, folder: Path) -> None:
    """Replace the comparison in `folder` by the finished one in `partial`; where this is cut off, it can be done again.

    Runs of candidates that are not in the new one stay.
    """
    for name in (SELECTION, PAGE):
        (folder / name).unlink(missing_ok=True)
    for path in partial.iterdir():
        if (path / SUMMARY).exists():
            (folder / path.name).mkdir(exist_ok=True)
            put_in_place(path, folder / path.name)
        elif path.is_dir():  # it diverged
            shutil.rmtree(path)
    os.replace(partial / SELECTION, folder / SELECTION)
    partial.rmdir()


def is_finished(member: Member) -> bool:
    """Whether a candidate was trained to its end.

    Raises:
        CheckpointError: it was, under other settings.
    """
    path = member.folder / SUMMARY
    if not path.exists():
        return False
    check_settings(path, dict(read_run(member.folder).config), member.run.settings())
    return True


def train(members: Sequence[Member], n_workers: int, resume: bool) -> dict[str, str]:
    """Train candidates one after another or in parallel; returns, by name, why those that diverged did so."""
    diverged = {}
    with tqdm(total=len(members), unit="candidate", disable=None) as bar:
        calls = [(replace(member.run, out=str(member.folder.parent)), resume) for member in members]
        reasons = side_by_side(train_candidate, calls, n_workers)
        for member, reason in zip(members, reasons, strict=True):
            if reason is not None:
                diverged[member.name] = reason
            bar.update()
    return diverged


def train_candidate(run: RunConfig, resume: bool) -> str | None:
    """Train one candidate into its run folder; returns why it diverged, if it did."""
    try:
        run_experiment(run, resume=resume)
    except TrainingDiverged as error:
        return str(error)
    return None


def read_entry(member: Member, data: ImageData) -> Entry:
    """The results of a run that has finished; those that it lacks are NaN."""
    model = read_run(member.folder).tuned
    weights = [p for p in make_model(member.run, data).parameters() if p.requires_grad]

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Entry(
        name=member.name,
        architecture=architecture(member.run.model),
        n_weights=sum(weight.numel() for weight in weights),
        log_marginal_likelihood=number(model.log_marginal_likelihood),
        test_nll=number(model.test_nll),
        test_accuracy=number(model.test_accuracy),
        train_seconds=number(model.train_seconds),
        folder=member.folder.as_posix(),
    )


def architecture(model: ModelConfig) -> str:
    """A model in words: "mlp hidden=[100, 50] activation=tanh"."""
    options = {key: value for key, value in asdict(model).items() if key != "name" and value is not None}
    return " ".join([model.name, *(f"{key}={value}" for key, value in options.items())])
