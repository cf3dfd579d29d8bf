"""A run of the command line: a tuned network and its baselines, trained side by side into one folder."""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laplace_ws._version import __version__
from laplace_ws.data import ImageData, load_dataset
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.experiment.config import ModelConfig, RunConfig
from laplace_ws.experiment.evaluate import epoch_logger, figures
from laplace_ws.experiment.folder import (
    METRICS,
    SUMMARY,
    ExperimentError,
    Json,
    Task,
    prepare_folder,
    write_metrics,
    write_whole,
)
from laplace_ws.experiment.training import check_config, check_training, train_loader, training_options
from laplace_ws.marglik import CheckpointError, TrainingDiverged, marglik_training
from laplace_ws.marglik.result import Record
from laplace_ws.models import build_model

FORMAT_VERSION = 1
_stop: Event | None = None


@dataclass(frozen=True)
class Outcome:
    """What training one network gave: its entry of summary.json, and one record per epoch."""

    model: Json
    history: list[Record]


def run_experiment(config: RunConfig, *, resume: bool = False) -> tuple[Path, Json]:
    """Train everything that `config` asks for; returns the run folder and what its summary.json says.

    The folder, the data and the model are tried before training starts.

    Raises:
        ExperimentError: something does not allow the run.
        TrainingDiverged: a loss became NaN or infinite; checkpoints are kept.
    """
    start = time.perf_counter()
    folder = Path(config.out) / config.name
    tasks = [Task("tuned"), *(Task(f"fixed-{delta:g}", delta) for delta in config.baselines.fixed_prior_precisions)]
    with explained(ValueError, OSError, CheckpointError):
        check_config(config, tasks)
        data = load_data(config)
        check_training(config, make_model(config, data), data)
        prepare_folder(folder, config, tasks, resume)
    with explained(UnsupportedParameterError, InvalidBatchError, CheckpointError, BrokenProcessPool):
        outcomes = train_all(config, tasks, folder, data, resume)
    summary = {
        "name": config.name,
        "format_version": FORMAT_VERSION,
        "config": asdict(config),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "laplace_ws": __version__,
            "threads": config.threads,
            "device": str(device_of(config)),
        },
        "data": {"name": data.name, "n_train": len(data.y_train), "n_test": len(data.y_test)},
        "total_seconds": time.perf_counter() - start,
        "tuned": outcomes[0].model,
        "fixed": {
            task.run.removeprefix("fixed-"): outcome.model
            for task, outcome in zip(tasks[1:], outcomes[1:], strict=True)
        },
    }
    write_metrics(folder, [outcome.history for outcome in outcomes])
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return folder, summary


@contextmanager
def explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn the errors that a user can mend into an `ExperimentError`."""
    try:
        yield
    except errors as error:
        raise ExperimentError(str(error)) from error


def device_of(config: RunConfig) -> torch.device:
    """Where to train."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def load_data(config: RunConfig) -> ImageData:
    """The images, on the training device."""
    d = config.data
    return load_dataset(
        d.name,
        root=d.root,
        download=d.download,
        n_train=d.n_train,
        n_test=d.n_test,
        held_out=d.held_out,
        seed=config.seed,
        device=device_of(config),
    )


def make_model(config: RunConfig, data: ImageData) -> nn.Module:
    """The network, initialised by the run's seed."""
    channels, height, width = data.image_shape
    options = {
        key: getattr(config.model, key)
        for key in ModelConfig.__dataclass_fields__
        if key != "name" and getattr(config.model, key) is not None
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(
            config.model.name, in_channels=channels, image_size=(height, width), n_classes=data.n_classes, **options
        )
    # On a CPU, convolutions run half as fast again on weights that lie channel by channel.
    return model.to(device_of(config)).to(memory_format=torch.channels_last)


def train_all(config: RunConfig, tasks: Sequence[Task], folder: Path, data: ImageData, resume: bool) -> list[Outcome]:
    """Train one network per task, in order or side by side; the numbers are the same."""
    if config.workers == 1 or len(tasks) == 1:
        return [train_one(config, task, folder, resume, True, data) for task in tasks]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    n_workers = min(config.workers, len(tasks))
    executor = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_listen_to, initargs=(stop,))
    try:
        futures = [
            executor.submit(_train_unless_stopped, config, task, folder, resume, task.prior_precision is None)
            for task in tasks
        ]
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _listen_to(stop: Event) -> None:
    """Remember, in a worker, by which event all of them stop."""
    global _stop
    _stop = stop


def _train_unless_stopped(*arguments: Any) -> Outcome:
    """`train_one` in a worker; an interrupt of one worker keeps the others from what the executor has queued for them."""
    assert _stop is not None
    if _stop.is_set():
        raise KeyboardInterrupt
    try:
        return train_one(*arguments)
    except BaseException:
        _stop.set()
        raise


def train_one(
    config: RunConfig, task: Task, folder: Path, resume: bool, progress_bar: bool, data: ImageData | None = None
) -> Outcome:
    """Train one network, from data and seed to its figures; the same in a process of its own."""
    data = load_data(config) if data is None else data
    model = make_model(config, data)
    schedule, options = training_options(config, task)
    with torch_settings(config.threads, config.seed), named_in_errors(task.run):
        result = marglik_training(
            model,
            train_loader(config, data),
            config.likelihood,
            **vars(schedule),
            **vars(options),
            checkpoint_path=folder / task.checkpoint,
            resume=resume,
            on_epoch=epoch_logger(config, task.run, model, data, folder / METRICS),
            progress_bar=progress_bar,
        )
        return Outcome(figures(result, data), result.history)


@contextmanager
def named_in_errors(run: str) -> Iterator[None]:
    """Say which of the networks diverged."""
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{run}: {error.what}", error.epoch, error.checkpoint_path) from None


@contextmanager
def torch_settings(threads: int, seed: int) -> Iterator[None]:
    """Number of threads and global seed for a while."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads_before)
