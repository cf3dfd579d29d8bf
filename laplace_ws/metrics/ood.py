"""Detecting inputs that are unlike the training data, by how uncertain a classifier is about them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.metrics.classification import OutputKind, doubt, to_log_probs
from laplace_ws.metrics.uncertainty import entropy
from laplace_ws.registry import Choice
from laplace_ws.values import tensor

TRUE_POSITIVE_RATE = 0.95


class OodScore(Choice):
    """The measure of how unusual an input is, from 0 (certain) towards 1: 1 − max_c p_c, or the entropy in units of log C."""

    CONFIDENCE = "confidence"
    ENTROPY = "entropy"


def ood_scores(probs: Float[Tensor, "*batch C"], score: OodScore | str = OodScore.CONFIDENCE) -> Float[Tensor, " N"]:
    """How unusual each input looks, float64; leading dimensions are merged.

    Args:
        probs: predicted probabilities.
        score: "confidence": the summed probability of all classes but the top one, which is 1 − max p without its cancellation
            [Hendrycks & Gimpel 2017]; "entropy": −Σ_c p_c log p_c / log C.

    Raises:
        ValueError: if `probs` are not probabilities, or the score is unknown.
    """
    score = OodScore(score)
    tensor("probs", probs, "[N, C] of probabilities")
    no_labels = torch.zeros(probs.shape[:-1], dtype=torch.long, device=probs.device)
    log_probs, _ = to_log_probs(probs, no_labels, kind=OutputKind.PROBS)
    p = log_probs.exp()
    if score is OodScore.CONFIDENCE:
        return doubt(p)
    return entropy(p) / math.log(p.shape[-1])


def ood_detection(scores_in: Float[Tensor, " N"], scores_out: Float[Tensor, " M"]) -> dict[str, float]:
    """Score the detector that calls an input out-of-distribution where its score lies above a threshold.

    Args:
        scores_in: scores of inputs like the training data, on any scale.
        scores_out: scores of inputs from elsewhere, the positives.

    Returns:
        `auroc`: probability that an input from elsewhere has the higher score, ties counted as one half; `fpr95`: smallest share of the
        inputs like the training data that are called out-of-distribution, by a threshold that finds 95 % of the others
        [Hendrycks et al. 2019].

    Raises:
        ValueError: if either is empty or holds NaN.
    """
    # torchmetrics takes seconds to import, see classification.py
    from torchmetrics.functional.classification import binary_auroc, binary_roc

    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        tensor(name, scores, "[N], one number per input", 1)
        if not len(scores) or scores.isnan().any():
            raise ValueError(f"{name} must hold one number at least, and no NaN; the model may have diverged")
    # torchmetrics squeezes scores beyond [0, 1] by a sigmoid, which makes small ones equal; only their order counts
    values, rank = torch.cat([scores_in, scores_out]).double().unique(return_inverse=True)
    scores = rank.double() / len(values)
    target = _is_out(len(scores_in), len(scores_out), scores.device)
    false_positive_rate, true_positive_rate, _ = binary_roc(scores, target)
    return {
        "auroc": binary_auroc(scores, target).item(),
        "fpr95": false_positive_rate[true_positive_rate >= TRUE_POSITIVE_RATE].min().item(),
    }


def _is_out(n_in: int, n_out: int, device: torch.device) -> Int[Tensor, " N"]:
    return torch.cat([torch.zeros(n_in, dtype=torch.long), torch.ones(n_out, dtype=torch.long)]).to(device)
