"""The picture of a comparison: the criterion that ranks against test NLL, one labelled point per model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from laplace_ws.report.style import GREY, Picture, legend_below, plain, report_style, to_svg
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.ranking import Selection

# Okabe & Ito 2008, as in the other pictures
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_POINT_RADIUS = 3.5  # in points, as all lengths here
_GAP = 4.0
_LONGEST_LEADER = 90.0
_DIRECTIONS = 16


@dataclass(frozen=True)
class Label:
    """Position of a label: offset from its point to the nearest corner or side of the text, and its alignment there."""

    dx: float
    dy: float
    horizontal: str
    vertical: str


def picture_title(selection: Selection) -> str:
    """What the picture shows."""
    title = CRITERIA[selection.rank_by].title
    return f"{title[0].upper()}{title[1:]} and test NLL"


def criterion_picture(selection: Selection) -> Picture:
    """The criterion that ranks against test NLL, with a colour and marker for each kind of model."""
    with report_style():
        figure = criterion_figure(selection)
        svg = to_svg(figure)
    words = "; ".join(
        f"{entry.name}: {selection.score(entry):.3f}, {entry.test_nll:.3f}" for entry in selection.ranking
    )
    title = picture_title(selection)
    return Picture(title, f"{title} by model: {words}.", svg, "Better models are to the right and below.")


def criterion_figure(selection: Selection) -> Figure:
    """The figure of `criterion_picture`; call it inside `report_style`."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    families = list(dict.fromkeys(entry.family for entry in selection.ranking))
    for family, colour, marker in zip(families, itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False):
        entries = [entry for entry in selection.ranking if entry.family == family]
        x, y = [selection.score(entry) for entry in entries], [entry.test_nll for entry in entries]
        axes.plot(x, y, color=colour, marker=marker, markersize=2 * _POINT_RADIUS, linestyle="", label=plain(family))
    axes.margins(0.12)
    criterion = CRITERIA[selection.rank_by]
    axes.set_xlabel(f"{criterion.title} [{criterion.unit}]" if criterion.unit else criterion.title)
    axes.set_ylabel("test NLL [nats/example]")
    legend_below(figure, axes)
    points = [(selection.score(entry), entry.test_nll) for entry in selection.ranking]
    label_points(axes, points, [plain(entry.name) for entry in selection.ranking])
    return figure


def label_points(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[Annotation]:
    """Write a name next to each point, so that no name lies on a point or on another name as long as there is room.

    Each takes the nearest free place around its point; a line connects the two where they are not adjacent. Points with many
    neighbours choose first. The limits of the axes must not change afterwards.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the layout decides where the axes are
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    scale = figure.dpi / 72.0
    centres = [tuple(axes.transData.transform(point)) for point in points]
    radius = (_POINT_RADIUS + 1.0) * scale
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    room = axes.get_window_extent(renderer)
    annotations: dict[int, Annotation] = {}
    for i in sorted(range(len(points)), key=lambda i: -crowding(centres, i)):
        annotation = axes.annotate(
            names[i], points[i], (0.0, 0.0), textcoords="offset points", fontsize=8, annotation_clip=False
        )
        width, height = annotation.get_window_extent(renderer).size
        others = [*taken[:i], *taken[i + 1 :]]
        place = next(
            (
                place
                for place in places()
                if fits(box := text_box(centres[i], place, width, height, scale), room)
                and not any(box.overlaps(other) for other in others)
            ),
            next(places()),
        )
        annotation.set_position((place.dx, place.dy))
        annotation.set(ha=place.horizontal, va=place.vertical)
        taken.append(text_box(centres[i], place, width, height, scale))
        if math.hypot(place.dx, place.dy) > _POINT_RADIUS + 1.5 * _GAP:
            axes.annotate(
                "",
                points[i],
                (place.dx, place.dy),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": _POINT_RADIUS},
            )
        annotations[i] = annotation
    return [annotations[i] for i in range(len(points))]


def places() -> Iterator[Label]:
    """Places of a label around its point, the nearest ones first; of equally near ones, the right one first."""
    distance = _POINT_RADIUS + _GAP
    while distance <= _LONGEST_LEADER:
        for step in sorted(range(_DIRECTIONS), key=lambda step: min(step, _DIRECTIONS - step)):
            angle = 2.0 * math.pi * step / _DIRECTIONS
            x, y = math.cos(angle), math.sin(angle)
            horizontal = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
            vertical = "center" if abs(y) < 0.3 else "bottom" if y > 0 else "top"
            yield Label(distance * x, distance * y, horizontal, vertical)
        distance += _GAP


def text_box(centre: tuple[float, float], place: Label, width: float, height: float, scale: float) -> Bbox:
    """The box of a text at its place, in pixels."""
    x, y = centre[0] + scale * place.dx, centre[1] + scale * place.dy
    left = x - {"left": 0.0, "center": 0.5, "right": 1.0}[place.horizontal] * width
    bottom = y - {"bottom": 0.0, "center": 0.5, "top": 1.0}[place.vertical] * height
    return Bbox.from_bounds(left, bottom, width, height)


def fits(box: Bbox, room: Bbox) -> bool:
    """Whether a box lies inside another one."""
    return room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1


def crowding(centres: Sequence[tuple[float, float]], i: int) -> float:
    """How close the other points are to one of them."""
    return sum(1.0 / (1.0 + math.dist(centres[i], other)) for j, other in enumerate(centres) if j != i)
