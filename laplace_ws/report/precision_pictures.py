"""Pictures of the tuned prior precision, parameter by parameter."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laplace_ws.experiment.records import TUNED
from laplace_ws.report.records import Model, RunRecord
from laplace_ws.report.style import (
    SEQUENTIAL,
    TUNED_COLOUR,
    Picture,
    common_prefix,
    drawing,
    legend_below,
    plain,
)
from laplace_ws.report.table import layers_of

_MOST_LINES = 8
_MOST_NAMES = 64
_WIDTH = 4.7
_ROW_HEIGHT = 0.175
_FIXED_COLOUR = "#0072B2"


def precision_over_epochs(record: RunRecord) -> list[Picture]:
    """Lines for a few parameters, a heatmap (parameter by epoch, in the order of the network) for more; none if never recorded."""
    table = _table_over_epochs(record)
    if table is None:
        return []
    names, epochs, values = table
    limits = robust_log_limits(values[:, [0, -1]])
    title = "Prior precision over epochs"
    are_few = len(names) <= _MOST_LINES
    with drawing(_WIDTH, 3.6 if are_few else _height(len(names))) as drawn:
        draw = _draw_lines if are_few else _draw_heatmap
        draw(drawn.figure, drawn.axes, names, epochs, values, limits)
        drawn.axes.set(title=title, xlabel="epoch")
        drawn.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    alt = f"{title} of {len(names)} parameters, from epoch {epochs[0]} to {epochs[-1]}; last values are in the table."
    return [Picture(title, alt, drawn.svg, _caption(names, values, limits))]


def final_precision(record: RunRecord) -> list[Picture]:
    """A dot for every parameter of the tuned model, with the best fixed prior precision for comparison; none if there is no value."""
    tuned = record.tuned
    precision = {name: value for name, value in tuned.prior_precision.items() if _is_positive(value)}
    if not precision:
        return []
    names, values = list(precision), np.array(list(precision.values()))
    best_fixed = _best_fixed(record)
    limits = robust_log_limits(np.append(values, best_fixed[1] if best_fixed else values[:0]))
    title = "Final prior precision"
    with drawing(_WIDTH, _height(len(names)) + 0.45) as drawn:
        axes = drawn.axes
        axes.set(xscale="log", xlim=limits)
        _draw_dots(axes, names, values, limits, set(tuned.collapsed))
        if best_fixed:
            axes.axvline(best_fixed[1], color=_FIXED_COLOUR, linestyle="--", linewidth=1.2, label=best_fixed[0])
        _name_rows(axes, names)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="prior precision δ", title=title)
        n_train = record.n_train
        top = axes.secondary_xaxis(
            "top", functions=(lambda d: np.divide(d, n_train), lambda w: np.multiply(w, n_train))
        )
        top.set_xlabel(f"weight decay δ/N, N = {n_train:,}")
        _number_few_ticks(axes.xaxis, limits)
        _number_few_ticks(top.xaxis, limits)
        axes.spines["top"].set_visible(True)
        legend_below(drawn.figure, axes)
    alt = f"{title} of {len(names)} parameters, from {values.min():.3g} to {values.max():.3g}; all are in the table."
    caption = _caption(names, values, limits)
    if absent := [name for name in tuned.prior_precision if name not in precision]:
        caption += f" Not drawn, for lack of a positive finite value: {', '.join(absent)}."
    return [Picture(title, alt, drawn.svg, caption.strip())]


def robust_log_limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of a logarithmic axis; a few values many decades away, as of a collapsed prior, are left outside."""
    logs = np.log10(values[np.isfinite(values) & (values > 0)])
    if not logs.size:
        return 0.1, 10.0
    low, high = np.quantile(logs, [0.05, 0.95])
    reach = max(1.0, high - low)
    inside = logs[(logs >= low - reach) & (logs <= high + reach)]
    margin = max(0.15, 0.06 * (inside.max() - inside.min()))
    return 10.0 ** (inside.min() - margin), 10.0 ** (inside.max() + margin)


