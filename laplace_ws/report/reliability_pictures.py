"""Reliability diagrams: how often the top label is right, by the confidence given to it."""

from __future__ import annotations

import math

import numpy as np

from laplace_ws.metrics import ReliabilityCurve
from laplace_ws.report.records import RunRecord
from laplace_ws.report.style import GREY, Picture, RunStyle, drawing, plain, run_styles

_LETTERS_BESIDE_A_NUMBER = 18
_WILSON_Z = 1.96
CONFIDENCE = "confidence (probability of the top label)"


def model_reliability_pictures(record: RunRecord) -> list[Picture]:
    """A reliability diagram for every model that has one, the tuned one last."""
    styles = run_styles(record)
    return [
        reliability_picture(model.label, curve, styles[model.run], ece=model.test_ece, bold=model.is_tuned)
        for model in (*record.fixed, record.tuned)
        if (curve := model.reliability) is not None and curve.n_examples
    ]


def reliability_picture(
    label: str, curve: ReliabilityCurve, style: RunStyle, *, ece: float | None = None, bold: bool = False
) -> Picture:
    """A reliability diagram over the number of examples by bin; the calibration error is the curve's where none is given."""
    bins = filled_bins(curve)
    confidence, accuracy, count = (np.array(column, dtype=float) for column in zip(*bins, strict=True))
    intervals = np.array([wilson_interval(a * n, n) for a, n in zip(accuracy, count, strict=True)])
    ece = curve.ece if ece is None else ece
    with drawing(3.1, 3.7, 2, sharex=True, height_ratios=(3, 1)) as drawn:
        axes, counts = drawn.axes
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.vlines(confidence, *intervals.T, color=style.color, linewidth=1.0, alpha=0.6)
        axes.plot(confidence, accuracy, color=style.color, marker=style.marker, linewidth=1.2, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
        axes.set_title(with_number(label, f"ECE {100 * ece:.1f} %"), fontweight="bold" if bold else "normal")
        edges = np.array(curve.edges)
        counts.bar(edges[:-1], curve.count, np.diff(edges), align="edge", color=style.color, edgecolor="white")
        # logarithmic, else the bins of a few examples cannot be seen
        counts.set(ylabel="examples", xlabel=CONFIDENCE, yscale="log", ylim=(0.7, 2.0 * count.max()))
        counts.grid(axis="x", visible=False)
        drawn.figure.align_ylabels()
    words = "; ".join(f"{c:.2f}: {a:.2f} of {int(n)}" for c, a, n in bins)
    return Picture(label, f"Accuracy by confidence, {label}: {words}.", drawn.svg)


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """95 % confidence interval of a proportion [Wilson 1927]."""
    p, z = successes / n, _WILSON_Z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def with_number(label: str, number: str) -> str:
    """Title of a small picture: a label and a figure, on two lines where one would be too narrow."""
    separator = "   " if len(label) <= _LETTERS_BESIDE_A_NUMBER else "\n"
    return f"{plain(label)}{separator}{number}"


def filled_bins(curve: ReliabilityCurve) -> list[tuple[float, float, int]]:
    """Confidence, accuracy and number of examples of the bins that hold any."""
    return [
        (confidence, accuracy, count)
        for confidence, accuracy, count in zip(curve.confidence, curve.accuracy, curve.count, strict=True)
        if count and confidence is not None and accuracy is not None
    ]
