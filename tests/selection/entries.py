"""Comparisons made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_ws.selection import Entry, Selection
from laplace_ws.selection.ranking import correlate, ranked


def entry(name: str, evidence: float, nll: float, architecture: str = "mlp hidden=[3]") -> Entry:
    return Entry(name, architecture, 12345, evidence, nll, 0.75, 1.5, f"runs/select/{name}")


def selection(entries: Sequence[Entry], failed: dict[str, str] | None = None) -> Selection:
    order = ranked(entries)
    data = {"name": "images", "n_train": 100, "n_test": 50}
    return Selection("by hand", {"seed": 0}, {"torch": "2"}, data, order, correlate(order), failed or {}, 12.0)
