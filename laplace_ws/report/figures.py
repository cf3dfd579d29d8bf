"""Pictures of training (evidence and losses over epochs) and of calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laplace_ws.metrics.reliability import ReliabilityCurve
from laplace_ws.report.records import TUNED, EpochRecord, RunRecord, run_label
from laplace_ws.report.style import (
    GREY,
    Picture,
    RunStyle,
    legend_below,
    plain,
    report_style,
    run_styles,
    to_svg,
)

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Epochs and values by run."""

_MARKERS_A_LINE = 7
_LETTERS_BESIDE_A_NUMBER = 18
_WILSON_Z = 1.96


def training_pictures(record: RunRecord) -> list[Picture]:
    """Log marginal likelihood, training loss and test NLL over epochs; those never computed are left out."""
    pictures = [
        _over_epochs(
            record,
            lambda epoch: epoch.log_marginal_likelihood,
            "Log marginal likelihood",
            "log marginal likelihood [nats]",
            higher_is_better=True,
        ),
        _over_epochs(record, lambda epoch: epoch.train_nll, "Training loss", "training NLL [nats/example]"),
        _over_epochs(record, lambda epoch: epoch.test_nll, "Test NLL", "test NLL [nats/example]"),
    ]
    return [picture for picture in pictures if picture is not None]


def reliability_pictures(record: RunRecord) -> list[Picture]:
    """A reliability diagram for every model that has one, the tuned one last."""
    styles = run_styles(record)
    models = (*record.fixed, record.tuned)
    return [
        reliability_picture(model.label, curve, styles[model.run], ece=model.test_ece, bold=model.is_tuned)
        for model in models
        if (curve := model.reliability) is not None
    ]


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """95 % confidence interval of a proportion [Wilson 1927]."""
    p, z = successes / n, _WILSON_Z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def readable_limit(series: Series, *, higher_is_better: bool) -> float | None:
    """Where to cut the bad end of an axis so that the better runs can be told apart; None where nothing need be cut.

    The tuned run and the better half of the others, without their worst twentieth of epochs, decide on the range.
    """
    sign = -1.0 if higher_is_better else 1.0
    losses = {run: sign * values for run, (_, values) in series.items()}
    by_end = sorted(losses, key=lambda run: losses[run][-1])
    decisive = {*by_end[: math.ceil(len(by_end) / 2)], *({TUNED} & set(losses))}
    best = min(values.min() for values in losses.values())
    worst = max(values.max() for values in losses.values())
    core = np.concatenate([losses[run] for run in decisive])
    limit = max(float(np.quantile(core, 0.95)), *(losses[run][-1] for run in decisive), best)
    if limit <= best or worst - best <= 2.0 * (limit - best):
        return None
    return sign * (limit + 0.1 * (limit - best))


def _over_epochs(
    record: RunRecord,
    value: Callable[[EpochRecord], float | None],
    title: str,
    y_label: str,
    *,
    higher_is_better: bool = False,
) -> Picture | None:
    series = _series(record, value)
    if not series:
        return None
    values = np.concatenate([v for _, v in series.values()])
    logarithmic = bool(values.min() > 0 and values.max() > 30 * values.min())
    limit = None if logarithmic else readable_limit(series, higher_is_better=higher_is_better)
    with report_style():
        figure = Figure(figsize=(3.9, 3.5), layout="constrained")
        axes = figure.subplots()
        if logarithmic:
            axes.set_yscale("log")
        for offset, (run, style) in enumerate(run_styles(record).items()):
            if run in series:
                _draw_run(axes, *series[run], run, style, offset)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        caption = _cut_axis(axes, series, record, limit, higher_is_better=higher_is_better) if limit is not None else ""
        legend_below(figure, axes)
        svg = to_svg(figure)
    ends = ", ".join(f"{run_label(run)} {v[-1]:.4g}" for run, (_, v) in series.items())
    return Picture(title, f"{title} over epochs; last values: {ends}.", svg, caption)


