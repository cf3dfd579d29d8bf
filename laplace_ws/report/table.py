"""The two tables of the page: models with their figures, and parameters with their prior precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from statistics import median

from laplace_ws.marglik.hyperparameters import ELEMENTWISE
from laplace_ws.report.records import ModelSummary, RunRecord

_ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A column of figures: how to read, scale and write one, and which end is the better one."""

    title: str
    unit: str
    value: Callable[[ModelSummary], float | None]
    decimals: int
    higher_is_better: bool = False
    scale: float = 1.0

    def text(self, model: ModelSummary) -> str:
        """The figure as written in the table."""
        value = self.value(model)
        return _ABSENT if value is None else f"{self.scale * value:.{self.decimals}f}"

    def best(self, models: tuple[ModelSummary, ...]) -> str | None:
        """The best figure as written; None where there is nothing to compare."""
        shown = [(value, self.text(m)) for m in models if (value := self.value(m)) is not None and math.isfinite(value)]
        if len(shown) < 2:
            return None
        return (max if self.higher_is_better else min)(shown)[1]


COLUMNS = (
    Column("log marginal likelihood", "nats", lambda m: m.log_marginal_likelihood, 1, higher_is_better=True),
    Column("test NLL", "nats/example", lambda m: m.test_nll, 4),
    Column("test RMSE", "", lambda m: m.test_rmse, 4),
    Column("test accuracy", "%", lambda m: m.test_accuracy, 2, higher_is_better=True, scale=100.0),
    Column("test ECE", "%", lambda m: m.test_ece, 2, scale=100.0),
    Column("training time", "s", lambda m: m.train_seconds, 1),
    Column("curvature time", "s", lambda m: m.curvature_seconds, 1),
)


def model_table(record: RunRecord) -> str:
    """One row per model, the tuned one first; columns that no model has are left out."""
    columns = [column for column in COLUMNS if any(column.value(model) is not None for model in record.models)]
    titles = [("model", ""), ("prior precision", "δ"), ("weight decay", "δ/N"), *((c.title, c.unit) for c in columns)]
    head = "".join(
        f'<th scope="col">{escape(title)}{f"<small>{escape(unit)}</small>" if unit else ""}</th>'
        for title, unit in titles
    )
    best = [column.best(record.models) for column in columns]
    rows = []
    for model in record.models:
        precisions = precision_of(model), weight_decay_of(model, record.n_train)
        cells = [_spread_cell(layers_of(values)) for values in precisions]
        cells += [
            f"<strong>{escape(text)}</strong>" if (text := column.text(model)) == best_text else escape(text)
            for column, best_text in zip(columns, best, strict=True)
        ]
        row_class = ' class="tuned"' if model.is_tuned else ""
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr{row_class}><th scope="row">{escape(model.label)}</th>{body}</tr>')
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def precision_table(record: RunRecord) -> str:
    """Every parameter or group of the tuned model with its prior precision and weight decay, folded away."""
    precision = record.tuned.prior_precision
    if not precision:
        return ""
    weight_decay = weight_decay_of(record.tuned, record.n_train)
    rows = []
    for name, value in precision.items():
        remark = "collapsed" if name in record.tuned.collapsed else ""
        decay = f"{weight_decay[name]:.3g}" if name in weight_decay else _ABSENT
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{value:.4g}</td><td>{decay}</td><td>{remark}</td></tr>'
        )
    return (
        f"<details><summary>All {len(precision)} prior precisions</summary>"
        '<div class="scroll"><table>\n<thead><tr><th scope="col">parameter</th>'
        '<th scope="col">prior precision<small>δ</small></th><th scope="col">weight decay<small>δ/N</small></th>'
        "<th></th></tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div></details>"
    )


def layers_of(precision: Mapping[str, float]) -> Mapping[str, float]:
    """The prior precisions of layers: without that of elementwise scales and biases, unless there is no other."""
    return {name: value for name, value in precision.items() if name != ELEMENTWISE} or precision


def precision_of(model: ModelSummary) -> Mapping[str, float]:
    """Prior precision by parameter; of a fixed model that wrote none, the one in its name."""
    if model.prior_precision or model.is_tuned:
        return model.prior_precision
    try:
        return {"": float(model.run.removeprefix("fixed-"))}
    except ValueError:
        return {}


def weight_decay_of(model: ModelSummary, n_train: int) -> Mapping[str, float]:
    """Weight decay as written by the run, or δ/N."""
    return model.weight_decay or {name: value / n_train for name, value in precision_of(model).items()}


def _spread_cell(values: Mapping[str, float]) -> str:
    """One number where all are equal, else the median and the range."""
    numbers = list(values.values())
    if not numbers:
        return _ABSENT
    low, high = min(numbers), max(numbers)
    if math.isclose(low, high, rel_tol=1e-6):
        return f"{low:.3g}"
    return f"median {median(numbers):.3g}<small>{low:.3g} to {high:.3g}</small>"
