"""What a training kept in its checkpoint: weights, and the prior that they were trained under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from laplace_ws.experiment.config import RunConfig
from laplace_ws.marglik.checkpoint import load_training
from laplace_ws.posterior import prior_groups


@dataclass(frozen=True, eq=False)
class Kept:
    """The weights that a training kept: the best by marginal likelihood, or the last.

    Attributes:
        weights: the model's state.
        prior_precision: of every parameter tensor that was trained, in order; or one per weight.
        temperature: of the likelihood.
    """

    weights: Mapping[str, Tensor]
    prior_precision: Tensor
    temperature: float


def kept_by_training(path: Path, run: RunConfig, model: nn.Module) -> Kept:
    """Read the checkpoint of a training that has finished.

    Args:
        path: of the checkpoint.
        run: the settings of the training.
        model: a network like the trained one.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged.
    """
    state = load_training(path)
    kept = state["progress"]["best"] or state
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    log_delta, log_tau = kept["hyper"]["log_prior_precision"], kept["hyper"]["log_temperature"]
    spread = prior_groups(shapes, run.marglik.prior_structure).spread(log_delta.exp())
    return Kept(kept["model"], torch.as_tensor(spread, dtype=torch.float64), log_tau.exp().item())