def _series(record: RunRecord, value: Callable[[EpochRecord], float | None]) -> Series:
    series = {}
    for run, epochs in record.history.items():
        pairs = [(epoch.epoch, value(epoch)) for epoch in epochs]
        finite = [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]
        if finite:
            series[run] = (np.array([x for x, _ in finite]), np.array([y for _, y in finite]))
    return series


def _draw_run(axes: Axes, epochs: np.ndarray, values: np.ndarray, run: str, style: RunStyle, offset: int) -> None:
    step = max(1, len(epochs) // _MARKERS_A_LINE)
    axes.plot(
        epochs,
        values,
        label=plain(run_label(run)),
        color=style.color,
        linestyle=style.linestyle,
        marker=style.marker,
        markevery=(offset % step, step),
        linewidth=style.linewidth,
        zorder=style.zorder,
    )


def _cut_axis(axes: Axes, series: Series, record: RunRecord, limit: float, *, higher_is_better: bool) -> str:
    """Cut the axis at `limit`, mark the runs that end beyond it, and say in words where they end."""
    styles = run_styles(record)
    values = np.concatenate([v for _, v in series.values()])
    best = values.max() if higher_is_better else values.min()
    margin = 0.05 * (best - limit)
    axes.set_ylim(*sorted((limit, best + margin)))
    beyond = []
    for offset, (run, (epochs, run_values)) in enumerate(series.items()):
        outside = run_values < limit if higher_is_better else run_values > limit
        if not outside[-1]:
            continue
        marked = epochs[outside][offset :: max(1, len(epochs) // _MARKERS_A_LINE)]
        axes.plot(
            marked,
            np.full(len(marked), limit + 0.4 * margin),
            linestyle="",
            marker="v" if higher_is_better else "^",
            color=styles[run].color,
            markersize=5,
            zorder=4,
        )
        beyond.append(f"{run_label(run)} ends at {run_values[-1]:,.5g}")
    side = "below" if higher_is_better else "above"
    if not beyond:
        return f"The axis is cut; some early epochs lie {side} it."
    return f"The axis is cut; triangles mark runs that end {side} it: {'; '.join(beyond)}."


def reliability_picture(
    label: str, curve: ReliabilityCurve, style: RunStyle, *, ece: float | None = None, bold: bool = False
) -> Picture:
    """A reliability diagram over the number of examples by bin; the calibration error is the curve's where none is given."""
    bins = filled_bins(curve)
    confidence, accuracy, count = (np.array(column, dtype=float) for column in zip(*bins, strict=True))
    intervals = np.array([wilson_interval(a * n, n) for a, n in zip(accuracy, count, strict=True)])
    ece = curve.ece if ece is None else ece
    with report_style():
        figure = Figure(figsize=(3.1, 3.7), layout="constrained")
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.vlines(confidence, *intervals.T, color=style.color, linewidth=1.0, alpha=0.6)
        axes.plot(confidence, accuracy, color=style.color, marker=style.marker, linewidth=1.2, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("accuracy")
        axes.set_title(with_number(label, f"ECE {100 * ece:.1f} %"), fontweight="bold" if bold else "normal")
        edges = np.array(curve.edges)
        counts.bar(edges[:-1], curve.count, np.diff(edges), align="edge", color=style.color, edgecolor="white")
        counts.set_ylabel("examples")
        counts.set_xlabel("confidence (probability of the top label)")
        counts.set_yscale("log")  # else the bins of a few examples cannot be seen
        counts.set_ylim(0.7, 2.0 * count.max())
        counts.grid(axis="x", visible=False)
        figure.align_ylabels()
        svg = to_svg(figure)
    words = "; ".join(f"{c:.2f}: {a:.2f} of {int(n)}" for c, a, n in bins)
    return Picture(label, f"Accuracy by confidence, {label}: {words}.", svg)


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
