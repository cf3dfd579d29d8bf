"""Reliability curves: how often the top label is right, by the confidence given to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.metrics.classification import OutputKind, to_log_probs
from laplace_ws.records import from_dict
from laplace_ws.values import whole_number


@dataclass(frozen=True)
class ReliabilityCurve:
    """Mean confidence, accuracy and number of examples in each of B equal bins of the top label's probability.

    Attributes:
        edges: the B + 1 borders of the bins, from 0 to 1; equal bins if none is given. A bin includes its lower border; the last bin
            also includes 1.
        confidence: mean probability of the top label by bin, None where the bin is empty.
        accuracy: fraction of examples whose top label is right by bin, None where the bin is empty.
        count: number of examples by bin.
    """

    edges: tuple[float, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    count: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.edges:
            n_bins = max(len(self.count), 1)
            object.__setattr__(self, "edges", tuple(b / n_bins for b in range(n_bins + 1)))
        lengths = (len(self.edges) - 1, len(self.confidence), len(self.accuracy), len(self.count))
        if len(set(lengths)) != 1 or not self.count:
            raise ValueError(
                "a reliability curve of B bins needs B + 1 edges and B values of confidence, accuracy and count; "
                f"got {len(self.edges)}, {len(self.confidence)}, {len(self.accuracy)} and {len(self.count)}"
            )
        for confidence, accuracy, count in zip(self.confidence, self.accuracy, self.count, strict=True):
            if count and (confidence is None or accuracy is None):
                raise ValueError(f"a bin with {count} examples needs a confidence and an accuracy")

    @property
    def n_examples(self) -> int:
        """Number of examples in all bins."""
        return sum(self.count)

    @property
    def ece(self) -> float:
        """Expected calibration error, Σ_b (n_b / N) |accuracy_b − confidence_b| [Naeini et al. 2015].

        NaN without examples.
        """
        if not self.n_examples:
            return float("nan")
        gaps = (
            count * abs(accuracy - confidence)
            for confidence, accuracy, count in zip(self.confidence, self.accuracy, self.count, strict=True)
            if confidence is not None and accuracy is not None
        )
        return sum(gaps) / self.n_examples

    def to_dict(self) -> dict[str, tuple[Any, ...]]:
        """Plain values for JSON; None stands for an empty bin."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "a reliability curve") -> ReliabilityCurve:
        """The curve of `to_dict`; without `edges`, the bins are taken to be equal.

        Args:
            values: lists by name.
            where: the file and the place in it, for messages.

        Raises:
            RecordError: if a list is missing or the lists do not fit together.
        """
        return from_dict(cls, {"edges": [], **values}, where)


def reliability_curve(
    probs: Float[Tensor, "*batch C"], labels: Int[Tensor, "*batch"], n_bins: int = 15
) -> ReliabilityCurve:
    """Bin the examples by the probability of their top label.

    Args:
        probs: predicted probabilities; leading dimensions count as examples.
        labels: class numbers from 0.
        n_bins: number of equal bins on [0, 1].

    Raises:
        ValueError: if `probs` are not probabilities, shapes or labels do not fit, or `n_bins` is below 1.
    """
    if whole_number("n_bins", n_bins) < 1:
        raise ValueError(f"n_bins is {n_bins}; give at least 1")
    log_probs, labels = to_log_probs(probs, labels, kind=OutputKind.PROBS)
    confidence, top_label = log_probs.exp().max(-1)
    right = top_label.eq(labels).double()

    # float32, as torchmetrics bins: a confidence on a border falls on the same side of it
    edges = torch.linspace(0, 1, n_bins + 1, device=confidence.device)
    bins = (torch.bucketize(confidence.float(), edges, right=True) - 1).clamp(0, n_bins - 1)
    count = torch.bincount(bins, minlength=n_bins)
    confidence_sum = torch.zeros(n_bins, dtype=torch.float64, device=bins.device).index_add_(0, bins, confidence)
    right_sum = torch.zeros(n_bins, dtype=torch.float64, device=bins.device).index_add_(0, bins, right)

    counts = count.tolist()
    return ReliabilityCurve(
        (),
        tuple(total / n if n else None for total, n in zip(confidence_sum.tolist(), counts, strict=True)),
        tuple(total / n if n else None for total, n in zip(right_sum.tolist(), counts, strict=True)),
        tuple(counts),
    )
