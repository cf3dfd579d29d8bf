"""Comparisons made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_ws.selection import Entry, Score, Selection
from laplace_ws.selection.ranking import correlate_all, ranked

N_TRAIN = 100


def entry(
    name: str, evidence: float, nll: float, architecture: str = "mlp hidden=[3]", **others: float | None
) -> Entry:
    """A model with a log marginal likelihood; others are further criteria."""
    scores = {"marglik": evidence / N_TRAIN, **others}
    return Entry(
        name,
        architecture,
        12345,
        evidence,
        nll,
        0.75,
        1.5,
        f"runs/select/{name}",
        {criterion: Score(value, 0.5) for criterion, value in scores.items()},
    )


def selection(entries: Sequence[Entry], failed: dict[str, str] | None = None, rank_by: str = "marglik") -> Selection:
    order = ranked(entries, rank_by)
    criteria = order[0].scores if order else ["marglik"]
    data = {"name": "images", "n_train": N_TRAIN, "n_test": 50}
    return Selection(
        "by hand",
        {"seed": 0},
        {"torch": "2"},
        data,
        rank_by,
        order,
        correlate_all(order, criteria),
        failed or {},
        12.0,
    )
