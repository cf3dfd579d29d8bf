"""Medians, quartiles, ratios and straight lines of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of some measurements.

    Attributes:
        median: of the values.
        q1: lower quartile, by linear interpolation between the sorted values.
        q3: upper quartile.
        n: how many values.
    """

    median: float
    q1: float
    q3: float
    n: int


@dataclass(frozen=True)
class Line:
    """A straight line, slope·x + intercept, fitted by least squares.

    Attributes:
        slope: of the line.
        intercept: at x = 0.
        r_squared: share of the values' variance that the line explains.
    """

    slope: float
    intercept: float
    r_squared: float


def summarise(values: Sequence[float]) -> Summary:
    """Median and quartiles."""
    q1, median, q3 = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75))
    return Summary(float(median), float(q1), float(q3), len(values))


def ratios(values: Sequence[float], units: Sequence[float]) -> list[float]:
    """Each value in units of the one measured just before it."""
    return [value / unit for value, unit in zip(values, units, strict=True)]


def straight_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The line of least squares; None for fewer than three different x, which any line would fit."""
    if len(set(x)) < 3:
        return None
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    slope, intercept = np.polyfit(xs, ys, 1)
    residual = ((ys - slope * xs - intercept) ** 2).sum()
    total = ((ys - ys.mean()) ** 2).sum()
    return Line(float(slope), float(intercept), float(1 - residual / total) if total else 1.0)
