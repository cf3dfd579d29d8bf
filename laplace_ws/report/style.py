"""Look of the report's pictures: colours, lines, font sizes, and how pictures get into the page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laplace_ws.experiment.records import TUNED
from laplace_ws.report.records import RunRecord

# Okabe & Ito 2008, told apart with every common kind of colour blindness; without yellow, too pale for a line on white
TUNED_COLOUR = "#D55E00"
_FIXED_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
# where six do not do: no two of all are nearer in CIELAB than the blues of Okabe & Ito
_FURTHER_COLOURS = ("#332288", "#999933", "#882255", "#777777", "#8B5A2B")
_FIXED_DASHES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_FIXED_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h")
GREY = "#666666"
SEQUENTIAL = "viridis"

_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.fonttype": "path",  # text as shapes: looks alike without the font
    "svg.hashsalt": "laplace_ws",  # equal runs give equal files
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
_IMAGE_DPI = 200
_LONGEST_TEXT = 32
_LEGEND_HANDLE_INCHES = 0.6
_LEGEND_LETTER_INCHES = 0.075


@dataclass(frozen=True)
class Picture:
    """An SVG picture with a title, the text that stands for it, and a note for the reader."""

    title: str
    alt: str
    svg: bytes
    caption: str = ""


@dataclass(frozen=True)
class RunStyle:
    """How a run is drawn, the same in every picture."""

    color: str
    linestyle: str | tuple[int, tuple[int, ...]]
    marker: str
    linewidth: float
    zorder: float

    def line(self, label: str) -> dict[str, Any]:
        """Options of matplotlib's `plot` for a line of this style."""
        return asdict(self) | {"label": plain(label)}


@contextmanager
def report_style() -> Iterator[None]:
    """Matplotlib with its own defaults and the report's; the caller's settings are restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG file without date or metadata. Call it inside `report_style`."""
    buffer = io.BytesIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=no_metadata, dpi=_IMAGE_DPI)
    svg = buffer.getvalue()
    return svg[svg.index(b"<svg") :]  # the document type contains a web address


@dataclass
class Drawing:
    """A figure while it is drawn, and its SVG file afterwards."""

    figure: Figure
    axes: Any
    svg: bytes = b""


@contextmanager
def drawing(width: float, height: float, n_rows: int = 1, **subplots: Any) -> Iterator[Drawing]:
    """A figure in the report's style, of a size in inches, whose SVG file is there when the context ends.

    `axes` are its axes, an array of them for several rows; further options are those of `Figure.subplots`.
    """
    with report_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        drawn = Drawing(figure, figure.subplots(n_rows, **subplots))
        yield drawn
        drawn.svg = to_svg(figure)


def run_styles(record: RunRecord) -> dict[str, RunStyle]:
    """A style by run: the tuned one bold and solid, the others dashed."""
    runs = [model.run for model in record.models]
    runs += [run for run in record.history if run not in runs]
    styles = {TUNED: RunStyle(TUNED_COLOUR, "-", "o", 2.2, 3.0)}
    for i, run in enumerate(run for run in runs if run != TUNED):
        styles[run] = dashed_style(i)
    return styles


def dashed_style(i: int) -> RunStyle:
    """The i-th style of lines that are compared with a solid one; of eleven, each has a colour and a marker of its own."""
    colours = _FIXED_COLOURS + _FURTHER_COLOURS
    return RunStyle(
        color=colours[i % len(colours)],
        linestyle=_FIXED_DASHES[i % len(_FIXED_DASHES)],
        marker=_FIXED_MARKERS[i % len(_FIXED_MARKERS)],
        linewidth=1.4,
        zorder=2.0,
    )


def plain(text: str) -> str:
    """Text that matplotlib takes literally, shortened in the middle where it is long."""
    if len(text) > _LONGEST_TEXT:
        head = (_LONGEST_TEXT - 1) // 2
        text = f"{text[:head]}…{text[head + 1 - _LONGEST_TEXT :]}"
    return text.replace("$", r"\$")


def common_prefix(names: list[str]) -> str:
    """The modules that all names begin with, "" where the names are short enough to be written in full."""
    if max(len(name) for name in names) <= _LONGEST_TEXT:
        return ""
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{module}." for module, _ in shared)


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend under the axes, never on top of the data, in as many columns as fit the figure's width."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    entry_width = _LEGEND_HANDLE_INCHES + _LEGEND_LETTER_INCHES * max(len(label) for label in labels)
    n_columns = min(max(1, int(figure.get_figwidth() / entry_width)), len(handles), 4)
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, handlelength=3, columnspacing=1.2)
