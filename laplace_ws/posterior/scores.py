"""Scores of a predictive on validation data, by which a prior can be chosen; lower is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_ws.likelihoods import Bernoulli, Categorical, Likelihood, RegressionLikelihood
from laplace_ws.metrics import evaluate_classification

Score = Callable[[Any, Tensor], float]
"""From predictions of all validation data (probabilities; for regression mean and variances of the targets) and their targets."""


def predictive_nll(likelihood: Likelihood, prediction: Any, y: Tensor) -> Tensor:
    """Mean negative log probability of the targets in nats, differentiable in the prediction.

    Args:
        likelihood: p(y | f), whose targets they are.
        prediction: probabilities; for regression mean and variances of the targets, of one shape.
        y: targets.
    """
    if isinstance(likelihood, RegressionLikelihood):
        mean, variances = prediction
        return 0.5 * ((y - mean).square() / variances + variances.log() + math.log(2 * math.pi)).mean()
    if isinstance(likelihood, Categorical):
        log_p = prediction.clamp_min(torch.finfo(prediction.dtype).tiny).log().flatten(0, -2)
        ignored = -100 if likelihood.ignore_index is None else likelihood.ignore_index
        return F.nll_loss(log_p, y.flatten().long(), ignore_index=ignored)
    if isinstance(likelihood, Bernoulli):
        return F.binary_cross_entropy(prediction, y.to(prediction.dtype))
    raise ValueError(f'loss="nll" is not known for {likelihood.name!r}; pass a function of predictions and targets.')


def make_score(loss: str | Callable[[Any, Tensor], Any], likelihood: Likelihood) -> Score:
    """The score of a name ("nll", "ece", "brier"), of a torchmetrics metric, or of a function of predictions and targets.

    A metric with `higher_is_better` is turned round.
    """
    if not isinstance(loss, str):
        return _of_metric(loss) if hasattr(loss, "compute") and hasattr(loss, "update") else _of_function(loss)
    if loss == "nll":
        return lambda prediction, y: predictive_nll(likelihood, prediction, y).item()
    if loss not in ("ece", "brier"):
        raise ValueError(
            f'unknown loss {loss!r}: choose "nll", "ece" or "brier", or pass a torchmetrics metric or a function.'
        )
    if not isinstance(likelihood, Categorical):
        raise ValueError(f'loss={loss!r} is for "classification", not for {likelihood.name!r}; use "nll".')

    def classification_score(prediction: Tensor, y: Tensor) -> float:
        counts = y != likelihood.ignore_index if likelihood.ignore_index is not None else torch.ones_like(y).bool()
        return evaluate_classification(prediction[counts], y[counts], kind="probs")[loss]

    return classification_score


def _of_metric(metric: Any) -> Score:
    def score(prediction: Any, y: Tensor) -> float:
        metric.reset()
        metric.update(_first(prediction), y)
        value = float(metric.compute())
        metric.reset()
        return -value if metric.higher_is_better else value

    return score


def _of_function(function: Callable[[Any, Tensor], Any]) -> Score:
    return lambda prediction, y: float(function(_first(prediction), y))


def _first(prediction: Any) -> Tensor:
    """Probabilities, or the mean of a regression."""
    return prediction[0] if isinstance(prediction, tuple) else prediction
