"""The predictives that are compared: of the network as it is, with a temperature, and of Laplace posteriors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.temperature import fit_temperature
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.data import TensorLoader
from laplace_ws.experiment.evaluate import outputs
from laplace_ws.experiment.folder import ExperimentError, Json
from laplace_ws.posterior import STRUCTURES, Laplace

MAP, TEMPERATURE = "map", "temperature"

Predict = Callable[[Float[Tensor, "N C H W"]], Float[Tensor, "N K"]]
"""Class probabilities of normalised images."""


@dataclass(frozen=True, eq=False)
class Method:
    """A way to predict.

    Attributes:
        name: of its entry in calibration.json.
        label: for tables and pictures.
        predict: class probabilities of normalised images.
        facts: numbers that belong to it: its temperature, or its log marginal likelihood, prior precision and time.
    """

    name: str
    label: str
    predict: Predict
    facts: Json


def check_validation(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject a choice based on validation images where there are none.

    Raises:
        ExperimentError: says what to do without them.
    """
    m = config.methods
    if (m.temperature or (m.laplace and "validation" in m.priors)) and not len(trained.y_validation):
        raise ExperimentError(
            "temperature scaling and priors by validation need training images that the network was not trained on, but that of "
            f"'{config.checkpoint}' was trained on all of them; train with a smaller data.n_train, or set --methods.temperature false and "
            "--methods.priors [marglik]"
        )


def make_methods(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """The methods, one after another, so that one posterior is in memory at a time."""
    yield Method(MAP, "MAP", scaled_predict(trained, 1.0), {})
    if config.methods.temperature:
        temperature = fit_temperature(outputs(trained.model, trained.x_validation), trained.y_validation)
        predict = scaled_predict(trained, temperature)
        yield Method(TEMPERATURE, "temperature scaling", predict, {"temperature": temperature})
    for structure in config.methods.laplace:
        yield from laplace_methods(config, trained, structure)


def scaled_predict(trained: TrainedRun, temperature: float) -> Predict:
    """softmax(f / T)."""
    return lambda x: (outputs(trained.model, x).double() / temperature).softmax(-1)


def laplace_methods(config: CalibrateConfig, trained: TrainedRun, structure: str) -> Iterator[Method]:
    """Fit a posterior, and predict with it under each choice of the prior precision; use them in turn, as the posterior is shared.

    Raises:
        UnsupportedParameterError: a parameter has no block of this structure.
    """
    data = trained.data
    la = make_posterior(config, trained, structure)
    start = time.perf_counter()
    la.fit(TensorLoader(data.x_train, data.y_train, batch_size=config.data.batch_size))
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
        )


def laplace_predict(la: Laplace, config: CalibrateConfig) -> Predict:
    """The posterior predictive, batch by batch; with the same draws at every call, where it draws any."""
    m = config.methods

    def predict(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(config.seed)
        parts: list[Any] = [
            la(part, pred_type=m.pred_type, link_approx=m.link_approx, n_samples=m.n_samples, generator=generator)
            for part in x.split(config.data.batch_size)
        ]
        return torch.cat(parts)

    return predict


def laplace_facts(la: Laplace, fit_seconds: float) -> Json:
    """Log marginal likelihood in nats, the spread of the prior precisions, and the seconds of the fit and the choice."""
    precision = la.prior_precision
    return {
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
    own: dict[str, Any] = {"kfac_approx": m.kfac_approx} if has_factors else {}
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
    la.temperature = trained.temperature if prior == "training" else 1.0
    if prior == "training":
        by_name = [trained.prior_precision[name] for name in la.parameter_names]
        la.prior_precision = torch.stack(by_name) if by_name[0].ndim == 0 else torch.cat(by_name)
        return
    if prior == "marglik":
        la.optimize_prior_precision("marglik", prior_structure=m.prior_structure)
        return
    la.optimize_prior_precision(
        "gridsearch",
        val_loader=TensorLoader(trained.x_validation, trained.y_validation, batch_size=config.data.batch_size),
        loss="nll",
        pred_type=m.pred_type,
        link_approx=m.link_approx,
        n_samples=m.n_samples,
        generator=torch.Generator(trained.x_validation.device).manual_seed(config.seed),
    )
