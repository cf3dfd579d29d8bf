"""Pictures that compare methods of prediction: reliability, risk by coverage, confidence in- and out-of-distribution, scores by damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from laplace_ws.calibration import MethodResult
from laplace_ws.metrics import METRICS
from laplace_ws.report.reliability_pictures import CONFIDENCE, filled_bins, reliability_picture, with_number
from laplace_ws.report.style import (
    GREY,
    TUNED_COLOUR,
    Picture,
    RunStyle,
    dashed_style,
    drawing,
    legend_below,
    plain,
)

_IN_COLOUR, _OUT_COLOUR = "#0072B2", TUNED_COLOUR
_MARKERS_A_LINE = 8
FEWEST_IN_A_BIN = 10
"""Bins of fewer images are left out where all methods are drawn together, as their accuracy is mostly chance."""


def method_styles(methods: Sequence[MethodResult]) -> dict[str, RunStyle]:
    """A style by method: the first, with which the others are compared, solid."""
    styles = {methods[0].name: RunStyle(TUNED_COLOUR, "-", "o", 2.2, 3.0)}
    return styles | {method.name: dashed_style(i) for i, method in enumerate(methods[1:])}


def method_reliability_pictures(methods: Sequence[MethodResult]) -> list[Picture]:
    """All reliability curves together, then a diagram for each method."""
    styles = method_styles(methods)
    alone = [reliability_picture(m.label, m.reliability, styles[m.name], ece=m.test["ece"]) for m in methods]
    return [_reliability_together(methods, styles), *alone]


def risk_coverage_picture(methods: Sequence[MethodResult]) -> Picture:
    """The error of the most confident share of the test images, a line for each method."""
    styles = method_styles(methods)
    with drawing(6.0, 4.6) as drawn:
        axes = drawn.axes
        for offset, method in enumerate(methods):
            curve = method.risk_coverage
            step = max(1, len(curve.coverage) // _MARKERS_A_LINE)
            line = styles[method.name].line(method.label)
            shares, errors = (100 * np.array(values) for values in (curve.coverage, curve.risk))
            axes.plot(shares, errors, **line, markevery=(offset % step, step))
        axes.set(
            xlim=(0, 100), ylim=(0, None), xlabel="coverage: most confident share [%]", ylabel="risk: their error [%]"
        )
        axes.set_title("Risk by coverage")
        legend_below(drawn.figure, axes)
    areas = "; ".join(f"{m.label}: {'none' if (a := m.test['aurc']) is None else f'{100 * a:.2f} %'}" for m in methods)
    return Picture("Risk by coverage", f"Error of the most confident images by their share; areas: {areas}.", drawn.svg)


def confidence_pictures(methods: Sequence[MethodResult], data: str, ood: str) -> list[Picture]:
    """For each method, how confident it is on the test images and on out-of-distribution images.

    Args:
        methods: those without out-of-distribution images are left out.
        data: name of the test images.
        ood: name of the others.
    """
    return [
        _confidence(method, count, detection, data, ood)
        for method in methods
        if (count := method.ood_confidence) is not None and (detection := method.ood) is not None
    ]


def corruption_pictures(methods: Sequence[MethodResult]) -> list[Picture]:
    """For each corruption, accuracy, NLL and ECE of every method by strength."""
    corruptions = dict.fromkeys(entry.corruption for method in methods for entry in method.corrupted)
    return [_by_strength(methods, corruption) for corruption in corruptions]


def _reliability_together(methods: Sequence[MethodResult], styles: dict[str, RunStyle]) -> Picture:
    with drawing(3.6, 4.4) as drawn:
        axes = drawn.axes
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
        for method in methods:
            bins = [(c, a) for c, a, count in filled_bins(method.reliability) if count >= FEWEST_IN_A_BIN]
            axes.plot(*np.array(bins).reshape(-1, 2).T, **styles[method.name].line(method.label), clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect="equal", title="All methods", xlabel=CONFIDENCE, ylabel="accuracy")
        legend_below(drawn.figure, axes)
    errors = "; ".join(f"{method.label}: {100 * method.reliability.ece:.1f} %" for method in methods)
    return Picture("All methods", f"Accuracy by confidence of all methods; calibration errors: {errors}.", drawn.svg)


def _confidence(
    method: MethodResult, ood_count: Sequence[int], detection: Mapping[str, float], data: str, ood: str
) -> Picture:
    edges = np.array(method.reliability.edges)
    counts = {data: np.array(method.reliability.count), ood: np.array(ood_count)}
    shares = {name: 100 * count / count.sum() for name, count in counts.items()}
    with drawing(3.1, 2.9) as drawn:
        axes = drawn.axes
        for (name, share), colour in zip(shares.items(), (_IN_COLOUR, _OUT_COLOUR), strict=True):
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(share, edges, color=colour, linewidth=1.6, label=plain(name))
        title = with_number(method.label, f"AUROC {100 * detection['auroc']:.1f} %")
        axes.set(xlim=(0, 1), ylim=(0, None), title=title, xlabel=CONFIDENCE, ylabel="images [%]")
        legend_below(drawn.figure, axes)
    middles = (edges[1:] + edges[:-1]) / 2
    means = "; ".join(f"{name}: {share @ middles / 100:.2f}" for name, share in shares.items())
    return Picture(method.label, f"Histograms of confidence, {method.label}; means: {means}.", drawn.svg)


def _by_strength(methods: Sequence[MethodResult], corruption: str) -> Picture:
    styles = method_styles(methods)
    metrics = {name: metric for name, metric in METRICS.items() if metric.on_damaged}
    with drawing(3.9, 2.2 * len(metrics), len(metrics), sharex=True) as drawn:
        for axes, (score, metric) in zip(drawn.axes, metrics.items(), strict=True):
            for method in methods:
                strengths, values = _curve(method, corruption, score)
                axes.plot(strengths, metric.scale * values, **styles[method.name].line(method.label))
            axes.set(ylabel=f"{metric.title} [{metric.unit}]" if metric.unit else metric.title, ylim=(0, None))
        drawn.axes[0].set_title(corruption.capitalize())
        drawn.axes[-1].set_xlabel("strength (0: undamaged)")
        drawn.axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn.figure.align_ylabels()
        legend_below(drawn.figure, drawn.axes[0])
    worst = "; ".join(
        f"{method.label}: {100 * _curve(method, corruption, 'accuracy')[1][-1]:.1f} %" for method in methods
    )
    return Picture(corruption, f"Scores by strength of {corruption}; accuracies at the strongest: {worst}.", drawn.svg)


def _curve(method: MethodResult, corruption: str, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and values; NaN, which is not drawn, where a value is missing."""
    entries = [entry for entry in method.corrupted if entry.corruption == corruption]
    values = [np.nan if (value := entry.scores.get(score)) is None else value for entry in entries]
    return np.array([entry.strength for entry in entries]), np.array(values)
