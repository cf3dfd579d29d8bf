"""The result of a comparison: models by log marginal likelihood, and how well that foretells the test NLL."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scipy import stats

from laplace_ws.report.records import ReportInputError

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
    """Correlation of log marginal likelihood with test NLL over the models; near -1 where the one foretells the other.

    None below three models, or where all have one value.

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
        """A model's log marginal likelihood in nats a training example."""
        return entry.log_marginal_likelihood / self.n_train

    def to_json(self) -> str:
        """The text of the comparison's file."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def load_selection(folder: Path) -> Selection:
    """Read the comparison of a folder.

    Raises:
        ReportInputError: there is none, or one of another version.
    """
    path = folder / SELECTION
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportInputError(
            f"'{path}' cannot be read ({error.strerror}); give the folder of a comparison that has finished"
        ) from error
    except json.JSONDecodeError as error:
        raise ReportInputError(f"'{path}' is not valid JSON ({error}); compare anew to rewrite it") from error
    if not isinstance(values, dict) or values.pop("format_version", None) != FORMAT_VERSION:
        raise ReportInputError(f"'{path}' holds no comparison of format {FORMAT_VERSION}; compare anew to rewrite it")
    parts = {
        "ranking": tuple(Entry(**entry) for entry in values["ranking"]),
        "correlation": Correlation(**values["correlation"]),
    }
    return Selection(**{f.name: values[f.name] for f in fields(Selection)} | parts)


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
    rows = [("", "", "log marglik", "per example", "test NLL", "test acc.", "weights", "time")]
    rows.append(("", "", "[nats]", "[nats]", "[nats]", "[%]", "", "[s]"))
    for place, entry in enumerate(selection.ranking, start=1):
        rows.append(
            (
                f"{place}",
                entry.name,
                f"{entry.log_marginal_likelihood:.1f}",
                f"{selection.per_example(entry):.4f}",
                f"{entry.test_nll:.4f}",
                f"{100 * entry.test_accuracy:.1f}",
                f"{entry.n_weights:,}",
                f"{entry.train_seconds:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for place, name, *figures in rows:
        cells = [place.rjust(widths[0]), name.ljust(widths[1])]
        cells += [figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True)]
        lines.append("  ".join(cells))
    lines += [f"not ranked: {name}: {reason}" for name, reason in selection.failed.items()]
    return "\n".join([*lines, correlation_sentence(selection.correlation)])


def correlation_sentence(correlation: Correlation) -> str:
    """The correlations in words, with the number of models."""
    values = {name: getattr(correlation, name) for name in ("pearson", "spearman", "kendall")}
    known = [f"{name.capitalize()} {value:+.3f}" for name, value in values.items() if value is not None]
    if not known:
        return f"Correlation of log marginal likelihood and test NLL: none to give (n = {correlation.n})."
    return f"Correlation of log marginal likelihood and test NLL: {', '.join(known)} (n = {correlation.n})."
