"""The page and the picture of a comparison: that names can be read, and that the words are true."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from selection.entries import entry, selection

from laplace_ws.report.selection_page import render_selection, verdict, write_selection_page
from laplace_ws.report.selection_pictures import criterion_figure, criterion_picture
from laplace_ws.report.style import report_style
from laplace_ws.selection import Selection
from laplace_ws.selection.ranking import SELECTION

GRID = [entry(f"model-{i}-{j}", -100.0 - 3 * i, 0.5 + 0.02 * j, f"kind{j}") for i in range(4) for j in range(3)]
SPREAD = [entry("left", -200.0, 0.9), entry("right", -50.0, 0.2)]
CLOSE = [*(entry(f"a-rather-long-name-{i}", -100.0 - 0.5 * i, 0.5 + 0.001 * i) for i in range(10)), *SPREAD]


def names_of(axes: Axes) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]


def boxes(figure: Figure, made: Selection) -> tuple[list[Bbox], list[tuple[float, float]], Bbox]:
    """Boxes of the names, the points, and the box of the axes, all in pixels."""
    figure.draw_without_rendering()
    assert isinstance(figure.canvas, FigureCanvasAgg)
    (axes,), renderer = figure.axes, figure.canvas.get_renderer()
    by_name = {text.get_text(): text.get_window_extent(renderer) for text in names_of(axes)}
    points = [(made.score(e), e.test_nll) for e in made.ranking]
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    return [by_name[e.name] for e in made.ranking], pixels, axes.get_window_extent(renderer)


@pytest.mark.parametrize(
    "entries", [GRID, CLOSE, SPREAD, [*GRID, *SPREAD], CLOSE[:10]], ids=["grid", "close", "spread", "mixed", "even"]
)
def test_names_overlap_neither_each_other_nor_points(entries):
    made = selection(entries)
    with report_style():
        names, points, room = boxes(criterion_figure(made), made)
    assert not [(a, b) for a, b in combinations(names, 2) if a.overlaps(b)]
    assert not [(box, point) for box in names for point in points if box.contains(*point)]
    for box in names:
        assert room.x0 <= box.x0 < box.x1 <= room.x1
        assert room.y0 <= box.y0 < box.y1 <= room.y1


def test_a_name_that_stands_away_has_a_line_to_its_point():
    with report_style():
        lines = {
            name: len([t for t in criterion_figure(selection(entries)).axes[0].texts if not t.get_text()])
            for name, entries in {"close": CLOSE, "spread": SPREAD}.items()
        }
    assert lines["close"] > 0
    assert lines["spread"] == 0


def test_kinds_of_models_are_told_apart():
    with report_style():
        axes = criterion_figure(selection(GRID)).axes[0]
    assert [line.get_label() for line in axes.lines] == ["kind0", "kind1", "kind2"]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 3


def test_names_are_taken_literally():
    picture = criterion_picture(selection([entry("$x$", -1.0, 0.5), entry("<b>", -2.0, 0.7)]))
    assert picture.svg.startswith(b"<svg")
    assert "$x$: -0.010, 0.500" in picture.alt


def test_one_model_has_a_picture():
    assert criterion_picture(selection([entry("only", -100.0, 0.5)])).svg.startswith(b"<svg")


def test_the_verdict():
    agreeing = selection([entry("a", -10.0, 0.5), entry("b", -20.0, 0.7)])
    assert verdict(agreeing) == "a is first by log marglik and has the lowest test NLL (0.500)."
    differing = selection([entry("a", -10.0, 0.7), entry("b", -20.0, 0.5), entry("c", -30.0, 0.6)])
    assert verdict(differing) == (
        "a is first by log marglik; by test NLL (0.700) it comes 3 of 3, 0.200 behind b (0.500)."
    )
    assert verdict(selection([])) == "No candidate has finished."


def test_the_page_shows_the_ranking_and_what_is_not_in_it(tmp_path: Path):
    made = selection([entry("<b>", -10.0, 0.5), entry("second", -20.0, 0.4)], {"broken": "the loss became <NaN>"})
    (tmp_path / SELECTION).write_text(made.to_json())
    page = write_selection_page(tmp_path).read_text()
    assert page.index("&lt;b&gt;</th>") < page.index("second</th>")
    assert "<b>" not in page
    assert "Not ranked: broken: the loss became &lt;NaN&gt;" in page
    assert "Correlation with test NLL" in page
    assert "<img alt=" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_best_figures_are_bold():
    page = render_selection(selection([entry("a", -10.0, 0.5), entry("b", -20.0, 0.4)]))
    assert re.findall(r"<strong>(.*?)</strong>", page) == ["-0.1000", "75.00", "0.4000", "75.00"]


def test_a_comparison_of_which_nothing_finished_has_a_page(tmp_path: Path):
    (tmp_path / SELECTION).write_text(selection([], {"a": "diverged"}).to_json())
    page = write_selection_page(tmp_path).read_text()
    assert "No candidate has finished." in page
    assert "<img" not in page


def test_the_page_shows_every_criterion_and_its_correlation():
    entries = [
        entry(name, -10.0 * i, 0.5 + 0.1 * i, fewest_weights=-float(i), marglik_full=None)
        for i, name in enumerate("abc")
    ]
    page = render_selection(selection(entries, rank_by="fewest_weights"))
    assert "Fewest weights and test NLL" in page
    assert "Ranked by fewest weights" in page
    for title in ("log marglik", "fewest weights", "log marglik, full"):
        assert re.search(rf'<th scope="col">{title}', page)
        assert f'<th scope="row">{title}</th>' in page
    assert page.count("-1.000") >= 3
    assert verdict(selection(entries, rank_by="fewest_weights")).startswith("a is first by fewest weights and has")
