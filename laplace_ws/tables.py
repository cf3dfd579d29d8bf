"""Tables of results: columns that know how to write a value and which value is best, and the table as aligned text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")
ABSENT = "–"


@dataclass(frozen=True)
class Column(Generic[Row]):
    """How to read, scale and write the values of a column, and which end is the better one.

    Attributes:
        title: of the column.
        unit: of its numbers; "" for none.
        value: of a row: a number, a text (whose second line is set small on a page), or None where there is none.
        decimals: of its numbers.
        higher_is_better: None where values are not judged.
        scale: factor from the value to what is written.
        is_left: whether texts are left-aligned.
    """

    title: str
    unit: str
    value: Callable[[Row], float | str | None]
    decimals: int = 0
    higher_is_better: bool | None = None
    scale: float = 1.0
    is_left: bool = False

    def text(self, row: Row) -> str:
        """The value as it is written."""
        value = self.value(row)
        if value is None:
            return ABSENT
        return value if isinstance(value, str) else f"{self.scale * value:.{self.decimals}f}"

    def best(self, rows: Sequence[Row]) -> str | None:
        """The best value as it is written; None where there is nothing to compare."""
        if self.higher_is_better is None:
            return None
        values = [(value, row) for row in rows if isinstance(value := self.value(row), (int, float))]
        finite = [(value, self.text(row)) for value, row in values if math.isfinite(value)]
        return None if len(finite) < 2 else (max if self.higher_is_better else min)(finite)[1]


def shown_columns(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> list[Column[Row]]:
    """The columns for which some row has a value."""
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def as_text(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """One line per row under two lines of titles and units, in columns as wide as necessary."""
    cells = [
        [column.title, column.unit and f"[{column.unit}]", *(column.text(row) for row in rows)] for column in columns
    ]
    widths = [max(map(len, column)) for column in cells]
    padded = [
        [cell.ljust(width) if column.is_left else cell.rjust(width) for cell in texts]
        for column, texts, width in zip(columns, cells, widths, strict=True)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
