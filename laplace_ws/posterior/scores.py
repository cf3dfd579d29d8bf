"""Scores of a predictive on validation data, by which a prior can be chosen; lower is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from laplace_ws.likelihoods import Likelihood
from laplace_ws.values import shown

Score = Callable[[Any, Tensor], float]
"""From predictions of all validation data (probabilities; for regression mean and variances of the targets) and their targets."""


def make_score(loss: str | Callable[[Any, Tensor], Any], likelihood: Likelihood) -> Score:
    """The score for a name that the likelihood knows, of a torchmetrics metric, or of a function of predictions and targets.

    A metric with `higher_is_better` is negated.
    """
    if not isinstance(loss, str):
        return _of_metric(loss) if hasattr(loss, "compute") and hasattr(loss, "update") else _of_function(loss)
    if loss not in ("nll", "ece", "brier", *likelihood.scores):
        raise ValueError(
            f'unknown loss {loss!r}: choose "nll", "ece" or "brier", or pass a torchmetrics metric or a function.'
        )
    if loss not in likelihood.scores:
        raise ValueError(f'loss={loss!r} is for "classification", not for {likelihood.name!r}; use "nll".')
    return lambda prediction, y: likelihood.score(loss, prediction, y)


def _of_metric(metric: Any) -> Score:
    def score(prediction: Any, y: Tensor) -> float:
        metric.reset()
        metric.update(_first(prediction), y)
        value = _number(metric.compute(), "the metric")
        metric.reset()
        return -value if metric.higher_is_better else value

    return score


def _of_function(function: Callable[[Any, Tensor], Any]) -> Score:
    return lambda prediction, y: _number(function(_first(prediction), y), "the loss")


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must return one number for all validation data, got {shown(value)}.") from None


def _first(prediction: Any) -> Tensor:
    """Probabilities, or the mean of a regression."""
    return prediction[0] if isinstance(prediction, tuple) else prediction
