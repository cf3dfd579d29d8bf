"""The result of a comparison: models by log marginal likelihood, and how well that predicts the test NLL."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from laplace_ws.records import read_record
from laplace_ws.tables import Column, as_text

FORMAT_VERSION = 1
SELECTION, PAGE = "select.json", "select.html"
_SMALLEST_SAMPLE = 3


@dataclass(frozen=True)
class Entry:
    """A model that is compared.

    Attributes:
        name: of the candidate.
        architecture: kind of model and its options, in words.
        n_weights: trainable parameters.
        log_marginal_likelihood: of the training data, in nats.
        test_nll: mean over the test examples, in nats per example.
        test_accuracy: from 0 to 1.
        train_seconds: of training, curvature included.
        folder: of the run.
    """

    name: str
    architecture: str
    n_weights: int
    log_marginal_likelihood: float
    test_nll: float
    test_accuracy: float
    train_seconds: float
    folder: str

    @property
    def family(self) -> str:
        """Kind of model."""
        return self.architecture.partition(" ")[0]


@dataclass(frozen=True)
class Correlation:
    """Correlation of log marginal likelihood with test NLL over the models; near -1 where the one predicts the other.

    None below three models, or where all have the same value.

    Attributes:
        n: number of models.
        pearson: of the values.
        spearman: of the ranks.
        kendall: τ-b, pairs in the same order against pairs in the opposite one.
    """

    n: int
    pearson: float | None
    spearman: float | None
    kendall: float | None


@dataclass(frozen=True)
class Selection:
    """A comparison, best model first.

    Attributes:
        name: of the comparison.
        config: the settings that led to it.
        environment: versions and device.
        data: name, and number of examples to train (n_train) and to test (n_test) on.
        ranking: the models by log marginal likelihood, the highest first.
        correlation: over these models.
        failed: why a candidate is not among them, by its name.
        total_seconds: of the whole comparison.
    """

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    ranking: tuple[Entry, ...]
    correlation: Correlation
    failed: Mapping[str, str]
    total_seconds: float

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return self.data["n_train"]

    def per_example(self, entry: Entry) -> float:
        """A model's log marginal likelihood in nats per training example."""
        return entry.log_marginal_likelihood / self.n_train

    def to_json(self) -> str:
        """The text of the comparison's file."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def load_selection(folder: Path) -> Selection:
    """Read the comparison of a folder.

    Raises:
        RecordError: there is none, or it is of another version.
    """
    return read_record(
        Selection,
        folder / SELECTION,
        version=FORMAT_VERSION,
        absent="give the folder of a comparison that has finished",
        broken="compare anew to rewrite it",
    )


def ranked(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The highest log marginal likelihood first; equal ones keep their order."""
    return tuple(sorted(entries, key=lambda entry: -entry.log_marginal_likelihood))


def correlate(entries: Sequence[Entry]) -> Correlation:
    """Correlations of log marginal likelihood with test NLL; those of its value per example are the same."""
    evidence, nll = [e.log_marginal_likelihood for e in entries], [e.test_nll for e in entries]
    measures = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    values: dict[str, float | None] = dict.fromkeys(measures)
    if len(entries) >= _SMALLEST_SAMPLE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            found = {name: float(measure(evidence, nll).statistic) for name, measure in measures.items()}
        values |= {name: value for name, value in found.items() if math.isfinite(value)}
    return Correlation(len(entries), **values)


def selection_table(selection: Selection) -> str:
    """The ranking as text, one line per model."""
    columns: list[Column[Entry]] = [
        Column("", "", lambda e: str(1 + selection.ranking.index(e))),
        Column("", "", lambda e: e.name, is_left=True),
        Column("log marglik", "nats", lambda e: e.log_marginal_likelihood, 1),
        Column("per example", "nats", selection.per_example, 4),
        Column("test NLL", "nats", lambda e: e.test_nll, 4),
        Column("test acc.", "%", lambda e: e.test_accuracy, 1, scale=100.0),
        Column("weights", "", lambda e: f"{e.n_weights:,}"),
        Column("time", "s", lambda e: e.train_seconds, 1),
    ]
    lines = [as_text(columns, selection.ranking)]
    lines += [f"not ranked: {name}: {reason}" for name, reason in selection.failed.items()]
    return "\n".join([*lines, correlation_sentence(selection.correlation)])


def correlation_sentence(correlation: Correlation) -> str:
    """The correlations in words, with the number of models."""
    values = {name: getattr(correlation, name) for name in ("pearson", "spearman", "kendall")}
    known = [f"{name.capitalize()} {value:+.3f}" for name, value in values.items() if value is not None]
    if not known:
        return f"Correlation of log marginal likelihood and test NLL: none to give (n = {correlation.n})."
    return f"Correlation of log marginal likelihood and test NLL: {', '.join(known)} (n = {correlation.n})."
