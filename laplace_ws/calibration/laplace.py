"""Laplace posteriors of the network: a row for each structure and each choice of the prior precision."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, Predict, Prediction, require_validation
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.data import TensorLoader
from laplace_ws.distributed import processes
from laplace_ws.experiment.folder import Json
from laplace_ws.posterior import STRUCTURES, Laplace


def check_laplace(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject structures that the network does not have, and priors without images to choose them by.

    Raises:
        ExperimentError: there are no validation images.
        UnsupportedParameterError: a parameter has no block of a structure.
        ValueError: an option is unknown.
    """
    m = config.methods
    if m.laplace and {"validation", "scaled"} & set(m.priors):
        require_validation(config, trained)
    for structure in m.laplace:
        make_posterior(config, trained, structure).check(trained.data.x_train[: config.data.batch_size])


def laplace_methods(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """The posteriors, one after another."""
    for structure in config.methods.laplace:
        yield from methods_of(config, trained, structure)


def methods_of(config: CalibrateConfig, trained: TrainedRun, structure: str) -> Iterator[Method]:
    """Fit a posterior, and predict with it under each choice of the prior precision; use them in turn, as the posterior is shared.

    Raises:
        UnsupportedParameterError: a parameter has no block of this structure.
    """
    data = trained.data
    la = make_posterior(config, trained, structure)
    start = time.perf_counter()
    la.fit(own_batches(data.x_train, data.y_train, config)).decompose()
    fit_seconds = time.perf_counter() - start
    for prior in config.methods.priors:
        start = time.perf_counter()
        choose_prior(la, prior, config, trained)
        seconds = fit_seconds + time.perf_counter() - start
        label = f"Laplace {structure}".replace("Laplace last_layer_", "last-layer ")
        yield Method(
            f"laplace_{structure}_{prior}",
            f"{label} ({prior})",
            laplace_predict(la, config),
            laplace_facts(la, seconds),
            trained.train_seconds + seconds,
        )


def own_batches(x: Tensor, y: Tensor, config: CalibrateConfig) -> TensorLoader:
    """Batches of images and classes; of each, the share of this process."""
    group = processes()
    return TensorLoader(x, y, batch_size=config.data.batch_size, num_replicas=group.size, rank=group.rank)


def laplace_predict(la: Laplace, config: CalibrateConfig) -> Predict:
    """The posterior predictive, batch by batch; with the same draws at every call, where it draws any."""
    m = config.methods

    def predict(x: Tensor) -> Prediction:
        generator = torch.Generator(x.device).manual_seed(config.seed)
        parts: list[Any] = [
            la(part, pred_type=m.pred_type, link_approx=m.link_approx, n_samples=m.n_samples, generator=generator)
            for part in x.split(config.data.batch_size)
        ]
        return Prediction(torch.cat(parts), lambda: samples(x))

    def samples(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(config.seed)
        logits = [
            la.functional_samples(part, m.pred_type, m.n_samples, generator=generator)
            for part in x.split(config.data.batch_size)
        ]
        return torch.cat(logits, 1).double().softmax(-1)

    return predict


def laplace_facts(la: Laplace, fit_seconds: float) -> Json:
    """Log marginal likelihood in nats, the spread of the prior precisions, and the seconds of the fit and the choice."""
    precision = la.prior_precision
    return {
        "covariance_scale": la.covariance_scale,
        "log_marginal_likelihood": la.log_marginal_likelihood().item(),
        "prior_precision": {
            "geometric_mean": math.exp(precision.log().mean().item()),
            "smallest": precision.min().item(),
            "largest": precision.max().item(),
        },
        "fit_seconds": fit_seconds,
    }


def make_posterior(config: CalibrateConfig, trained: TrainedRun, structure: str) -> Laplace:
    """An unfitted posterior of a structure."""
    m = config.methods
    last_layer = structure.startswith("last_layer_")
    hessian_structure = structure.removeprefix("last_layer_")
    has_factors = "kfac_approx" in STRUCTURES[hessian_structure].option_names()
    own: dict[str, Any] = {"kfac_approx": m.kfac_approx, "max_factor_dim": m.max_factor_dim} if has_factors else {}
    device = trained.data.x_train.device
    return Laplace(
        trained.model,
        trained.config.likelihood,
        subset_of_weights="last_layer" if last_layer else "all",
        hessian_structure=hessian_structure,
        curvature=m.curvature,
        backend=m.backend,
        generator=torch.Generator(device).manual_seed(config.seed),
        **own,
    )


def choose_prior(la: Laplace, prior: str, config: CalibrateConfig, trained: TrainedRun) -> None:
    """Set the prior precision, see `MethodsConfig.priors`."""
    m = config.methods
    la.covariance_scale = 1.0
    la.temperature = trained.temperature if prior == "training" else 1.0
    if prior == "training":
        la.prior_precision = trained.prior_of(la.parameter_names)
        return
    if prior != "validation":
        la.optimize_prior_precision("marglik", prior_structure=m.prior_structure)
    if prior == "marglik":
        return
    validation = own_batches(trained.x_validation, trained.y_validation, config)
    generator = torch.Generator(trained.x_validation.device).manual_seed(config.seed)
    sampling: dict[str, Any] = {"link_approx": m.link_approx, "n_samples": m.n_samples, "generator": generator}
    if prior == "scaled":
        la.optimize_covariance_scale(validation, **sampling)
        return
    la.optimize_prior_precision("gridsearch", val_loader=validation, pred_type=m.pred_type, **sampling)
