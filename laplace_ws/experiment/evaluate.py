"""How well a network predicts the test set: after each epoch, and at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.inputs import call_model
from laplace_ws.data import ImageData
from laplace_ws.distributed import processes
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import Json
from laplace_ws.experiment.records import EpochRecord, ModelResult
from laplace_ws.marglik.lines import has_terminal, say_epoch
from laplace_ws.marglik.trainer import Record
from laplace_ws.marglik.training import MarglikResult
from laplace_ws.metrics import evaluate_classification, reliability_curve

TEST_BATCH = 500


def epoch_logger(
    config: RunConfig, run: str, model: nn.Module, data: ImageData, path: Path
) -> Callable[[Record], None]:
    """Adds CPU time and the test set's scores to the record of an epoch and appends it to the metrics file.

    Without a terminal for a progress bar, it says so in a line.
    """
    start = time.process_time()

    def log(record: Record) -> None:
        nonlocal start
        tested: Json = {"cpu_seconds": time.process_time() - start}
        if record["epoch"] % config.test_every == 0 or record["epoch"] == config.marglik.n_epochs:
            f = outputs(model, data.x_test)
            tested["test_nll"] = finite_or_none(F.cross_entropy(f.double(), data.y_test).item())
            tested["test_accuracy"] = (f.argmax(-1) == data.y_test).double().mean().item()
        complete = asdict(EpochRecord(run=run, **record, **tested))
        record.clear()
        record |= complete
        if processes().is_first:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if not has_terminal():
                say_epoch(record, config.marglik.n_epochs, f"{config.name} {run}")
        start = time.process_time()

    return log


def finite_or_none(value: float) -> float | None:
    """JSON has no infinities."""
    return value if math.isfinite(value) else None


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The model's outputs in eval mode, batch by batch; leaves every module's mode as it was."""
    with evaluation_mode(model), torch.no_grad():
        return torch.cat([call_model(model, part) for part in x.split(TEST_BATCH)])


def model_result(result: MarglikResult, data: ImageData) -> ModelResult:
    """What training one network gave, with its scores on the test set."""
    f = outputs(result.model, data.x_test)
    scores = evaluate_classification(f, data.y_test, kind="logits")
    return ModelResult(
        log_marginal_likelihood=result.la.log_marginal_likelihood().item(),
        test_nll=scores["nll"],
        test_accuracy=scores["accuracy"],
        test_ece=scores["ece"],
        train_seconds=result.train_seconds,
        curvature_seconds=result.curvature_seconds,
        tuning_overhead=result.tuning_overhead,
        final_fit_overhead=result.final_fit_overhead,
        over_budget=result.over_budget,
        best_epoch=result.best_epoch,
        prior_precision=result.prior_precision,
        prior_group=result.prior_group,
        collapsed=tuple(result.collapsed),
        reliability=reliability_curve(f.double().softmax(-1), data.y_test),
        changes=tuple(result.changes),
    )
