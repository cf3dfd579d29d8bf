"""The columns by which methods are compared, and their table as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from laplace_ws.calibration.result import MethodResult

_ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A column of figures: how to read, scale and write one, and which end is the better one, if there is one."""

    title: str
    unit: str
    value: Callable[[MethodResult], float | None]
    decimals: int
    higher_is_better: bool | None = False
    scale: float = 1.0

    def text(self, method: MethodResult) -> str:
        """The figure as written in the table."""
        value = self.value(method)
        return _ABSENT if value is None else f"{self.scale * value:.{self.decimals}f}"

    def best(self, methods: Sequence[MethodResult]) -> str | None:
        """The best figure as written; None where there is nothing to compare."""
        shown = [(value, self.text(m)) for m in methods if (value := self.value(m)) is not None]
        if len(shown) < 2 or self.higher_is_better is None:
            return None
        return (max if self.higher_is_better else min)(shown)[1]


COLUMNS = (
    Column("accuracy", "%", lambda m: m.test["accuracy"], 2, higher_is_better=True, scale=100.0),
    Column("NLL", "nats", lambda m: m.test["nll"], 4),
    Column("Brier", "", lambda m: m.test["brier"], 4),
    Column("ECE", "%", lambda m: m.test["ece"], 2, scale=100.0),
    Column("OOD AUROC", "%", lambda m: m.ood["auroc"] if m.ood else None, 2, higher_is_better=True, scale=100.0),
    Column("OOD FPR95", "%", lambda m: m.ood["fpr95"] if m.ood else None, 2, scale=100.0),
    Column("corrupted accuracy", "%", lambda m: m.mean_corrupted("accuracy"), 2, higher_is_better=True, scale=100.0),
    Column("corrupted NLL", "nats", lambda m: m.mean_corrupted("nll"), 4),
    Column("corrupted ECE", "%", lambda m: m.mean_corrupted("ece"), 2, scale=100.0),
    Column("fit", "s", lambda m: m.facts.get("fit_seconds"), 1, higher_is_better=None),
    Column("prediction", "s", lambda m: m.predict_seconds, 1, higher_is_better=None),
)


def shown_columns(methods: Sequence[MethodResult]) -> list[Column]:
    """The columns of which some method has a figure."""
    return [column for column in COLUMNS if any(column.value(method) is not None for method in methods)]


def as_text(methods: Sequence[MethodResult]) -> str:
    """One line per method under two lines of titles and units, in columns as wide as they need be."""
    columns = shown_columns(methods)
    rows = [
        ["", *(column.title for column in columns)],
        ["", *(column.unit and f"[{column.unit}]" for column in columns)],
    ]
    rows += [[method.label, *(column.text(method) for column in columns)] for method in methods]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        figures = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *figures]).rstrip())
    return "\n".join(lines)
