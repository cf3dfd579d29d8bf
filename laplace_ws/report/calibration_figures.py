"""Pictures of how methods to predict compare: reliability, confidence in- and out-of-distribution, scores by strength of damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laplace_ws.calibration import MethodResult
from laplace_ws.report.figures import filled_bins, reliability_picture, with_number
from laplace_ws.report.style import (
    GREY,
    TUNED_COLOUR,
    Picture,
    RunStyle,
    dashed_style,
    legend_below,
    plain,
    report_style,
    to_svg,
)

_IN_COLOUR, _OUT_COLOUR = "#0072B2", TUNED_COLOUR
FEWEST_IN_A_BIN = 10
"""Bins of fewer images are left out where all methods are drawn together, as their accuracy is mostly chance."""

_BY_STRENGTH = (("accuracy", "accuracy [%]", 100.0), ("nll", "NLL [nats/image]", 1.0), ("ece", "ECE [%]", 100.0))


def method_styles(methods: Sequence[MethodResult]) -> dict[str, RunStyle]:
    """A style by method: the first, with which the others are compared, solid."""
    styles = {methods[0].name: RunStyle(TUNED_COLOUR, "-", "o", 2.2, 3.0)}
    return styles | {method.name: dashed_style(i) for i, method in enumerate(methods[1:])}


def method_reliability_pictures(methods: Sequence[MethodResult]) -> list[Picture]:
    """All reliability curves together, then a diagram for each method."""
    styles = method_styles(methods)
    alone = [reliability_picture(m.label, m.reliability, styles[m.name], ece=m.test["ece"]) for m in methods]
    return [_reliability_together(methods, styles), *alone]


def confidence_pictures(methods: Sequence[MethodResult], data: str, ood: str) -> list[Picture]:
    """For each method, how sure it is of the test images and of images of other things.

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
    with report_style():
        figure = Figure(figsize=(3.6, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
        for method in methods:
            style = styles[method.name]
            bins = [(c, a) for c, a, count in filled_bins(method.reliability) if count >= FEWEST_IN_A_BIN]
            confidence, accuracy = np.array(bins).reshape(-1, 2).T
            axes.plot(
                confidence,
                accuracy,
                label=plain(method.label),
                color=style.color,
                linestyle=style.linestyle,
                marker=style.marker,
                linewidth=style.linewidth,
                zorder=style.zorder,
                clip_on=False,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_aspect("equal")
        axes.set_title("All methods")
        axes.set_xlabel("confidence (probability of the top label)")
        axes.set_ylabel("accuracy")
        legend_below(figure, axes)
        svg = to_svg(figure)
    errors = "; ".join(f"{method.label}: {100 * method.reliability.ece:.1f} %" for method in methods)
    return Picture("All methods", f"Accuracy by confidence of all methods; calibration errors: {errors}.", svg)


def _confidence(
    method: MethodResult, ood_count: Sequence[int], detection: Mapping[str, float], data: str, ood: str
) -> Picture:
    edges = np.array(method.reliability.edges)
    counts = {data: np.array(method.reliability.count), ood: np.array(ood_count)}
    shares = {name: 100 * count / count.sum() for name, count in counts.items()}
    with report_style():
        figure = Figure(figsize=(3.1, 2.9), layout="constrained")
        axes = figure.subplots()
        for (name, share), colour in zip(shares.items(), (_IN_COLOUR, _OUT_COLOUR), strict=True):
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(share, edges, color=colour, linewidth=1.6, label=plain(name))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, None)
        axes.set_title(with_number(method.label, f"AUROC {100 * detection['auroc']:.1f} %"))
        axes.set_xlabel("confidence (probability of the top label)")
        axes.set_ylabel("images [%]")
        legend_below(figure, axes)
        svg = to_svg(figure)
    middles = (edges[1:] + edges[:-1]) / 2
    means = "; ".join(f"{name}: {share @ middles / 100:.2f}" for name, share in shares.items())
    return Picture(method.label, f"Histograms of confidence, {method.label}; means: {means}.", svg)


def _by_strength(methods: Sequence[MethodResult], corruption: str) -> Picture:
    styles = method_styles(methods)
    with report_style():
        figure = Figure(figsize=(3.9, 6.6), layout="constrained")
        panels = figure.subplots(len(_BY_STRENGTH), 1, sharex=True)
        for axes, (score, y_label, scale) in zip(panels, _BY_STRENGTH, strict=True):
            for method in methods:
                strengths, values = _curve(method, corruption, score)
                style = styles[method.name]
                axes.plot(
                    strengths,
                    scale * values,
                    label=plain(method.label),
                    color=style.color,
                    linestyle=style.linestyle,
                    marker=style.marker,
                    linewidth=style.linewidth,
                    zorder=style.zorder,
                )
            axes.set_ylabel(y_label)
            axes.set_ylim(0, None)
        panels[0].set_title(corruption.capitalize())
        panels[-1].set_xlabel("strength (0: undamaged)")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels()
        legend_below(figure, panels[0])
        svg = to_svg(figure)
    worst = "; ".join(
        f"{method.label}: {100 * _curve(method, corruption, 'accuracy')[1][-1]:.1f} %" for method in methods
    )
    return Picture(corruption, f"Scores by strength of {corruption}; accuracies at the strongest: {worst}.", svg)


def _curve(method: MethodResult, corruption: str, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and values; NaN, which is not drawn, where a value is missing."""
    entries = [entry for entry in method.corrupted if entry.corruption == corruption]
    values = [np.nan if (value := entry.scores[score]) is None else value for entry in entries]
    return np.array([entry.strength for entry in entries]), np.array(values)
