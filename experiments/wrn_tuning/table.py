"""Tables and picture of the study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from calibrate import mean_and_error
from matplotlib.axes import Axes

from laplace_ws.report.style import GREY, TUNED_COLOUR, drawing
from laplace_ws.tables import ABSENT
from wrn_tuning.config import TUNED, StudyConfig
from wrn_tuning.measure import Figures

Table = Mapping[str, Sequence[Figures]]
"""By name of the row, the figures of the seeds that are there."""

_COLUMNS: tuple[tuple[str, Callable[[Figures], float | None], float, int], ...] = (
    ("weight decay", lambda f: f.weight_decay, 1, 6),
    ("test NLL [nats]", lambda f: f.test_nll, 1, 3),
    ("accuracy [%]", lambda f: f.test_accuracy, 100, 1),
    ("ECE [%]", lambda f: f.test_ece, 100, 1),
    ("evidence, expand [nats]", lambda f: f.evidence_expand, 1, 0),
    ("evidence, own [nats]", lambda f: f.evidence_own, 1, 0),
    ("gradient steps [min]", lambda f: f.gradient_seconds, 1 / 60, 1),
    ("tunings [min]", lambda f: f.tuning_seconds, 1 / 60, 1),
    ("search [min]", lambda f: f.search_seconds, 1 / 60, 1),
    ("all [min]", lambda f: f.total_seconds, 1 / 60, 1),
)
_PARTS = ("fit", "eigenvalues", "hypersteps")


def as_markdown(config: StudyConfig, table: Table) -> str:
    """Mean ± standard error over the seeds of each row, then the parts of one tuning."""
    titles = [title for title, *_ in _COLUMNS]
    lines = ["| | seeds | " + " | ".join(titles) + " |", "|---" * (len(titles) + 2) + "|"]
    for name, figures in table.items():
        cells = [_cell([value(f) for f in figures], scale, decimals) for _, value, scale, decimals in _COLUMNS]
        lines.append(f"| {name} | {len(figures)} | " + " | ".join(cells) + " |")
    lines += ["", "| one tuning [s] | " + " | ".join(_PARTS) + " |", "|---" * (len(_PARTS) + 1) + "|"]
    for name in (name for name in TUNED if name in table):
        parts = [f.tuning for f in table[name]]
        cells = [_cell([part and getattr(part, of) for part in parts], 1, 2) for of in _PARTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([f"{config.title}, {config.data.n_train:,} training images; CPU time of one thread.", "", *lines])


def _cell(values: Sequence[float | None], scale: float, decimals: int) -> str:
    known = [scale * value for value in values if value is not None]
    return mean_and_error(known, decimals) if known else ABSENT


def picture(config: StudyConfig, table: Table) -> bytes:
    """Test NLL against the CPU minutes of all that led to a network, means and standard errors: tuned, swept and searched."""
    with drawing(7.2, 3.8) as drawn:
        axes = drawn.axes
        for name, marker in zip(TUNED, "os", strict=True):
            _point(axes, table.get(name, ()), color=TUNED_COLOUR, marker=marker, label=f"tuned by {name}")
        fixed = {name: figures for name, figures in table.items() if name.startswith("wd-")}
        for i, figures in enumerate(fixed.values()):
            label = "fixed weight decays" if i == 0 else None
            _point(axes, figures, color=GREY, marker="x", label=label)
        if fixed:
            best = min(fixed.values(), key=lambda figures: statistics.mean(f.test_nll for f in figures))
            cost = sum(statistics.mean(f.total_seconds for f in figures) for figures in fixed.values())
            label = f"best of {len(fixed)} by test NLL"
            _point(axes, best, color="#0072B2", marker="D", markerfacecolor="white", label=f"{label}, its own cost")
            _point(axes, best, color="#0072B2", marker="D", label=f"{label}, cost of all", seconds=cost)
        searched = {name: figures for name, figures in table.items() if name.startswith("optuna-")}
        for (name, figures), marker in zip(searched.items(), cycle("^vP"), strict=False):
            _point(axes, figures, color="#009E73", marker=marker, label=f"Optuna, ×{name.removeprefix('optuna-')}")
        axes.set_xlabel("CPU minutes, one thread")
        axes.set_ylabel("test NLL [nats]")
        axes.set_title(config.title)
        axes.set_xlim(left=0)
        drawn.figure.legend(loc="outside right upper")
    return drawn.svg


def _point(axes: Axes, figures: Sequence[Figures], *, seconds: float | None = None, **style: Any) -> None:
    """Mean and standard error of some seeds, at their mean cost or at another one; nothing where there is none."""
    if not figures:
        return
    nll = [f.test_nll for f in figures]
    cost = statistics.mean(f.total_seconds for f in figures) if seconds is None else seconds
    error = statistics.stdev(nll) / math.sqrt(len(nll)) if len(nll) > 1 else 0.0
    axes.errorbar(cost / 60, statistics.mean(nll), error, linestyle="", **style)
