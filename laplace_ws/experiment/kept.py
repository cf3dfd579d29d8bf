"""The network that a training kept in its checkpoint, and the prior that it was trained under."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from laplace_ws.data import ImageData
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import CONFIG, ExperimentError
from laplace_ws.experiment.run import make_model
from laplace_ws.marglik.checkpoint import load_training
from laplace_ws.posterior import prior_groups


@dataclass(frozen=True, eq=False)
class Kept:
    """What a training kept: the best by marginal likelihood, or the last.

    Attributes:
        model: the network, in eval mode.
        epoch: of its weights.
        prior_precision: of every parameter tensor that was trained, in order; or one per weight.
        temperature: of the likelihood.
        train_seconds: wall time of the training, curvature included.
    """

    model: nn.Module
    epoch: int
    prior_precision: Tensor
    temperature: float
    train_seconds: float


def kept_by_training(path: Path, run: RunConfig, data: ImageData) -> Kept:
    """Read the checkpoint of a training that has finished; no code from it is run.

    Args:
        path: of the checkpoint.
        run: the settings of the training.
        data: its images.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged.
        ExperimentError: it is of another network.
    """
    state = load_training(path)
    progress = state["progress"]
    kept = progress["best"] or {"epoch": progress["epoch"], "model": state["model"], "hyper": state["hyper"]}
    model = make_model(run, data)
    try:
        model.load_state_dict(kept["model"])
    except RuntimeError as error:
        raise ExperimentError(
            f"the weights in '{path}' do not fit the network of '{path.with_name(CONFIG)}'; give a checkpoint of that run ({error})"
        ) from error
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    log_delta, log_tau = kept["hyper"]["log_prior_precision"], kept["hyper"]["log_temperature"]
    spread = prior_groups(shapes, run.marglik.prior_structure).spread(log_delta.exp())
    delta = torch.as_tensor(spread, dtype=torch.float64)
    return Kept(model.eval(), kept["epoch"], delta, log_tau.exp().item(), progress["train_seconds"])
