"""The metrics by which classifiers are compared, and all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.metrics.classification import (
    OutputKind,
    accuracy,
    brier_score,
    calibration_error,
    mean_nll,
    to_log_probs,
)
from laplace_ws.metrics.selective import aurc
from laplace_ws.registry import Registry
from laplace_ws.values import whole_number


@dataclass(frozen=True)
class Metric:
    """A score of how well probabilities [N, C] fit labels [N], and how it is shown.

    Attributes:
        title: for tables and pictures.
        function: from probabilities (float64) and labels; where `is_binned`, also from a number of bins of confidence.
        unit: of what is shown; "" for none.
        decimals: number of decimals shown.
        scale: factor from the number to what is shown, such as 100 for a percentage.
        higher_is_better: None where it is not judged.
        is_binned: whether the function takes a number of bins.
        on_damaged: whether its mean over damaged images has a column of its own, and its values a picture.
    """

    title: str
    function: Callable[..., float]
    unit: str = ""
    decimals: int = 4
    scale: float = 1.0
    higher_is_better: bool | None = False
    is_binned: bool = False
    on_damaged: bool = False

    def __call__(self, probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"], n_bins: int) -> float:
        """The number, in units of the function."""
        return float(self.function(probs, labels, n_bins) if self.is_binned else self.function(probs, labels))


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "accuracy": Metric("accuracy", accuracy, "%", 2, scale=100.0, higher_is_better=True, on_damaged=True),
        "nll": Metric("NLL", lambda probs, labels: mean_nll(probs.log(), labels).item(), "nats", on_damaged=True),
        "brier": Metric("Brier", brier_score),
        "ece": Metric("ECE", calibration_error, "%", 2, scale=100.0, is_binned=True, on_damaged=True),
        "aurc": Metric("AURC", aurc, "%", 2, scale=100.0),
    },
)
"""Metrics by name; each one registered here is computed, and shown by `laplace-ws calibrate`."""


def evaluate_classification(
    outputs: Float[Tensor, "*batch C"],
    labels: Int[Tensor, "*batch"],
    n_bins: int = 15,
    *,
    kind: OutputKind | str = OutputKind.AUTO,
) -> dict[str, float]:
    """Score a predictive against the observed labels.

    Every leading dimension counts as examples, so `[N, C]` with labels `[N]` and `[N, T, C]` with `[N, T]` both do.

    Args:
        outputs: logits or probabilities.
        labels: class numbers from 0.
        n_bins: number of equal confidence bins of the calibration error.
        kind: "logits", "probs", or "auto": probabilities where every row is non-negative and sums to one.

    Returns:
        The value of each entry of `METRICS`: `accuracy` (fraction), `nll` (mean, nats), `brier` (mean squared distance to the one-hot
        label, from 0 to 2), `ece` (expected calibration error of the top label, fraction), `aurc` (area under the risk-coverage curve,
        fraction), and those that were registered since.

    Raises:
        ValueError: if shapes or labels do not fit, a value is NaN, or rows sum to one only approximately.
    """
    n_bins = whole_number("n_bins", n_bins, least=1)
    log_probs, labels = to_log_probs(outputs, labels, kind=kind)
    probs = log_probs.exp()
    scores = {name: metric(probs, labels, n_bins) for name, metric in METRICS.items()}
    # The logarithm is finite even where the probability underflows.
    return scores | {"nll": mean_nll(log_probs, labels).item()}
