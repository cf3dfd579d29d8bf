"""A run of the command line: a tuned network and its baselines, trained side by side into one folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from laplace_ws.data import ImageData, load_dataset, part_of
from laplace_ws.distributed import ProcessError, group_of_torchrun
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.experiment.config import ModelConfig, RunConfig
from laplace_ws.experiment.environment import environment_record
from laplace_ws.experiment.evaluate import epoch_logger, model_result
from laplace_ws.experiment.factories import own_data, own_model
from laplace_ws.experiment.folder import (
    PARTIAL,
    ExperimentError,
    Task,
    check_name,
    make_writable,
    prepare_folder,
    put_in_place,
    tasks_of,
    write_metrics,
    write_whole,
)
from laplace_ws.experiment.lock import sole_writer
from laplace_ws.experiment.records import FIXED, METRICS, SUMMARY, DataFacts, ModelResult, RunResult, read_run
from laplace_ws.experiment.training import check_config, check_training, train_loader, training_options
from laplace_ws.experiment.workers import side_by_side
from laplace_ws.marglik import CheckpointError, TrainingDiverged, marglik_training
from laplace_ws.marglik.lines import has_terminal
from laplace_ws.marglik.result import Record
from laplace_ws.models import build_model


def run_experiment(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> tuple[Path, RunResult]:
    """Train everything that `config` asks for; returns the run folder and what its summary.json says.

    The data, the model and the folder are checked before anything is written.

    Args:
        config: the run.
        resume: go on from the run folder's checkpoints; a run that has finished is returned as it is.
        overwrite: replace a run of the same name when this one has finished.

    Raises:
        ExperimentError: something does not allow the run.
        TrainingDiverged: a loss became NaN or infinite; checkpoints are kept.
    """
    start = time.perf_counter()
    folder = config.folder
    tasks = tasks_of(config.baselines.fixed_prior_precisions)
    with group_of_torchrun(device_of(config)) as group:
        with explained(ValueError, OSError, CheckpointError):
            check_name(config.name)
            check_config(config, tasks)
            if group.size > 1 and config.workers > 1:
                raise ValueError(
                    f"workers={config.workers} is for one process, but there are {group.size}; set workers=1"
                )
            data = load_data(config)
            check_training(config, make_model(config, data), data)
            make_writable(folder, "--out or --name")
        with ExitStack() as stack:
            with explained(OSError, CheckpointError, ProcessError), group.together("the preparation of the run folder"):
                if group.is_first:
                    stack.enter_context(sole_writer(folder))
                work = group.gather(_prepared(config, tasks, resume, overwrite) if group.is_first else folder)[0]
            if (work / SUMMARY).exists():
                return folder, read_run(work)
            with explained(
                UnsupportedParameterError, InvalidBatchError, CheckpointError, BrokenProcessPool, ProcessError
            ):
                outcomes = train_all(config, tasks, work, data, resume)
            models = [model for model, _ in outcomes]
            result = RunResult(
                name=config.name,
                config=asdict(config),
                environment=environment_record(threads=config.threads, device=device_of(config)),
                data=DataFacts(name=data.name, n_train=len(data.y_train), n_test=len(data.y_test)),
                total_seconds=time.perf_counter() - start,
                tuned=models[0],
                fixed={task.run.removeprefix(FIXED): model for task, model in zip(tasks[1:], models[1:], strict=True)},
            )
            with group.together("the writing of the results"):
                if group.is_first:
                    write_metrics(work, [history for _, history in outcomes])
                    write_whole(work / SUMMARY, json.dumps(asdict(result), indent=2) + "\n")
                    if work != folder:
                        put_in_place(work, folder)
    return folder, result


def _prepared(config: RunConfig, tasks: Sequence[Task], resume: bool, overwrite: bool) -> Path:
    """The folder to work in, with what an interrupted replacement of a run has left put in order."""
    folder = config.folder
    if (folder / PARTIAL / SUMMARY).exists():
        put_in_place(folder / PARTIAL, folder)
    return prepare_folder(folder, config, tasks, resume, overwrite)


@contextmanager
def explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn the errors that a user can fix into an `ExperimentError`."""
    try:
        yield
    except errors as error:
        raise ExperimentError(str(error)) from error


def device_of(config: RunConfig) -> torch.device:
    """Where to train."""
    return chosen_device(config.device)


def chosen_device(name: str) -> torch.device:
    """The device that the option of a command names; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_data(config: RunConfig) -> ImageData:
    """The data, on the training device.

    Raises:
        ValueError: there are no such data, or what a factory returns does not fit together.
    """
    d = config.data
    if d.factory is not None:
        return part_of(
            own_data(d.factory, Path(d.root)),
            n_train=d.n_train,
            n_test=d.n_test,
            held_out=d.held_out,
            seed=config.data_seed,
            device=device_of(config),
        )
    return load_dataset(
        d.name,
        root=d.root,
        download=d.download,
        n_train=d.n_train,
        n_test=d.n_test,
        held_out=d.held_out,
        seed=config.data_seed,
        device=device_of(config),
    )


def make_model(config: RunConfig, data: ImageData) -> nn.Module:
    """The network, initialised by the run's seed.

    Raises:
        ValueError: there is no such network, or it does not take the options or the data.
    """
    name, factory = config.model.name, config.model.factory
    options = {
        key: getattr(config.model, key)
        for key in ModelConfig.__dataclass_fields__
        if key not in ("name", "factory") and getattr(config.model, key) is not None
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if factory is not None:
            model = own_model(factory, data, options)
        else:
            channels, height, width = image_shape_of(data, f"model.name={name}")
            model = build_model(
                name, in_channels=channels, image_size=(height, width), n_classes=data.n_classes, **options
            )
    # On a CPU, convolutions run one and a half times as fast on weights that lie channel by channel.
    return model.to(device_of(config)).to(memory_format=torch.channels_last)


def image_shape_of(data: ImageData, needs: str) -> tuple[int, int, int]:
    """Channels, height and width of the inputs, where they are images or, for a perceptron, vectors.

    Raises:
        ValueError: they are something else.
    """
    shape = tuple(data.x_train.shape[1:])
    if len(shape) == 1 and needs.endswith("=mlp"):
        return *shape, 1, 1
    if len(shape) != 3:
        raise ValueError(
            f"{needs} takes images [N, C, H, W], but the inputs are [N, {', '.join(map(str, shape))}]; give a model.factory."
        )
    return data.image_shape


def train_all(
    config: RunConfig, tasks: Sequence[Task], folder: Path, data: ImageData, resume: bool
) -> list[tuple[ModelResult, list[Record]]]:
    """Train one network per task, one after another or in parallel; the results are the same."""
    if config.workers == 1 or len(tasks) == 1:
        return [train_one(config, task, folder, resume, True, data) for task in tasks]
    calls = [(config, task, folder, resume, task.prior_precision is None) for task in tasks]
    return list(side_by_side(train_one, calls, config.workers, progress=True))


def train_one(
    config: RunConfig, task: Task, folder: Path, resume: bool, progress_bar: bool, data: ImageData | None = None
) -> tuple[ModelResult, list[Record]]:
    """Train one network, from data and seed to what it gave, with one record per epoch; the same in a process of its own."""
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
            progress_bar=progress_bar and has_terminal(),
        )
        return model_result(result, data), result.history


@contextmanager
def named_in_errors(run: str) -> Iterator[None]:
    """Say which of the networks diverged."""
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{run}: {error.what}", error.epoch, error.checkpoint_path) from None


@contextmanager
def torch_settings(threads: int, seed: int) -> Iterator[None]:
    """Set number of threads and global seed temporarily."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads_before)
