"""A metric of predictions that come batch by batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class RunningNLLMetric(Metric):
    """Mean negative log probability of labels in nats.

    Args:
        ignore_index: the label of what does not count.
    """

    nll_sum: Tensor
    n_valid_labels: Tensor

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        for name in ("nll_sum", "n_valid_labels"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probs: Float[Tensor, "... C"], targets: Int[Tensor, ...]) -> None:
        """Take in a batch."""
        log_probs = probs.flatten(0, -2).log()
        nll = F.nll_loss(log_probs, targets.flatten(), ignore_index=self.ignore_index, reduction="sum")
        self.nll_sum += nll
        self.n_valid_labels += (targets != self.ignore_index).sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all batches."""
        return self.nll_sum / self.n_valid_labels
