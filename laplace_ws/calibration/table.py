"""The columns by which methods are compared: the registered metrics, detection of out-of-distribution images, uncertainty, and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from laplace_ws import tables
from laplace_ws.calibration.result import MethodResult, Uncertainty
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
        Column(
            "OOD AUROC, epistemic",
            "%",
            lambda m: m.ood.get("auroc_epistemic") if m.ood else None,
            2,
            higher_is_better=True,
            scale=100.0,
        ),
        Column("OOD FPR95", "%", lambda m: m.ood["fpr95"] if m.ood else None, 2, higher_is_better=False, scale=100.0),
        *damaged,
        Column("fit", "s", lambda m: m.facts.get("fit_seconds"), 1),
        Column("prediction", "s", lambda m: m.predict_seconds, 1),
        Column("cost", "training runs", lambda m: m.training_runs, 2),
        Column("prediction cost", "× MAP", lambda m: m.predict_cost, 1),
    ]


_SPLIT_IMAGES: dict[str, Callable[[MethodResult], Uncertainty | None]] = {
    "test": lambda m: m.uncertainty,
    "OOD": lambda m: m.ood_uncertainty,
    "corrupted": lambda m: m.corrupted_uncertainty(),
}


def uncertainty_columns() -> list[Column[MethodResult]]:
    """Mean total, aleatoric and epistemic uncertainty on test, out-of-distribution and damaged images."""
    return [
        Column(f"{part.name}, {images}", "nats", lambda m, of=of, part=part.name: getattr(of(m), part, None), 4)
        for images, of in _SPLIT_IMAGES.items()
        for part in fields(Uncertainty)
    ]


def shown_columns(methods: Sequence[MethodResult]) -> list[Column[MethodResult]]:
    """The columns for which some method has a value."""
    return tables.shown_columns(columns(), methods)


def as_text(methods: Sequence[MethodResult]) -> str:
    """The table of methods as text, and below it that of their uncertainty where some have samples."""
    label: Column[MethodResult] = Column("", "", lambda m: m.label, is_left=True)
    parts = [tables.as_text([label, *shown_columns(methods)], methods)]
    sampled = [method for method in methods if method.uncertainty is not None]
    if sampled:
        parts.append(tables.as_text([label, *tables.shown_columns(uncertainty_columns(), sampled)], sampled))
    return "\n\n".join(parts)
