"""Small runs in processes of their own, to be killed, and what came of them."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

from times import TIMES

from laplace_ws.experiment.config import BaselinesConfig, DataConfig, MarglikConfig, ModelConfig, RunConfig
from laplace_ws.experiment.run import run_experiment

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["hard.runs"])  # what it starts has torch already


def run_config(out: Path, workers: int = 1, n_epochs: int = 30) -> RunConfig:
    """A run of three perceptrons with a checkpoint after every other epoch."""
    return RunConfig(
        name="run",
        out=str(out),
        workers=workers,
        data=DataConfig(n_train=60, n_test=40, batch_size=20),
        model=ModelConfig(name="mlp", hidden=[5]),
        marglik=MarglikConfig(
            n_epochs=n_epochs,
            n_epochs_burnin=2,
            marglik_frequency=2,
            fit_fraction=1.0,
            n_hypersteps=3,
            prior_prec_init=0.5,
            curvature="ggn_mc",
        ),
        baselines=BaselinesConfig([0.5, 100.0]),
        report=False,
    )


def start(config: RunConfig) -> multiprocessing.process.BaseProcess:
    """Begin a run, or go on with it, in a process of its own."""
    process = CONTEXT.Process(target=_run, args=(config,))
    process.start()
    return process


def _run(config: RunConfig) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    run_experiment(config, resume=True)


def results(folder: Path) -> tuple[list, dict]:
    """What a run wrote, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return _without_times(lines), _without_times({k: summary[k] for k in ("tuned", "fixed", "data")})


def _without_times(value):
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def uninterrupted(out: Path, config: RunConfig) -> tuple[list, dict]:
    """What the run gives when nothing happens to it."""
    folder, _ = run_experiment(replace(config, out=str(out), workers=1))
    return results(folder)
