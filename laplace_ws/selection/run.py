"""A comparison of models: candidates trained or loaded, then ranked by a criterion."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

from laplace_ws.distributed import n_started
from laplace_ws.experiment.environment import environment_record
from laplace_ws.experiment.folder import (
    PARTIAL,
    ExperimentError,
    check_foreign,
    check_name,
    check_page,
    make_writable,
    put_in_place,
    write_whole,
)
from laplace_ws.experiment.lock import sole_writer
from laplace_ws.experiment.records import SUMMARY
from laplace_ws.experiment.run import device_of, explained, load_data
from laplace_ws.marglik.checkpoint import CheckpointError
from laplace_ws.selection.config import CRITERIA_FOLDER, SelectConfig, check_candidates, check_criteria
from laplace_ws.selection.jobs import Job, do_all
from laplace_ws.selection.members import Member, check_members, find, is_finished, read_entry
from laplace_ws.selection.networks import TUNED
from laplace_ws.selection.ranking import PAGE, SELECTION, Selection, correlate_all, ranked


def run_selection(config: SelectConfig, *, resume: bool = False, overwrite: bool = False) -> Selection:
    """Train the candidates that need it, and rank all of them; writes select.json into the comparison's folder.

    Data, models, criteria and folders are checked before training starts. A candidate whose training diverges is left out of the
    ranking, and the reason is kept.

    Args:
        config: The comparison.
        resume: Keep the candidates that have finished, with the criteria that are known of them, and continue with the others.
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
        if (n := n_started()) > 1:
            raise ValueError(
                f"{n} processes were started, but candidates are trained side by side by processes of the command's own; start it once, "
                f"with --workers {n}"
            )
        check_candidates(config.candidates)
        check_criteria(config)
        members = [find(config, candidate) for candidate in config.candidates]
        data = load_data(members[0].run)
        check_members(config, members, data)
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
                check_foreign(config.folder / member.name, [TUNED])
                make_writable(member.folder, "--out or --name")
        jobs = [job_of(config, member, work, trains=member in to_train, resume=resume) for member in members]
        with explained(BrokenProcessPool, CheckpointError):
            outcomes = list(zip(members, do_all(jobs, config.workers), strict=True))
        entries = [
            replace(read_entry(member, data, scores), folder=final_folder(config, member).as_posix())
            for member, scores in outcomes
            if not isinstance(scores, str)
        ]
        selection = Selection(
            name=config.name,
            config=asdict(config),
            environment=environment_record(
                threads=config.threads, device=device_of(members[0].run), workers=config.workers
            ),
            data={"name": data.name, "n_train": len(data.y_train), "n_test": len(data.y_test)},
            rank_by=config.ranked_by,
            ranking=ranked(entries, config.ranked_by),
            correlations=correlate_all(entries, config.criteria),
            failed={member.name: reason for member, reason in outcomes if isinstance(reason, str)},
            total_seconds=time.perf_counter() - start,
        )
        write_whole(work / SELECTION, selection.to_json())
        if work != config.folder:
            put_comparison_in_place(work, config.folder)
    return selection


def job_of(config: SelectConfig, member: Member, work: Path, *, trains: bool, resume: bool) -> Job:
    """What is to be done for a candidate, in the folder in which the comparison works."""
    criteria = tuple(sorted(config.criteria, key=lambda name: name != config.ranked_by))
    scratch = work / CRITERIA_FOLDER / member.name
    return Job(member, trains, resume, criteria, config.split, scratch, config.threads)


def final_folder(config: SelectConfig, member: Member) -> Path:
    """Where a candidate's run lies at the end."""
    return config.folder / member.name if member.is_trained else member.folder


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
    names = (TUNED.checkpoint, SUMMARY)
    return any((folder / member.name / name).exists() for member in members if member.is_trained for name in names)


def put_comparison_in_place(partial: Path, folder: Path) -> None:
    """Replace the comparison in `folder` by the finished one in `partial`; where this is cut off, it can be done again.

    Runs of candidates that are not in the new one stay, without their criteria.
    """
    for name in (SELECTION, PAGE):
        (folder / name).unlink(missing_ok=True)
    if (partial / CRITERIA_FOLDER).exists():
        shutil.rmtree(folder / CRITERIA_FOLDER, ignore_errors=True)
        os.replace(partial / CRITERIA_FOLDER, folder / CRITERIA_FOLDER)
    for path in partial.iterdir():
        if (path / SUMMARY).exists():
            (folder / path.name).mkdir(exist_ok=True)
            put_in_place(path, folder / path.name)
        elif path.is_dir():  # it diverged
            shutil.rmtree(path)
    os.replace(partial / SELECTION, folder / SELECTION)
    partial.rmdir()
