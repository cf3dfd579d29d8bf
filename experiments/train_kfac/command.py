"""The study: trials, then every budget with every seed, then the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from study import read_config

from train_kfac.config import Contestant, TrainKfacConfig
from train_kfac.summary import write_report
from train_kfac.tasks import Task, make_task
from train_kfac.training import Job, Record, read, run


def main(description: str | None) -> None:
    """Read the configuration, train what has no record yet, and write the report of what is there."""
    config = read_config(TrainKfacConfig, description)
    torch.set_num_threads(config.threads)
    if not config.report_only:
        train(config)
    write_report(config, reported(config), Path(config.out) / config.data.task)


def folder_of(config: TrainKfacConfig) -> Path:
    """Where the records are."""
    return Path(config.out) / config.data.task / "records"


def train(config: TrainKfacConfig) -> None:
    """Run this process's share of the trainings that have no record yet."""
    task = make_task(config.data)
    _run_own(config, [job for name in config.contestants for job in trials(config, name)], task)
    first, waiting = 0, {}
    for name, contestant in config.contestants.items():
        waiting[name] = first
        first += len(contestant.budgets) * len(config.seeds)
    while ready := {name: best for name in waiting if (best := best_trial(config, name)) is not None}:
        for name, best in ready.items():
            _run_own(config, final_jobs(config, name, best), task, waiting.pop(name))
    for name in waiting:
        print(f"{name}: other processes have trials to run; start this one again when they have", flush=True)


def _run_own(config: TrainKfacConfig, jobs: list[Job], task: Task, first: int = 0) -> None:
    """Run those of the jobs, which are numbered from `first`, that are this process's and have no record."""
    own, of = map(int, config.share.split("/"))
    for number, job in enumerate(jobs, first):
        if number % of == own and read(job, folder_of(config)) is None:
            record = run(job, task, config.device, folder_of(config))
            print(
                f"{job.contestant} {job.options} {job.n_steps} steps, seed {job.seed}: {job.part} {record.score:.3f} in "
                f"{record.cpu_seconds:.0f} CPU seconds",
                flush=True,
            )


def trials(config: TrainKfacConfig, name: str) -> list[Job]:
    """The trials of a contestant, unless there is nothing to choose."""
    contestant = config.contestants[name]
    if len(contestant.trials) == 1:
        return []
    n_steps = round(contestant.tuned_at * config.horizon)
    return [_job(config, name, trial, n_steps, config.tuning_seed, "validation") for trial in contestant.trials]


def best_trial(config: TrainKfacConfig, name: str) -> dict | None:
    """Options of the trial with the lowest validation score, or of the only one; None until all have been run."""
    jobs = trials(config, name)
    if not jobs:
        return config.contestants[name].trials[0]
    records = [read(job, folder_of(config)) for job in jobs]
    scores = [record.score for record in records if record is not None]
    if len(scores) < len(jobs):
        return None
    return config.contestants[name].trials[scores.index(min(scores))]


def final_jobs(config: TrainKfacConfig, name: str, trial: dict) -> list[Job]:
    """Every budget with every seed."""
    steps = [round(share * config.horizon) for share in config.contestants[name].budgets]
    return [_job(config, name, trial, n_steps, seed, "test") for n_steps in steps for seed in config.seeds]


def _job(config: TrainKfacConfig, name: str, trial: dict, n_steps: int, seed: int, part: str) -> Job:
    contestant: Contestant = config.contestants[name]
    return Job(
        contestant=name,
        optimizer=contestant.optimizer,
        options={**contestant.options, **trial},
        n_steps=n_steps,
        seed=seed,
        part=part,
        batch_size=contestant.batch_size or config.batch_size,
        warmup=config.warmup,
        model=config.model,
        data={key: value for key, value in asdict(config.data).items() if key not in ("root", "cache")},
    )


def reported(config: TrainKfacConfig) -> Iterator[tuple[str, dict, int, list[Record]]]:
    """By contestant and budget: name, options of the best trial, steps, and the records of the seeds so far."""
    for name in config.contestants:
        best = best_trial(config, name)
        if best is None:
            continue
        by_steps: dict[int, list[Record]] = {}
        for job in final_jobs(config, name, best):
            record = read(job, folder_of(config))
            if record is not None:
                by_steps.setdefault(job.n_steps, []).append(record)
        for n_steps, records in by_steps.items():
            yield name, best, n_steps, records
