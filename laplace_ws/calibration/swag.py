"""SWAG: a Gaussian from the moments of the weights along further SGD at a constant learning rate [Maddox et al. 2019]."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, mean_over
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.inputs import call_model
from laplace_ws.data import TensorLoader
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.experiment.training import train_loader
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.likelihoods import make_likelihood
from laplace_ws.marglik.objective import PriorGradient
from laplace_ws.marglik.optimizers import make_optimizer, make_scheduler, scheduler_options
from laplace_ws.marglik.steps import GradientSteps, StepOptions
from laplace_ws.posterior.swag import SwagMoments, flat
from laplace_ws.randomness import random_state_kept

_SHARE_OF_LR = 0.5
"""The paper's constant learning rate as a share of that at the start of the training: 0.05 of 0.1."""


def check_swag(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject options under which there is no SGD to follow.

    Raises:
        ValueError: one is out of its range.
        ExperimentError: no learning rate is given and the run has none of SGD.
    """
    m = config.methods
    if m.swag_epochs < 0 or m.swag_epochs == 1:
        raise ValueError(f"methods.swag_epochs={m.swag_epochs} must be at least 2, or 0 to leave SWAG out")
    if m.swag_lr is not None and not m.swag_lr > 0:
        raise ValueError(f"methods.swag_lr={m.swag_lr} must be positive")
    if m.swag_epochs and m.swag_lr is None and trained.config.marglik.optimizer != "sgd":
        raise ExperimentError(
            f"'{config.checkpoint}' was trained by {trained.config.marglik.optimizer}, whose learning rate is none of SGD; set "
            "--methods.swag_lr, or --methods.swag_epochs 0 to leave SWAG out"
        )


def swag_method(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """The mean over networks drawn from the SWAG posterior."""
    m = config.methods
    if not m.swag_epochs:
        return
    start = time.perf_counter()
    lr = _SHARE_OF_LR * trained.config.marglik.lr if m.swag_lr is None else m.swag_lr
    device = trained.data.x_train.device
    with random_state_kept(device):
        torch.manual_seed(config.seed)  # a network with dropout draws from the global generator
        moments = follow_sgd(trained, m.swag_epochs, lr)
        generator = torch.Generator(device).manual_seed(config.seed)
        models = [network_at(trained, moments.sample(generator)) for _ in range(m.n_samples)]
    seconds = time.perf_counter() - start
    facts = {"lr": lr, "rank": moments.deviations.shape[1], "fit_seconds": seconds}
    yield Method("swag", "SWAG", mean_over(models), facts, trained.train_seconds + seconds)


def follow_sgd(trained: TrainedRun, n_epochs: int, lr: float) -> SwagMoments:
    """Go on from the trained weights under the prior of the training, and take in the weights after every epoch.

    Batches, momentum, accumulation and limit of the gradient are those of the run; its network is left as it is.

    Raises:
        ExperimentError: the weights left the finite numbers.
    """
    run, model = trained.config, copy.deepcopy(trained.model)
    m, named = run.marglik, list(trainable_parameters(model).items())
    parameters = [p for _, p in named]
    loader, likelihood = train_loader(run, trained.data), make_likelihood(run.likelihood)
    # as in training, the objective is scaled by the temperature, so that a learning rate means the same
    prior = PriorGradient(
        parameters,
        trained.prior_of([name for name, _ in named]),
        n_data=len(trained.data.y_train),
        scale=trained.temperature,
    )
    sgd = {"lr": lr, "momentum": m.momentum, "nesterov": m.momentum > 0}
    optimizer = make_optimizer(torch.optim.SGD, sgd, named)
    constant = make_scheduler(None, scheduler_options(None, None, 0), optimizer)
    steps = GradientSteps(optimizer, constant, StepOptions(m.gradient_accumulation_steps, m.max_grad_norm))
    moments = SwagMoments(flat(parameters))
    model.train()
    for epoch in range(1, n_epochs + 1):
        steps.start_epoch()
        for x, y in loader:
            steps.before_batch()
            steps.add(likelihood.nll_sum(at_least_float32(call_model(model, x)), y), 1.0, len(x), prior)
        steps.end_epoch(prior)
        weights = flat(parameters)
        if not weights.isfinite().all():
            raise ExperimentError(
                f"the SGD of SWAG diverged in epoch {epoch} at learning rate {lr:g}; lower --methods.swag_lr"
            )
        moments.add(weights)
    return moments


def network_at(trained: TrainedRun, weights: Float[Tensor, " P"]) -> nn.Module:
    """A copy of the network at other weights, in eval mode; BatchNorm's statistics are those of the training images under these weights."""
    model = copy.deepcopy(trained.model)
    parameters = list(trainable_parameters(model).values())
    with torch.no_grad():
        for p, part in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))
    data = trained.data
    update_bn(TensorLoader(data.x_train, data.y_train, batch_size=trained.config.data.batch_size), model)
    return model.eval()
