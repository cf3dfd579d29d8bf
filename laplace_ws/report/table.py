"""The two tables of the report: the networks with their results, and parameters with their prior precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from laplace_ws.experiment.records import FIXED
from laplace_ws.marglik.hyperparameters import ELEMENTWISE
from laplace_ws.report.records import Model, RunRecord
from laplace_ws.tables import Column


def model_columns(n_train: int) -> list[Column[Model]]:
    """The columns of the table of networks; weight decays are prior precisions over the number of training examples."""
    return [
        Column("model", "", lambda m: m.label),
        Column("prior precision", "δ", lambda m: _spread(precision_of(m), 1)),
        Column("weight decay", "δ/N", lambda m: _spread(precision_of(m), n_train)),
        Column("log marginal likelihood", "nats", lambda m: m.log_marginal_likelihood, 1, higher_is_better=True),
        Column("test NLL", "nats/example", lambda m: m.test_nll, 4, higher_is_better=False),
        Column("test accuracy", "%", lambda m: m.test_accuracy, 2, higher_is_better=True, scale=100.0),
        Column("test ECE", "%", lambda m: m.test_ece, 2, higher_is_better=False, scale=100.0),
        Column("training time", "s", lambda m: m.train_seconds, 1, higher_is_better=False),
        Column("curvature time", "s", lambda m: m.curvature_seconds, 1, higher_is_better=False),
    ]


class Precision(NamedTuple):
    """A parameter or group with its prior precision."""

    name: str
    precision: str
    weight_decay: str
    remark: str


PRECISION_COLUMNS: tuple[Column[Precision], ...] = (
    Column("parameter", "", lambda p: p.name),
    Column("prior precision", "δ", lambda p: p.precision),
    Column("weight decay", "δ/N", lambda p: p.weight_decay),
    Column("", "", lambda p: p.remark),
)


def precisions(record: RunRecord) -> list[Precision]:
    """Every parameter or group of the tuned network."""
    return [
        Precision(
            name, f"{value:.4g}", f"{value / record.n_train:.3g}", "collapsed" if name in record.tuned.collapsed else ""
        )
        for name, value in record.tuned.prior_precision.items()
    ]


def layers_of(precision: Mapping[str, float]) -> Mapping[str, float]:
    """The prior precisions of layers: without that of elementwise scales and biases, unless there is no other."""
    return {name: value for name, value in precision.items() if name != ELEMENTWISE} or precision


def precision_of(model: Model) -> Mapping[str, float]:
    """Prior precision by parameter; of a fixed model that wrote none, the one in its name."""
    if model.prior_precision or model.is_tuned:
        return model.prior_precision
    try:
        return {"": float(model.run.removeprefix(FIXED))}
    except ValueError:
        return {}


def _spread(precision: Mapping[str, float], divisor: int) -> str | None:
    """One number where the layers have one, else the median and, below, the range."""
    values = [value / divisor for value in layers_of(precision).values()]
    if not values:
        return None
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=1e-6):
        return f"{low:.3g}"
    return f"median {median(values):.3g}\n{low:.3g} to {high:.3g}"
