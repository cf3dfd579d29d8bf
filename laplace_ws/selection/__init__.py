"""Comparing models: train or load several, and rank them by log marginal likelihood."""

from __future__ import annotations

from laplace_ws.selection.config import Candidate, SelectConfig
from laplace_ws.selection.ranking import (
    Correlation,
    Entry,
    Selection,
    load_selection,
    selection_table,
)
from laplace_ws.selection.run import run_selection

__all__ = [
    "Candidate",
    "Correlation",
    "Entry",
    "SelectConfig",
    "Selection",
    "load_selection",
    "run_selection",
    "selection_table",
]
