"""Comparing models: train or load several, and rank them by a criterion that needs no test images."""

from __future__ import annotations

from laplace_ws.selection.config import Candidate, SelectConfig
from laplace_ws.selection.criteria import CRITERIA, Criterion
from laplace_ws.selection.ranking import (
    Correlation,
    Entry,
    Selection,
    load_selection,
    selection_table,
)
from laplace_ws.selection.run import run_selection
from laplace_ws.selection.scores import Score

__all__ = [
    "CRITERIA",
    "Candidate",
    "Correlation",
    "Criterion",
    "Entry",
    "Score",
    "SelectConfig",
    "Selection",
    "load_selection",
    "run_selection",
    "selection_table",
]
