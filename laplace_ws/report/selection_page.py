"""The page of a comparison: the ranking, its picture, and how to reproduce it."""

from __future__ import annotations

from pathlib import Path

from laplace_ws.experiment.folder import write_whole
from laplace_ws.report.page import duration, render
from laplace_ws.report.selection_pictures import criterion_picture, picture_title
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.ranking import (
    CORRELATION_TITLE,
    PAGE,
    Entry,
    Selection,
    correlation_columns,
    criterion_columns,
    load_selection,
)
from laplace_ws.tables import Column


def write_selection_page(folder: Path) -> Path:
    """Write `folder/select.html` from `folder/select.json`.

    Args:
        folder: of a comparison that has finished.

    Returns:
        Path of the page, one file without links to others.

    Raises:
        RecordError: select.json is missing or broken.
    """
    path = folder / PAGE
    write_whole(path, render_selection(load_selection(folder)))
    return path


def render_selection(selection: Selection) -> str:
    """The page as text."""
    return render(
        "selection.html",
        title=selection.name,
        about=[
            str(selection.data["name"]),
            f"{selection.n_train:,} training examples",
            f"{selection.data['n_test']:,} test examples",
            f"{duration(selection.total_seconds)} in all",
        ],
        verdict=verdict(selection),
        warnings=[f"Not ranked: {name}: {reason}" for name, reason in selection.failed.items()],
        ranking=selection.ranking,
        columns=ranking_columns(selection),
        remarks=[
            f"Ranked by {CRITERIA[selection.rank_by].title}; of each criterion a higher value is better.",
            "Best value of a column in bold. Each row is one training run, so small differences may be noise of the seed.",
        ],
        correlation_title=CORRELATION_TITLE,
        correlation_columns=correlation_columns(selection),
        correlations=list(selection.correlations.items()),
        correlation_remarks=[
            "Near −1 where a criterion foretells the test NLL. The time is that of the criterion alone, beside the training of all models."
        ],
        picture_title=picture_title(selection),
        pictures=[criterion_picture(selection)] if selection.ranking else [],
        sources={
            "Configuration": selection.config,
            "Environment": selection.environment,
            "Data": selection.data,
        },
    )


def verdict(selection: Selection) -> str:
    """One sentence: whether the first by the criterion is the first by test NLL, and how far behind if not."""
    if not selection.ranking:
        return "No candidate has finished."
    first, best = selection.ranking[0], min(selection.ranking, key=lambda entry: entry.test_nll)
    title = CRITERIA[selection.rank_by].title
    if first is best:
        return f"{first.name} is first by {title} and has the lowest test NLL ({first.test_nll:.3f})."
    place = sorted(selection.ranking, key=lambda entry: entry.test_nll).index(first) + 1
    return (
        f"{first.name} is first by {title}; by test NLL ({first.test_nll:.3f}) it comes {place} of "
        f"{len(selection.ranking)}, {first.test_nll - best.test_nll:.3f} behind {best.name} ({best.test_nll:.3f})."
    )


def ranking_columns(selection: Selection) -> list[Column[Entry]]:
    """The columns of the ranking."""
    return [
        Column("model", "", lambda e: e.name),
        Column("architecture", "", lambda e: e.architecture, is_left=True),
        *criterion_columns(selection),
        Column("test NLL", "nats/example", lambda e: e.test_nll, 4, higher_is_better=False),
        Column("test accuracy", "%", lambda e: e.test_accuracy, 2, higher_is_better=True, scale=100.0),
        Column("weights", "", lambda e: f"{e.n_weights:,}"),
        Column("training time", "s", lambda e: e.train_seconds, 1),
    ]
