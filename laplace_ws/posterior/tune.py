"""The choice of a posterior's prior: by the log marginal likelihood, or by predictions on validation data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_ws.curvature.batches import Batches
from laplace_ws.curvature.watch import DataWatch, warn_of_overlap
from laplace_ws.likelihoods.links import LinkApprox
from laplace_ws.posterior.evidence import log_marginal_likelihood, optimal_prior_and_noise
from laplace_ws.posterior.groups import PriorStructure, prior_groups
from laplace_ws.posterior.predict import PredictionOptions, Predictor
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.scores import make_score
from laplace_ws.posterior.validate import Unknowns, best_covariance_scale, grid_scores, minimise_validation_nll
from laplace_ws.registry import Choice
from laplace_ws.values import flag, real_number, shown, whole_number

LARGEST_EXPONENT = 30
"""Of a grid's prior precisions, as powers of ten."""


class Method(Choice):
    """How a prior precision is chosen.

    `MARGLIK`: where the log marginal likelihood is highest. `GRIDSEARCH`: the best of a grid on validation data. `GRADIENT`: where the
    negative log likelihood of validation data is lowest, by its gradient.
    """

    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class TuningOptions:
    """How a prior is chosen, see `Laplace.optimize_prior_precision`."""

    method: Method
    prior_structure: PriorStructure
    loss: str | Callable[[Any, Tensor], Any]
    log_prior_prec_min: float
    log_prior_prec_max: float
    grid_size: int
    optimizer: str
    n_steps: int
    lr: float
    optimize_noise: bool
    optimize_temperature: bool

    def __post_init__(self) -> None:
        """Raise for options of a wrong type, or out of their range."""
        whole_number("grid_size", self.grid_size, least=1)
        whole_number("n_steps", self.n_steps, least=1)
        real_number("lr", self.lr, above=0)
        low = real_number("log_prior_prec_min", self.log_prior_prec_min)
        high = real_number("log_prior_prec_max", self.log_prior_prec_max)
        for name, value in (("log_prior_prec_min", low), ("log_prior_prec_max", high)):
            if abs(value) > LARGEST_EXPONENT:
                raise ValueError(
                    f"{name} is a power of ten from −{LARGEST_EXPONENT} to {LARGEST_EXPONENT}, got {value:g}."
                )
        if low > high:
            raise ValueError(
                f"log_prior_prec_min={low:g} lies above log_prior_prec_max={high:g}; exchange them, as the grid goes up."
            )
        flag("optimize_noise", self.optimize_noise)
        flag("optimize_temperature", self.optimize_temperature)
        if not isinstance(self.loss, str) and not callable(self.loss):
            raise TypeError(
                f"loss must be a name, a torchmetrics metric or a function of predictions and targets, got {shown(self.loss)}."
            )

    def check(self, predictor: Predictor, *, has_data: bool, prediction: PredictionOptions) -> None:
        """Raise `ValueError` for options that do not go together, or not with the posterior."""
        likelihood, method = predictor.fit.likelihood, self.method
        self.prior_structure.checked(predictor.prior.structure)
        if self.optimize_noise and not likelihood.has_noise:
            raise ValueError(f"the {likelihood.name} likelihood has no noise to optimise.")
        if self.optimize_temperature and method is not Method.GRADIENT:
            raise ValueError(
                'the temperature is chosen on validation data: use method="gradient" (its log marginal likelihood compares only at equal '
                "temperature)."
            )
        if method is Method.MARGLIK:
            if has_data or self.loss != "nll":
                raise ValueError(
                    'method="marglik" looks at the training data alone; leave out val_loader and loss, or use "gridsearch" or "gradient".'
                )
            if self.optimizer not in ("newton", "adam"):
                raise ValueError(f'unknown optimizer {self.optimizer!r}: choose "newton" or "adam".')
            return
        if not has_data:
            raise ValueError(f'method={method.value!r} needs val_loader; use method="marglik" without validation data.')
        is_default = self.loss == "nll" and not prediction.by_network and prediction.link is LinkApprox.PROBIT
        if method is Method.GRADIENT and not is_default:
            raise ValueError(
                'method="gradient" minimises loss="nll" of pred_type="glm" with link_approx="probit"; use "gridsearch" for others.'
            )
        if method is Method.GRIDSEARCH and (self.prior_structure is not PriorStructure.SCALAR or self.optimize_noise):
            raise ValueError('method="gridsearch" chooses one scalar; use "gradient" for more.')


