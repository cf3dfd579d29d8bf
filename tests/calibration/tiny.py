"""A small trained network in a run folder, shared by the tests of calibration."""

from __future__ import annotations

from pathlib import Path

from laplace_ws.experiment.config import DataConfig, MarglikConfig, ModelConfig, RunConfig
from laplace_ws.experiment.run import run_experiment


def tiny_config(out: Path, **data) -> RunConfig:
    """The run of a perceptron of five hidden units on 60 images."""
    return RunConfig(
        name="tiny",
        out=str(out),
        test_every=4,
        data=DataConfig(**{"n_train": 60, "n_test": 40, "batch_size": 20} | data),
        model=ModelConfig(name="mlp", hidden=[5]),
        marglik=MarglikConfig(
            n_epochs=4, n_epochs_burnin=2, marglik_frequency=1, fit_fraction=1.0, n_hypersteps=3, prior_prec_init=0.5
        ),
        report=False,
    )


def train_tiny(out: Path, **data) -> Path:
    """Train it; the run folder."""
    return run_experiment(tiny_config(out, **data))[0]
