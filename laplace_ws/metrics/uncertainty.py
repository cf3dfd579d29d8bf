"""The uncertainty of a prediction, split into what more data could remove (epistemic) and what they could not (aleatoric)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.metrics.classification import OutputKind, to_log_probs
from laplace_ws.values import tensor


@dataclass(frozen=True, eq=False)
class UncertaintySplit:
    """Uncertainty of each prediction in nats, float64.

    Attributes:
        total: entropy of the mean prediction.
        aleatoric: mean entropy of the predictions.
    """

    total: Float[Tensor, " N"]
    aleatoric: Float[Tensor, " N"]

    @property
    def epistemic(self) -> Float[Tensor, " N"]:
        """Mutual information of label and sample: what the samples disagree about; at least 0, to rounding."""
        return self.total - self.aleatoric


def uncertainty_split(probs: Float[Tensor, "S N C"]) -> UncertaintySplit:
    """Split the uncertainty of the mean over sampled predictions [Depeweg et al. 2018].

    Args:
        probs: class probabilities of each sample, such as a member of an ensemble or a network drawn from a posterior.

    Raises:
        ValueError: they are not probabilities, or there is no sample.
    """
    tensor("probs", probs, "[S, N, C] of probabilities", 3)
    no_labels = torch.zeros(probs.shape[:-1], dtype=torch.long, device=probs.device)
    log_probs, _ = to_log_probs(probs, no_labels, kind=OutputKind.PROBS)
    p = log_probs.exp().view_as(probs)
    return UncertaintySplit(entropy(p.mean(0)), entropy(p).mean(0))


def entropy(probs: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch"]:
    """−Σ_c p_c log p_c, in nats."""
    return torch.special.entr(probs).sum(-1)
