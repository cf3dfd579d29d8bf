"""Selective prediction: the error that is left where only the images of which a classifier is surest are answered."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.metrics.classification import OutputKind, doubt, to_log_probs
from laplace_ws.values import whole_number


@dataclass(frozen=True)
class RiskCoverageCurve:
    """Error of the most confident share of the examples, by that share.

    Attributes:
        coverage: shares, ascending to 1.
        risk: fraction of them whose top label is wrong.
    """

    coverage: tuple[float, ...]
    risk: tuple[float, ...]


def aurc(probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Area under the risk-coverage curve, N⁻¹ Σ_k risk(k/N), a fraction [Geifman & El-Yaniv 2017; Geifman et al. 2019]."""
    return risks(probs, labels).mean().item()


def risk_coverage_curve(
    probs: Float[Tensor, "*batch C"], labels: Int[Tensor, "*batch"], n_points: int = 100
) -> RiskCoverageCurve:
    """The curve at `n_points` equally spaced shares, or at each example where there are fewer.

    Args:
        probs: predicted probabilities; leading dimensions count as examples.
        labels: class numbers from 0.
        n_points: number of shares.

    Raises:
        ValueError: `probs` are not probabilities, shapes or labels do not fit, or `n_points` is below 1.
    """
    whole_number("n_points", n_points, least=1)
    log_probs, labels = to_log_probs(probs, labels, kind=OutputKind.PROBS)
    risk = risks(log_probs.exp(), labels).tolist()
    n = len(risk)
    n_points = min(n_points, n)
    covered = [math.ceil(n * (i + 1) / n_points) for i in range(n_points)]
    return RiskCoverageCurve(tuple(k / n for k in covered), tuple(risk[k - 1] for k in covered))


def risks(probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Fraction of errors among the k most confident examples, k = 1 … N, float64.

    Equally confident examples are in random order, of which this is the mean, so that the order of the data does not count.
    """
    wrong = probs.argmax(-1).ne(labels).double()
    values, group, count = doubt(probs).unique(sorted=True, return_inverse=True, return_counts=True)
    wrong_share = torch.zeros_like(values, dtype=torch.float64).index_add_(0, group, wrong) / count
    k = torch.arange(1, len(wrong) + 1, device=wrong.device)
    return wrong_share.repeat_interleave(count).cumsum(0) / k
