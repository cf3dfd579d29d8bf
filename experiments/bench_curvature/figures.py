"""Pictures of a benchmark: bars of time by contestant and case, and curves of cost."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench_curvature.tables import Result, Row
from laplace_ws.report.style import GREY, TUNED_COLOUR, plain, report_style, to_svg

_PEER_COLOUR = "#0072B2"
_LINES = {"reduce": (TUNED_COLOUR, "o"), "expand": (_PEER_COLOUR, "s")}
_X_LABELS = {"batch_size": "images of a batch", "n_classes": "classes"}


def pictures(result: Result) -> dict[str, bytes]:
    """SVG files by the end of their name; those with nothing to show are left out."""
    made = {"": bars(result), "_curves": curves(result)}
    return {end: svg for end, svg in made.items() if svg is not None}


def bars(result: Result) -> bytes | None:
    """A panel for each case, a bar for each contestant: median time in training steps, quartiles as lines."""
    approxes, curvatures = (
        list(dict.fromkeys(row[k] for row in result["cases"])) for k in ("kfac_approx", "curvature")
    )
    names = list(result["contestants"])
    if not names or not approxes or not curvatures:
        return None
    with report_style():
        size = (1.4 + 2.6 * len(curvatures), 0.7 + (0.6 + 0.21 * len(names)) * len(approxes))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(approxes), len(curvatures), sharey=True, squeeze=False)
        for i, approx in enumerate(approxes):
            for j, curvature in enumerate(curvatures):
                rows = [r for r in result["cases"] if (r["kfac_approx"], r["curvature"]) == (approx, curvature)]
                _draw_bars(panels[i, j], rows)
                panels[i, j].set_title(f"{approx}, {curvature}")
                if i == len(approxes) - 1:
                    panels[i, j].set_xlabel("training steps a batch")
        panels[0, 0].set_yticks(range(len(names)), [plain(name) for name in names])
        panels[0, 0].set_ylim(len(names) - 0.5, -0.5)
        return to_svg(figure)


def _draw_bars(axes: Axes, rows: list[Row]) -> None:
    top = max((r["in_training_steps"]["q3"] for r in rows if not r["error"]), default=1.0)
    for y, row in enumerate(rows):
        colour = TUNED_COLOUR if row["contestant"].startswith("ours-") else _PEER_COLOUR
        if row["error"]:
            axes.text(0.02 * top, y, _reason(row["error"]), va="center", fontsize=7, color=GREY)
            continue
        steps = row["in_training_steps"]
        axes.barh(y, steps["median"], color=colour, height=0.7)
        axes.hlines(y, steps["q1"], steps["q3"], color="black", linewidth=1.0)
        axes.text(steps["q3"] + 0.02 * top, y, f"{steps['median']:.2f}", va="center", fontsize=7)
    axes.axvline(1.0, color=GREY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
    axes.set_xlim(0, 1.18 * max(top, 1.0))
    axes.grid(axis="y", visible=False)


def _reason(error: str) -> str:
    """The kind of an error: "not offered", "NotImplementedError", "unmeasured (no GPU)"."""
    return error.partition(":")[0]


def curves(result: Result) -> bytes | None:
    """Time by batch size and by number of classes, each with its straight line; and factor updates where they were measured."""
    panels = [(axis, [r for r in result["curves"] if r["axis"] == axis and not r["error"]]) for axis in _X_LABELS]
    panels = [(axis, rows) for axis, rows in panels if rows]
    updates = [row for row in result["updates"] if not row["error"]]
    n_panels = len(panels) + bool(updates)
    if not n_panels:
        return None
    with report_style():
        figure = Figure(figsize=(3.4 * n_panels, 3.2), layout="constrained")
        all_axes = figure.subplots(1, n_panels, squeeze=False)[0]
        for axes, (axis, rows) in zip(all_axes, panels, strict=False):
            for row in rows:
                _draw_curve(axes, row)
            axes.set_title("One batch, exact GGN")
            axes.set_xlabel(_X_LABELS[axis])
        if updates:
            _draw_updates(all_axes[-1], updates)
        all_axes[0].set_ylabel("ms")
        for axes in all_axes:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left")  # times grow to the right
        return to_svg(figure)


def _draw_curve(axes: Axes, row: Row) -> None:
    colour, marker = _LINES[row["kfac_approx"]]
    x = np.array([point["value"] for point in row["points"]])
    median, q1, q3 = (np.array([1e3 * p["seconds"][key] for p in row["points"]]) for key in ("median", "q1", "q3"))
    line, label = row["line"], row["kfac_approx"]
    if line:
        axes.plot(x, 1e3 * (line["intercept"] + line["slope"] * x), color=colour, linestyle="--", linewidth=1.0)
        label = f"{label}, R² {line['r_squared']:.4f}"
    axes.errorbar(x, median, [median - q1, q3 - median], color=colour, marker=marker, linestyle="", label=label)


def _draw_updates(axes: Axes, rows: list[Row]) -> None:
    precisions = dict.fromkeys(row["precision"] for row in rows)
    for precision, style in zip(precisions, ("-", "--", ":"), strict=False):
        for approx, (colour, marker) in _LINES.items():
            points = [r for r in rows if (r["precision"], r["kfac_approx"]) == (precision, approx)]
            x, y = [r["batch_size"] for r in points], [1e3 * r["seconds"]["median"] for r in points]
            axes.plot(x, y, color=colour, marker=marker, linestyle=style, label=f"{approx}, {precision}")
    axes.set_title("One factor update, ggn_mc")
    axes.set_xlabel("images of a batch")