def _table_over_epochs(record: RunRecord) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Names, epochs without gaps, and values [name, epoch]; an epoch that recorded none repeats the last one."""
    history = [epoch for epoch in record.history.get(TUNED, ()) if epoch.prior_precision]
    if not history:
        return None
    names = list(history[-1].prior_precision)
    recorded = {epoch.epoch: epoch.prior_precision for epoch in history}
    epochs = np.arange(history[0].epoch, history[-1].epoch + 1)
    values = np.full((len(names), len(epochs)), np.nan)
    for column, epoch in enumerate(epochs):
        if int(epoch) in recorded:
            values[:, column] = [recorded[int(epoch)].get(name, math.nan) for name in names]
        else:
            values[:, column] = values[:, column - 1]
    values[~(np.isfinite(values) & (values > 0))] = np.nan
    return None if np.isnan(values).all() else (names, epochs, values)


def _draw_lines(
    figure: Figure,
    axes: Axes,
    names: list[str],
    epochs: np.ndarray,
    values: np.ndarray,
    limits: tuple[float, float],
) -> None:
    # the palest end of the colour map is hard to see on white
    colours = matplotlib.colormaps[SEQUENTIAL](np.linspace(0.0, 0.8, len(names)))
    dashes = ("-", "--", "-.", ":")
    for i, name in enumerate(names):
        axes.plot(epochs, values[i], color=colours[i], linestyle=dashes[i % 4], label=plain(name))
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.set_ylabel("prior precision δ")
    legend_below(figure, axes)


def _draw_heatmap(
    figure: Figure,
    axes: Axes,
    names: list[str],
    epochs: np.ndarray,
    values: np.ndarray,
    limits: tuple[float, float],
) -> None:
    axes.grid(False)
    axes.set_facecolor("#dddddd")
    image = axes.imshow(
        values,
        aspect="auto",
        cmap=SEQUENTIAL,
        norm=LogNorm(*limits),
        extent=(epochs[0] - 0.5, epochs[-1] + 0.5, len(names) - 0.5, -0.5),
    )
    _name_rows(axes, names)
    above, below = np.nanmax(values) > limits[1], np.nanmin(values) < limits[0]
    extend = {(False, False): "neither", (True, False): "max", (False, True): "min", (True, True): "both"}
    colorbar = figure.colorbar(
        image,
        ax=axes,
        location="bottom",
        label="prior precision δ",
        extend=extend[bool(above), bool(below)],
        aspect=40,
        shrink=0.9,
        pad=0.01,
    )
    colorbar.outline.set_visible(False)


def _draw_dots(
    axes: Axes, names: list[str], values: np.ndarray, limits: tuple[float, float], collapsed: set[str]
) -> None:
    rows = np.arange(len(names))
    is_collapsed = np.array([name in collapsed for name in names])
    is_weight = np.array(["weight" in name.rsplit(".", 1)[-1] for name in names])
    groups = (
        ("weights", is_weight & ~is_collapsed, "o", TUNED_COLOUR, TUNED_COLOUR),
        ("biases and scalars", ~is_weight & ~is_collapsed, "D", TUNED_COLOUR, "white"),
        ("collapsed", is_collapsed, "X", "black", "black"),
    )
    outside = (values < limits[0]) | (values > limits[1])
    for label, members, marker, edge, face in groups:
        if members.any():
            shown = members & ~outside
            axes.plot(values[shown], rows[shown], marker, color=edge, markerfacecolor=face, markersize=4.5, label=label)
    for row in rows[outside]:
        high = values[row] > limits[1]
        axes.annotate(
            f"{values[row]:.1e} →" if high else f"← {values[row]:.1e}",
            (limits[1] if high else limits[0], row),
            ha="right" if high else "left",
            va="center",
            fontsize=7.5,
            fontweight="bold" if is_collapsed[row] else "normal",
        )


def _name_rows(axes: Axes, names: list[str]) -> None:
    step, prefix = math.ceil(len(names) / _MOST_NAMES), common_prefix(names)
    texts = [plain(name.removeprefix(prefix)) for name in names[::step]]
    axes.set_yticks(range(0, len(names), step), texts, fontsize=7.8)
    axes.tick_params(axis="y", length=0)


def _number_few_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """On a short logarithmic axis, label 1, 2 and 5 of each decade; matplotlib labels so many that they overlap."""
    if limits[1] < 100 * limits[0]:
        for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")


def _height(n_names: int) -> float:
    return 1.5 + _ROW_HEIGHT * min(max(n_names, 3), _MOST_NAMES)


def _caption(names: list[str], values: np.ndarray, limits: tuple[float, float]) -> str:
    sentences = []
    if len(names) > _MOST_LINES:
        sentences.append("Rows follow the network from input (top) to output.")
        if prefix := common_prefix(names):
            sentences.append(f"Names are written without “{prefix}”.")
    step = math.ceil(len(names) / _MOST_NAMES)
    if step > 1:
        sentences.append(f"Every row is drawn, one name in {step} is written.")
    finite = values[np.isfinite(values)]
    if finite.size < values.size:
        sentences.append("Grey or broken off: no positive finite value.")
    if finite.size and (finite.max() > limits[1] or finite.min() < limits[0]):
        sentences.append(f"The scale is cut; all values go from {finite.min():.3g} to {finite.max():.3g}.")
    return " ".join(sentences)


def _best_fixed(record: RunRecord) -> tuple[str, float] | None:
    """Label and value of the fixed prior precision with the lowest test NLL."""

    def nll(model: Model) -> float:
        return model.test_nll if model.test_nll is not None and math.isfinite(model.test_nll) else math.inf

    models = [m for m in record.fixed if m.prior_precision and nll(m) < math.inf]
    if not models:
        return None
    best = min(models, key=nll)
    values = set(layers_of(best.prior_precision).values())
    if len(values) != 1 or not _is_positive(value := values.pop()):
        return None
    return f"best {plain(best.label)}", value


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
