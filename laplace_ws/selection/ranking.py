"""The result of a comparison: models by a criterion, and how well each criterion predicts the test NLL."""

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
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.scores import Score
from laplace_ws.tables import Column, as_text

FORMAT_VERSION = 2
SELECTION, PAGE = "select.json", "select.html"
CORRELATION_TITLE = "Correlation with test NLL"
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
        scores: of the criteria, by name.
    """

    name: str
    architecture: str
    n_weights: int
    log_marginal_likelihood: float
    test_nll: float
    test_accuracy: float
    train_seconds: float
    folder: str
    scores: Mapping[str, Score]

    def score(self, criterion: str) -> float | None:
        """Its value of a criterion; None where it has none."""
        return self.scores[criterion].value

    @property
    def family(self) -> str:
        """Kind of model."""
        return self.architecture.partition(" ")[0]


@dataclass(frozen=True)
class Correlation:
    """Correlation of a criterion with test NLL over the models; near -1 where the one predicts the other.

    None below three models, or where all have the same value.

    Attributes:
        n: number of models that have a value.
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
        rank_by: the criterion that ranks them.
        ranking: the models by it, the highest first.
        correlations: over these models, by criterion.
        failed: why a candidate is not among them, by its name.
        total_seconds: of the whole comparison.
    """

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    rank_by: str
    ranking: tuple[Entry, ...]
    correlations: Mapping[str, Correlation]
    failed: Mapping[str, str]
    total_seconds: float

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return self.data["n_train"]

    def per_example(self, entry: Entry) -> float:
        """A model's log marginal likelihood in nats per training example."""
        return entry.log_marginal_likelihood / self.n_train

    def score(self, entry: Entry) -> float:
        """What ranks a model."""
        value = entry.score(self.rank_by)
        assert value is not None
        return value

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


def ranked(entries: Iterable[Entry], rank_by: str) -> tuple[Entry, ...]:
    """The highest value of a criterion first; equal ones keep their order. All must have one."""
    return tuple(sorted(entries, key=lambda entry: -entry.scores[rank_by].value))  # type: ignore[operator]


def correlate(values: Sequence[float], test_nll: Sequence[float]) -> Correlation:
    """Correlations of a criterion with test NLL, one value of each per model."""
    measures = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
    correlations: dict[str, float | None] = dict.fromkeys(measures)
    if len(values) >= _SMALLEST_SAMPLE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            found = {name: float(measure(values, test_nll).statistic) for name, measure in measures.items()}
        correlations |= {name: value for name, value in found.items() if math.isfinite(value)}
    return Correlation(len(values), **correlations)


def correlate_all(entries: Sequence[Entry], criteria: Iterable[str]) -> dict[str, Correlation]:
    """The correlations of each criterion, over the models that have a value of it."""
    found = {}
    for name in criteria:
        pairs = [(value, entry.test_nll) for entry in entries if (value := entry.score(name)) is not None]
        found[name] = correlate([value for value, _ in pairs], [nll for _, nll in pairs])
    return found


def criterion_columns(selection: Selection) -> list[Column[Entry]]:
    """The values of every criterion, that which ranks first."""
    names = sorted(selection.correlations, key=lambda name: name != selection.rank_by)
    return [
        Column(
            CRITERIA[name].title,
            CRITERIA[name].unit,
            lambda e, name=name: e.score(name),
            CRITERIA[name].decimals,
            higher_is_better=True,
        )
        for name in names
    ]


def correlation_columns(selection: Selection) -> list[Column[tuple[str, Correlation]]]:
    """How well each criterion predicts the test NLL, and what it costs: the seconds of all models together."""

    def seconds(row: tuple[str, Correlation]) -> float:
        return sum(entry.scores[row[0]].seconds for entry in selection.ranking)

    return [
        Column("criterion", "", lambda row: CRITERIA[row[0]].title, is_left=True),
        Column("Pearson", "", lambda row: row[1].pearson, 3),
        Column("Spearman", "", lambda row: row[1].spearman, 3, higher_is_better=False),
        Column("Kendall", "", lambda row: row[1].kendall, 3, higher_is_better=False),
        Column("models", "", lambda row: str(row[1].n)),
        Column("time", "s", seconds, 1),
    ]


def selection_table(selection: Selection) -> str:
    """The ranking as text, one line per model, and the correlations, one line per criterion."""
    columns: list[Column[Entry]] = [
        Column("", "", lambda e: str(1 + selection.ranking.index(e))),
        Column("", "", lambda e: e.name, is_left=True),
        *criterion_columns(selection),
        Column("test NLL", "nats", lambda e: e.test_nll, 4),
        Column("test acc.", "%", lambda e: e.test_accuracy, 1, scale=100.0),
        Column("weights", "", lambda e: f"{e.n_weights:,}"),
        Column("time", "s", lambda e: e.train_seconds, 1),
    ]
    lines = [as_text(columns, selection.ranking)]
    lines += [f"not ranked: {name}: {reason}" for name, reason in selection.failed.items()]
    correlations = as_text(correlation_columns(selection), list(selection.correlations.items()))
    return "\n".join([*lines, "", f"{CORRELATION_TITLE} (near −1 where a criterion foretells it):", correlations])
