"""The columns by which methods are compared: the registered metrics, detection of out-of-distribution images, and times."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_ws import tables
from laplace_ws.calibration.result import MethodResult
from laplace_ws.metrics import METRICS
from laplace_ws.tables import Column


def columns() -> list[Column[MethodResult]]:
    """A column for each number that a method may have."""
    tested: list[Column[MethodResult]] = []
    damaged: list[Column[MethodResult]] = []
    for name, metric in METRICS.items():
        how = (metric.decimals, metric.higher_is_better, metric.scale)
        tested.append(Column(metric.title, metric.unit, lambda m, name=name: m.test.get(name), *how))
        if metric.on_damaged:
            title = f"corrupted {metric.title}"
            damaged.append(Column(title, metric.unit, lambda m, name=name: m.mean_corrupted(name), *how))
    return [
        *tested,
        Column("OOD AUROC", "%", lambda m: m.ood["auroc"] if m.ood else None, 2, higher_is_better=True, scale=100.0),
        Column("OOD FPR95", "%", lambda m: m.ood["fpr95"] if m.ood else None, 2, higher_is_better=False, scale=100.0),
        *damaged,
        Column("fit", "s", lambda m: m.facts.get("fit_seconds"), 1),
        Column("prediction", "s", lambda m: m.predict_seconds, 1),
    ]


def shown_columns(methods: Sequence[MethodResult]) -> list[Column[MethodResult]]:
    """The columns for which some method has a value."""
    return tables.shown_columns(columns(), methods)


def as_text(methods: Sequence[MethodResult]) -> str:
    """The table of methods as text."""
    return tables.as_text([Column("", "", lambda m: m.label, is_left=True), *shown_columns(methods)], methods)
