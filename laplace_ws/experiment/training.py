"""What a run's configuration asks of training: options and batches, and the checks made before anything is written or any worker starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import nn

from laplace_ws.data import ImageData, TensorLoader, random_crop_flip
from laplace_ws.distributed import processes
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import Task
from laplace_ws.marglik import Schedule, TrainingOptions, prepare
from laplace_ws.optim import KFAC

T = TypeVar("T")


def check_config(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Reject invalid values before the data are loaded.

    Raises:
        ValueError: names the key and its value.
    """
    for name in ("threads", "workers", "test_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if len({task.run for task in tasks}) < len(tasks):
        raise ValueError(f"baselines.fixed_prior_precisions names one twice: {config.baselines.fixed_prior_precisions}")
    if any(not task.prior_precision > 0 for task in tasks if task.prior_precision is not None):
        raise ValueError(
            f"baselines.fixed_prior_precisions must be positive: {config.baselines.fixed_prior_precisions}"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; use device=auto or device=cpu")
    if not 0 <= config.marglik.momentum < 1:
        raise ValueError(f"marglik.momentum={config.marglik.momentum} must be at least 0 and below 1")
    if not config.marglik.lr > 0:
        raise ValueError(f"marglik.lr={config.marglik.lr} must be positive")
    if config.marglik.lr_min is not None and not 0 <= config.marglik.lr_min <= config.marglik.lr:
        raise ValueError(
            f"marglik.lr_min={config.marglik.lr_min} must be at least 0 and at most marglik.lr={config.marglik.lr}"
        )
    for task in tasks:
        training_options(config, task)


def check_training(config: RunConfig, model: nn.Module, data: ImageData) -> None:
    """Reject what the training of the tuned network would reject before its first gradient step.

    Raises:
        ValueError: an option is out of its range, or does not fit the model or the data.
    """
    prepare(model, train_loader(config, data), config.likelihood, *training_options(config, Task("tuned")))


def training_options(config: RunConfig, task: Task) -> tuple[Schedule, TrainingOptions]:
    """How one network is trained: the tuned one as configured, a baseline at its fixed prior precision.

    Raises:
        ValueError: a value is out of its range.
    """
    m = config.marglik
    values = dict(vars(m))
    if m.optimizer == "sgd":
        momentum = {"momentum": m.momentum, "nesterov": m.momentum > 0}
        values |= {"optimizer_cls": torch.optim.SGD, "optimizer_kwargs": {"lr": m.lr, **momentum}}
    elif m.optimizer == "kfac":
        values |= {"optimizer_cls": KFAC, "optimizer_kwargs": {"lr": m.lr, "kfac_approx": m.kfac_approx or "expand"}}
    else:
        values |= {"optimizer_cls": torch.optim.Adam, "optimizer_kwargs": {"lr": m.lr}}
    if m.lr_min is not None:
        values |= {"scheduler_kwargs": {"eta_min": m.lr_min}}
    if task.prior_precision is not None:
        values |= {"n_hypersteps": 0, "prior_prec_init": task.prior_precision, "tune_temperature": False}
    return _from_values(Schedule, values), _from_values(TrainingOptions, values)


def _from_values(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from those values that are fields of it."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})  # pyright: ignore[reportArgumentType]


def train_loader(config: RunConfig, data: ImageData) -> TensorLoader:
    """The training batches, in an order that the run's seed sets; of each batch, the share of this process."""
    return TensorLoader(
        data.x_train,
        data.y_train,
        batch_size=config.data.batch_size,
        shuffle=True,
        augment=random_crop_flip if config.data.augment else None,
        seed=config.seed,
        num_replicas=(group := processes()).size,
        rank=group.rank,
    )
