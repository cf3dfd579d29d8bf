"""Pictures of training: evidence and losses over epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from laplace_ws.experiment.records import TUNED
from laplace_ws.report.records import RunRecord, run_label
from laplace_ws.report.style import Picture, drawing, legend_below, run_styles

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Epochs and values by run."""

_MARKERS_A_LINE = 7


def value_over_epochs(
    name: str, title: str, y_label: str, record: RunRecord, *, higher_is_better: bool = False
) -> list[Picture]:
    """A value of the epochs' records over epochs, a line for each run; no picture where it was never computed.

    Args:
        name: of the field of `EpochRecord`.
        title: of the picture.
        y_label: with the unit.
        record: the run.
        higher_is_better: which end of the axis may be cut.
    """
    series = _series(record, name)
    if not series:
        return []
    values = np.concatenate([v for _, v in series.values()])
    logarithmic = bool(values.min() > 0 and values.max() > 30 * values.min())
    limit = None if logarithmic else readable_limit(series, higher_is_better=higher_is_better)
    with drawing(3.9, 3.5) as drawn:
        axes = drawn.axes
        if logarithmic:
            axes.set_yscale("log")
        for offset, (run, style) in enumerate(run_styles(record).items()):
            if run in series:
                step = max(1, len(series[run][0]) // _MARKERS_A_LINE)
                axes.plot(*series[run], **style.line(run_label(run)), markevery=(offset % step, step))
        axes.set(title=title, xlabel="epoch", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        caption = _cut_axis(axes, series, record, limit, higher_is_better=higher_is_better) if limit is not None else ""
        legend_below(drawn.figure, axes)
    ends = ", ".join(f"{run_label(run)} {v[-1]:.4g}" for run, (_, v) in series.items())
    return [Picture(title, f"{title} over epochs; last values: {ends}.", drawn.svg, caption)]


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


def _series(record: RunRecord, name: str) -> Series:
    series = {}
    for run, epochs in record.history.items():
        pairs = [(epoch.epoch, getattr(epoch, name)) for epoch in epochs]
        finite = [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]
        if finite:
            series[run] = (np.array([x for x, _ in finite]), np.array([y for _, y in finite]))
    return series


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
