"""Hyperparameters chosen by predictions on validation data: a grid in one pass, or the gradient of their likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.batches import Batches
from laplace_ws.curvature.inputs import ModelInputs
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import RegressionLikelihood
from laplace_ws.likelihoods.links import probabilities
from laplace_ws.matrices import Layout, Pushforward, expand_per_weight
from laplace_ws.posterior.evidence import BOUNDS
from laplace_ws.posterior.functional import LinearisedModel
from laplace_ws.posterior.groups import PriorGroups
from laplace_ws.posterior.predict import Prediction, PredictionOptions, Predictor
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.scores import Score
from laplace_ws.randomness import random_state, set_random_state

SCALE_BOUNDS = (1e-4, 1e4)
"""Multipliers of the covariance among which the best is looked for."""
N_SCALES = 65
"""How many of them are tried before the best is refined."""


@dataclass(frozen=True)
class Unknowns:
    """What is chosen, as a vector of logarithms: the prior precision of each group, then σ and τ where they are chosen too.

    Attributes:
        prior: the current values.
        groups: which weights share a prior precision.
        noise: whether σ is chosen.
        temperature: whether τ is.
    """

    prior: Prior
    groups: PriorGroups
    noise: bool = False
    temperature: bool = False

    def present(self) -> Float[Tensor, " U"]:
        """The current values; log δ averaged over the weights of each group."""
        prior, n_groups = self.prior, len(self.groups.names)
        log_delta = prior.precision_per_weight().log()
        group_of_weight = expand_per_weight(self.groups.index.to(log_delta.device), prior.shapes)
        sums = log_delta.new_zeros(n_groups).index_add_(0, group_of_weight, log_delta)
        parts = [sums / torch.bincount(group_of_weight, minlength=n_groups)]
        parts += [prior.sigma_noise.log()[None]] if self.noise else []
        parts += [prior.temperature.log()[None]] if self.temperature else []
        return torch.cat(parts)

    def prior_at(self, values: Float[Tensor, " U"]) -> Prior:
        """The prior with the values of a vector, differentiable in it."""
        n_groups = len(self.groups.names)
        others = iter(values[n_groups:].exp())
        changes = {"precision": self.groups.spread(values[:n_groups].exp())}
        changes |= {"sigma_noise": next(others)} if self.noise else {}
        changes |= {"temperature": next(others)} if self.temperature else {}
        return replace(self.prior, **changes)

    def chosen(self, values: Float[Tensor, " U"]) -> Prior:
        """The prior with the values of a vector, checked."""
        prior = self.prior_at(values.detach())
        return self.prior.changed(
            precision=prior.precision, sigma_noise=prior.sigma_noise, temperature=prior.temperature
        )


def grid_scores(
    predictor: Predictor, batches: Batches, grid: Sequence[float], score: Score, options: PredictionOptions
) -> list[float]:
    """The score of each prior precision of a grid, in one pass over the data; infinite where predictions are not finite.

    Args:
        predictor: the posterior; its own prior precision is not used.
        batches: validation data.
        grid: prior precisions.
        score: of predictions and targets, lower is better.
        options: how predictions are made; each point of the grid sees the same draws.
    """
    likelihood, fit = predictor.fit.likelihood, predictor.fit
    options = replace(options, diagonal_output=True, observation_noise=likelihood.is_regression)
    priors = [predictor.prior.changed(precision=delta) for delta in grid]
    layout = predictor.layout(joint=False, diagonal_output=not likelihood.needs_covariance(options.link.value))
    pushforward = fit.H.pushforward([replace(predictor, prior=prior).damping for prior in priors], layout)
    predictions: list[list[Any]] = [[] for _ in grid]
    targets = []
    with batches.processes.together("predictions of validation data"):
        for x, y in _not_empty(batches):
            at_points = _predictions(predictor, priors, pushforward, x, y, options)
            for of_point, prediction in zip(predictions, at_points, strict=True):
                of_point.append(_by_term(prediction, 2))
            targets.append(_by_term(y, 1 + likelihood.target_ndim))
        y = torch.cat(_of_all(batches, targets))
        joined = [_joined(_of_all(batches, of_point)) for of_point in predictions]
    return [score(prediction, y) if _is_finite(prediction) else math.inf for prediction in joined]


def _predictions(
    predictor: Predictor,
    priors: Sequence[Prior],
    pushforward: Pushforward,
    x: ModelInputs,
    y: Tensor,
    options: PredictionOptions,
) -> Iterator[Any]:
    """Predictions at each prior, from one linearisation; by sampling, with the same draws for each."""
    likelihood, state = predictor.fit.likelihood, random_state(y.device, options.generator)
    if options.by_network:
        for prior in priors:
            set_random_state(state, y.device, options.generator)
            at_prior = replace(predictor, prior=prior)
            outputs = at_prior.network_outputs(x, options)
            likelihood.check(outputs[0], y)
            outputs = torch.where(outputs.isfinite(), outputs, torch.nan)  # of which no link makes a number
            yield at_prior.mean_over_samples(outputs, options)
        return
    f, spreads = _moments(predictor, x, pushforward)
    likelihood.check(f, y)
    for spread in spreads:
        set_random_state(state, y.device, options.generator)
        yield _prediction(predictor, f, spread, options)


def best_covariance_scale(predictor: Predictor, batches: Batches, score: Score, options: PredictionOptions) -> float:
    """The multiplier of the posterior covariance whose predictions of validation data, by the linearised network, score lowest.

    The data are passed over once: the covariance of the outputs is proportional to that of the weights.

    Args:
        predictor: the posterior; its own multiplier is not used.
        batches: validation data.
        score: of predictions and targets, lower is better.
        options: how predictions are made; each multiplier sees the same draws.
    """
    predictor, likelihood = replace(predictor, covariance_scale=1.0), predictor.fit.likelihood
    layout = predictor.layout(joint=False, diagonal_output=not likelihood.needs_covariance(options.link.value))
    pushforward = predictor.fit.H.pushforward([predictor.damping], layout)
    parts: list[tuple[Tensor, Tensor]] = []
    targets: list[Tensor] = []
    with batches.processes.together("predictions of validation data"):
        for x, y in _not_empty(batches):
            f, (spread,) = _moments(predictor, x, pushforward)
            likelihood.check(f, y)
            parts.append((f, spread))
            targets.append(_by_term(y, 1 + likelihood.target_ndim))
        y, parts = torch.cat(_of_all(batches, targets)), _of_all(batches, parts)
    state = random_state(y.device, options.generator)

    def score_at(log_scale: float) -> float:
        set_random_state(state, y.device, options.generator)
        scaled = (_prediction(predictor, f, spread * math.exp(log_scale), options) for f, spread in parts)
        prediction = _joined([_by_term(of_batch, 2) for of_batch in scaled])
        value = score(prediction, y) if _is_finite(prediction) else math.nan
        return value if math.isfinite(value) else math.inf

    low, high = (math.log(bound) for bound in SCALE_BOUNDS)
    grid = torch.linspace(low, high, N_SCALES, dtype=torch.float64).tolist()
    scores = [score_at(point) for point in grid]
    if min(scores) == math.inf:
        raise ValueError("no covariance scale has a finite score; look at the loss and the validation data.")
    best = min(range(N_SCALES), key=lambda i: (scores[i], abs(grid[i])))  # break ties towards the posterior as it is
    if best in (0, N_SCALES - 1):
        what = "the network's own outputs" if best == 0 else "a wider posterior than any that is tried"
        warnings.warn(
            f"the best covariance scale, {math.exp(grid[best]):g}, lies at the edge of those that are tried: the validation data prefer "
            f"{what}.",
            stacklevel=4,
        )
        return math.exp(grid[best])
    found: Any = scipy.optimize.minimize_scalar(score_at, bounds=(grid[best - 1], grid[best + 1]), method="bounded")  # pyright: ignore
    return math.exp(found.x if found.fun < scores[best] else grid[best])


def minimise_validation_nll(predictor: Predictor, batches: Batches, unknowns: Unknowns, n_steps: int) -> Prior:
    """The prior at which the mean negative log predictive density of validation data is lowest, by L-BFGS.

    Raises:
        InvalidBatchError: the data do not determine one.
    """
    fit, likelihood = predictor.fit, predictor.fit.likelihood
    device = fit.mean.device

    def value_and_gradient(point: Any) -> tuple[float, Any]:
        values = torch.as_tensor(point, dtype=torch.float64, device=device).requires_grad_(True)
        total, n_all, gradient = 0.0, 0, torch.zeros_like(values)
        prior = unknowns.prior_at(values)
        pushforward = fit.H.pushforward([replace(predictor, prior=prior).damping], Layout.DIAGONAL)
        with batches.processes.together("the likelihood of validation data"):
            for x, y in _not_empty(batches):
                for part in _differentiable_parts(predictor, len(x)):
                    f, (spread,) = _moments(predictor, x[part], pushforward)
                    likelihood.check(f, y[part])
                    prediction = _prediction(replace(predictor, prior=prior), f, spread, PredictionOptions())
                    n_targets = likelihood.n_targets(f, y[part])
                    if not n_targets:
                        continue
                    nll = likelihood.predictive_nll(prediction, y[part]).double() * n_targets
                    gradient += torch.autograd.grad(nll, values, retain_graph=True)[0]
                    total, n_all = total + nll.item(), n_all + n_targets
            total, n_all = map(sum, zip(*batches.processes.gather((total, n_all)), strict=True))
            batches.processes.sum_([gradient])
        if not n_all or not math.isfinite(total):
            what = f"their negative log likelihood is {total}" if n_all else "none of their targets counts"
            raise InvalidBatchError(f"the validation data choose no prior precision: {what}; look at val_loader.")
        return total / n_all, (gradient / n_all).cpu().numpy()

    limits = [math.log(bound) for bound in BOUNDS]
    start = unknowns.present().clamp(*limits)
    found = scipy.optimize.minimize(
        value_and_gradient,
        start.cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[tuple(limits)] * len(start),
        options={"maxiter": n_steps, "ftol": 1e-12, "gtol": 1e-7},
    )
    if not found.success:
        warnings.warn(
            f"the gradient method stopped after {found.nit} steps before its end ({found.message}).", stacklevel=4
        )
    return unknowns.chosen(torch.as_tensor(found.x, dtype=torch.float64, device=device))


def _moments(predictor: Predictor, x: ModelInputs, pushforward: Pushforward) -> tuple[Tensor, list[Tensor]]:
    linearised = LinearisedModel(predictor.network, predictor.fit.output_shape, predictor.memory_budget)
    return linearised.moments(predictor.inputs(x), predictor.fit.H, pushforward)


def _of_all(batches: Batches, values: list[Any]) -> list[Any]:
    """Tensors, or tuples of them, of the batches of all processes."""
    if batches.shard is None:
        return values

    def moved(value: Any, device: torch.device) -> Any:
        return tuple(part.to(device) for part in value) if isinstance(value, tuple) else value.to(device)

    of_each = batches.processes.gather([moved(value, torch.device("cpu")) for value in values])
    return [moved(value, batches.device) for of_process in of_each for value in of_process]


def _not_empty(batches: Batches) -> Iterator[tuple[ModelInputs, Tensor]]:
    is_empty = True
    for pair in batches:
        is_empty = False
        yield pair
    if is_empty:
        raise InvalidBatchError("val_loader holds no batch; give an iterable that is not empty or used up.")


def _prediction(predictor: Predictor, f: Tensor, spread: Tensor, options: PredictionOptions) -> Prediction:
    """Probabilities; or, for regression, mean and variances of the targets, of one shape."""
    likelihood = predictor.fit.likelihood
    if not isinstance(likelihood, RegressionLikelihood):
        return probabilities(likelihood, f, spread, options.link, options.n_samples, options.generator)
    if spread.ndim > f.ndim:
        spread = spread.diagonal(dim1=-2, dim2=-1).reshape(f.shape)
    return likelihood.target_moments(f, spread, predictor.prior.sigma_noise)


def _differentiable_parts(predictor: Predictor, n_examples: int) -> Iterator[slice]:
    """Number of examples whose Jacobians over all weights, which the gradient needs at once, fit into the memory budget."""
    n_outputs = math.prod(predictor.fit.output_shape)
    size = max(1, int(predictor.memory_budget // (8 * predictor.network.n_params * n_outputs)))
    for start in range(0, n_examples, size):
        yield slice(start, start + size)


def _by_term(prediction: Any, n_axes: int) -> Any:
    """Predictions or targets of sequences and images with one row per term, so that those of different sizes can be joined."""
    if isinstance(prediction, tuple):
        return tuple(_by_term(part, n_axes) for part in prediction)
    return prediction.flatten(0, -n_axes) if prediction.ndim > n_axes else prediction


def _is_finite(prediction: Any) -> bool:
    parts = prediction if isinstance(prediction, tuple) else (prediction,)
    return all(bool(part.isfinite().all()) for part in parts)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return torch.cat(list(parts))