def tuned_prior(
    predictor: Predictor, options: TuningOptions, batches: Batches | None, prediction: PredictionOptions
) -> Prior:
    """The prior of a posterior, with the chosen values.

    Args:
        predictor: the posterior.
        options: what is chosen, and how.
        batches: validation data, where the choice is based on them.
        prediction: how predictions for these are made.
    """
    options.check(predictor, has_data=batches is not None, prediction=prediction)
    fit, prior = predictor.fit, predictor.prior
    groups = prior_groups(prior.shapes, options.prior_structure)
    unknowns = Unknowns(prior, groups, options.optimize_noise, options.optimize_temperature)
    if batches is None:
        if options.optimizer == "adam":
            return _by_adam(predictor, unknowns, options)
        delta, sigma = optimal_prior_and_noise(
            fit, prior, options.prior_structure, fix_noise=not options.optimize_noise
        )
        return prior.changed(precision=delta, sigma_noise=sigma)
    watch = DataWatch(fit.likelihood)
    batches = replace(batches, on_first=watch.begin, on_each=watch)
    if options.method is Method.GRADIENT:
        chosen = minimise_validation_nll(predictor, batches, unknowns, options.n_steps)
    else:
        chosen = prior.changed(precision=_best_of_grid(predictor, options, batches, prediction))
    warn_of_overlap(fit.examples, fit.totals.n_examples, watch, stacklevel=3)
    return chosen


def tuned_covariance_scale(
    predictor: Predictor, loss: str | Callable[[Any, Tensor], Any], batches: Batches, prediction: PredictionOptions
) -> float:
    """The multiplier of the posterior covariance that predicts validation data best, see `Laplace.optimize_covariance_scale`."""
    fit = predictor.fit
    watch = DataWatch(fit.likelihood)
    batches = replace(batches, on_first=watch.begin, on_each=watch)
    scale = best_covariance_scale(predictor, batches, make_score(loss, fit.likelihood), prediction)
    warn_of_overlap(fit.examples, fit.totals.n_examples, watch, stacklevel=3)
    return scale


def _by_adam(predictor: Predictor, unknowns: Unknowns, options: TuningOptions) -> Prior:
    """Ascend the log marginal likelihood by steps of Adam, from the current values."""
    values = unknowns.present().requires_grad_(True)
    adam = torch.optim.Adam([values], lr=options.lr, maximize=True)
    for _ in range(options.n_steps):
        adam.zero_grad()
        log_marginal_likelihood(predictor.fit, unknowns.prior_at(values)).backward()
        adam.step()
    return unknowns.chosen(values)


def _best_of_grid(
    predictor: Predictor, options: TuningOptions, batches: Batches, prediction: PredictionOptions
) -> float:
    low, high, size = options.log_prior_prec_min, options.log_prior_prec_max, options.grid_size
    grid = torch.logspace(low, high, size, dtype=torch.float64).tolist()
    scores = grid_scores(predictor, batches, grid, make_score(options.loss, predictor.fit.likelihood), prediction)
    if not any(math.isfinite(score) for score in scores):
        raise ValueError("no point of the grid has a finite score; look at the loss and the validation data.")
    # break ties towards the larger precision, as the data then give no reason for a weaker prior
    best = min(range(size), key=lambda i: (not math.isfinite(scores[i]), scores[i], -i))
    if size > 1 and best in (0, size - 1):
        warnings.warn(
            f"the best prior precision of the grid, {grid[best]:g}, lies at its edge; widen it by log_prior_prec_min and "
            "log_prior_prec_max, or take it that the loss hardly depends on the prior.",
            stacklevel=4,
        )
    return grid[best]
