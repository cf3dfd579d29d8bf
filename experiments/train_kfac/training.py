"""One training, and its record on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from train_kfac.optimizers import make_optimizers
from train_kfac.tasks import Task


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        contestant: its name.
        optimizer: its optimiser.
        options: of the optimiser.
        n_steps: of the training, on which its schedule depends.
        seed: of weights and batches.
        part: of the data, that it is scored on.
        batch_size: examples of a step.
        warmup: share of the steps.
        model: options of the network.
        data: options of the task.
    """

    contestant: str
    optimizer: str
    options: dict[str, Any]
    n_steps: int
    seed: int
    part: str
    batch_size: int
    warmup: float
    model: dict[str, Any]
    data: dict[str, Any]

    def path(self, folder: Path) -> Path:
        """Where its record is kept."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return folder / f"{self.contestant}-{self.part}-{self.n_steps}-{self.seed}-{digest}.json"


@dataclass(frozen=True)
class Record:
    """What a training gave.

    Attributes:
        score: on its part of the data; infinite where it diverged.
        cpu_seconds: of the process, for the steps alone.
        seconds: that passed.
    """

    score: float
    cpu_seconds: float
    seconds: float


def read(job: Job, folder: Path) -> Record | None:
    """The record of a training; None where there is none."""
    path = job.path(folder)
    if not path.exists():
        return None
    record = json.loads(path.read_text())["record"]
    return Record(**{**record, "score": float(record["score"])})


def run(job: Job, task: Task, device: str, folder: Path) -> Record:
    """Train, score, and keep the record."""
    torch.manual_seed(job.seed)
    model = task.network(job.model).to(device)
    optimizers = make_optimizers(job.optimizer, model, job.options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, job)) for o in optimizers]
    batches = _batches(task.parts["train"], job)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(job.n_steps):
        x, y = task.batch(next(batches), device)
        for optimizer in optimizers:
            optimizer.zero_grad()
        task.loss(model(x), y).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    if device != "cpu":
        torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    score = task.score(model, job.part, device)
    record = Record(score if math.isfinite(score) else math.inf, cpu, wall)
    path = job.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(
        json.dumps({"job": asdict(job), "record": {**asdict(record), "score": str(record.score)}}, indent=1)
    )
    part.replace(path)
    return record


def _rate(step: int, job: Job) -> float:
    """Share of the learning rate: a straight rise, then a cosine to zero."""
    n_rising = max(1, round(job.warmup * job.n_steps))
    if step < n_rising:
        return (step + 1) / n_rising
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, job.n_steps - n_rising)))


def _batches(examples: Int[Tensor, " N"], job: Job) -> Iterator[Int[Tensor, " B"]]:
    """Batches of one epoch after another, in random order; what does not fill a batch is left out of its epoch."""
    generator = torch.Generator().manual_seed(job.seed)
    size = min(job.batch_size, len(examples))
    while True:
        order = examples[torch.randperm(len(examples), generator=generator)]
        yield from order.split(size)[: len(order) // size]
