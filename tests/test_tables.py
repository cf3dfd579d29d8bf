"""Columns of results and their text."""

from __future__ import annotations

import math

from laplace_ws.tables import Column, as_text, shown_columns

NAME = Column("", "", lambda row: row["name"], is_left=True)
SHARE = Column("share", "%", lambda row: row.get("share"), 1, higher_is_better=True, scale=100.0)
LOSS = Column("loss", "", lambda row: row.get("loss"), 3, higher_is_better=False)
TIME = Column("time", "s", lambda row: row.get("seconds"), 1)
ROWS = [{"name": "a", "share": 0.5, "loss": 1.25}, {"name": "longer", "share": 0.123, "loss": math.inf}, {"name": "c"}]


def test_columns_are_aligned_under_their_titles():
    assert as_text([NAME, SHARE, LOSS], ROWS).splitlines() == [
        "        share   loss",
        "          [%]",
        "a        50.0  1.250",
        "longer   12.3    inf",
        "c           –      –",
    ]


def test_the_best_is_at_the_better_end_among_finite_values():
    rows = [*ROWS, {"name": "d", "share": 0.7, "loss": 2.0}]
    assert (SHARE.best(rows), LOSS.best(rows)) == ("70.0", "1.250")
    assert LOSS.best(ROWS) is None  # one finite value is no comparison
    assert TIME.best([{"seconds": 1.0}, {"seconds": 2.0}]) is None  # not judged
    assert NAME.best(ROWS) is None


def test_columns_without_values_are_left_out():
    assert shown_columns([NAME, SHARE, LOSS, TIME], ROWS) == [NAME, SHARE, LOSS]
