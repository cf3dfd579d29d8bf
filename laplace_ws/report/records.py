"""Reading and checking what a training run left behind: `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from laplace_ws.errors import InputError
from laplace_ws.metrics.reliability import ReliabilityCurve

FORMAT_VERSION = 1
TUNED = "tuned"
_FIXED_PREFIX = "fixed-"


class ReportInputError(InputError):
    """A file that the report reads is missing, broken or of another format."""


@dataclass(frozen=True)
class EpochRecord:
    """One line of `metrics.jsonl`: one epoch of one trained model. Losses in nats per example, log evidence in nats."""

    run: str
    epoch: int
    train_nll: float | None = None
    train_accuracy: float | None = None
    test_nll: float | None = None
    test_accuracy: float | None = None
    log_marginal_likelihood: float | None = None
    prior_precision: Mapping[str, float] = field(default_factory=dict)
    lr: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ModelSummary:
    """Final figures of one trained model; None where a figure was not computed.

    `prior_precision` is by group where the run says which parameters share one (`prior_group`), else by parameter.
    """

    run: str
    label: str
    log_marginal_likelihood: float | None = None
    test_nll: float | None = None
    test_accuracy: float | None = None
    test_ece: float | None = None
    test_rmse: float | None = None
    train_seconds: float | None = None
    curvature_seconds: float | None = None
    prior_precision: Mapping[str, float] = field(default_factory=dict)
    prior_group: Mapping[str, str] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    collapsed: tuple[str, ...] = ()
    reliability: ReliabilityCurve | None = None

    @property
    def is_tuned(self) -> bool:
        """Whether the prior precision was learned rather than fixed."""
        return self.run == TUNED


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows; `fixed` goes from the smallest prior precision to the largest."""

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    n_train: int
    total_seconds: float | None
    tuned: ModelSummary
    fixed: tuple[ModelSummary, ...]
    history: Mapping[str, tuple[EpochRecord, ...]]
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[ModelSummary, ...]:
        """The tuned model, then the fixed ones."""
        return (self.tuned, *self.fixed)


def load_run(run_dir: str | Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ReportInputError: naming the file, what is wrong and how to mend it.
    """
    run_dir = Path(run_dir)
    summary_path, metrics_path = run_dir / "summary.json", run_dir / "metrics.jsonl"
    summary = _read_summary(summary_path)
    tuned = _model(summary_path, summary["tuned"], TUNED)
    fixed = tuple(_model(summary_path, summary["fixed"][delta], _FIXED_PREFIX + delta) for delta in _sorted(summary))
    history, notes = _read_metrics(metrics_path)
    return RunRecord(
        name=str(summary["name"]),
        config=summary["config"],
        environment=summary["environment"],
        data=summary["data"],
        n_train=_positive_int(summary_path, summary["data"], "n_train"),
        total_seconds=_number(summary_path, summary, "total_seconds"),
        tuned=tuned,
        fixed=fixed,
        history=_match_runs(_grouped(history, tuned.prior_group), (tuned, *fixed)),
        notes=tuple(notes),
    )


def run_label(run: str) -> str:
    """Name of a run as readers see it: "tuned", or "fixed δ = 5" for "fixed-5"."""
    return f"fixed δ = {run.removeprefix(_FIXED_PREFIX)}" if run.startswith(_FIXED_PREFIX) else run


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise ReportInputError(
            f"{path} cannot be read ({error.strerror}); give the folder of a run that has finished"
        ) from error


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ReportInputError(f"{path} is not valid JSON ({error}); run the training again to rewrite it") from error
    if not isinstance(summary, dict):
        raise ReportInputError(f"{path} holds no JSON object; run the training again to rewrite it")
    version = summary.get("format_version")
    if version != FORMAT_VERSION:
        raise ReportInputError(
            f"{path} has format_version {version!r}, this report reads {FORMAT_VERSION}; "
            "write the report with the version of laplace_ws that trained the models"
        )
    if "name" not in summary:
        raise ReportInputError(f"{path} lacks 'name'; add the run's name")
    summary.setdefault("fixed", {})
    for key in ("config", "environment", "data", "tuned", "fixed"):
        if not isinstance(summary.get(key), dict):
            raise ReportInputError(f"{path}: {key!r} is missing or not an object; run the training again to rewrite it")
    return summary


def _read_metrics(path: Path) -> tuple[dict[str, dict[int, EpochRecord]], list[str]]:
    """Epochs by run; a line written twice, as after a resume, counts as last written."""
    lines = [(number, line) for number, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    history: dict[str, dict[int, EpochRecord]] = {}
    notes: list[str] = []
    for number, line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == lines[-1][0]:
                notes.append(f"The last line of {path.name} is cut off and was left out.")
                break
            raise ReportInputError(f"{path}, line {number} is not valid JSON ({error.msg}); delete the line") from error
        record = _epoch(path, number, values)
        history.setdefault(record.run, {})[record.epoch] = record
    if not history:
        raise ReportInputError(f"{path} holds no complete line; train for one epoch at least")
    return history, notes


def _epoch(path: Path, number: int, values: Any) -> EpochRecord:
    where = f"{path}, line {number}"
    if not isinstance(values, dict) or not isinstance(values.get("run"), str):
        raise ReportInputError(f"{where} names no run; give it a string 'run' or delete the line")
    numbers = {
        f.name: _number(where, values, f.name)
        for f in fields(EpochRecord)
        if f.name not in ("run", "epoch", "prior_precision")
    }
    return EpochRecord(
        run=values["run"],
        epoch=_positive_int(where, values, "epoch"),
        prior_precision=_numbers(where, values, "prior_precision"),
        **numbers,
    )


def _model(path: Path, values: Any, run: str) -> ModelSummary:
    where = f"{path}, {run}"
    if not isinstance(values, dict):
        raise ReportInputError(f"{where} is not an object; run the training again to rewrite it")
    try:
        curve = values.get("reliability")
        reliability = None if curve is None else ReliabilityCurve.from_dict(curve)
    except (TypeError, ValueError, AttributeError) as error:
        raise ReportInputError(f"{where}: 'reliability' cannot be read: {error}") from error
    numbers = {
        key: _number(where, values, key)
        for key in (
            "log_marginal_likelihood",
            "test_nll",
            "test_accuracy",
            "test_ece",
            "test_rmse",
            "train_seconds",
            "curvature_seconds",
        )
    }
    groups = values.get("prior_group") or {}
    if not isinstance(groups, dict):
        raise ReportInputError(f"{where}: 'prior_group' is {groups!r}; write an object from parameter to group")
    return ModelSummary(
        run=run,
        label=run_label(run),
        prior_precision=by_group(_numbers(where, values, "prior_precision"), groups),
        prior_group=groups,
        weight_decay=_numbers(where, values, "weight_decay"),
        collapsed=tuple(str(name) for name in values.get("collapsed") or ()),
        reliability=reliability if reliability is not None and reliability.n_examples else None,
        **numbers,
    )


def by_group(precision: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """One entry per group of parameters that share a prior precision, in the order of their first parameters."""
    grouped: dict[str, float] = {}
    for name, value in precision.items():
        grouped.setdefault(groups.get(name, name), value)
    return grouped


def _number(where: str | Path, values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ReportInputError(f"{where}: {key!r} is {value!r}; write a number, or null where there is none")
    return float(value)


def _numbers(where: str | Path, values: Mapping[str, Any], key: str) -> dict[str, float]:
    mapping = values.get(key) or {}
    if not isinstance(mapping, dict):
        raise ReportInputError(f"{where}: {key!r} is {mapping!r}; write an object from parameter name to number")
    numbers = {name: _number(where, mapping, name) for name in mapping}
    return {name: number for name, number in numbers.items() if number is not None}


def _positive_int(where: str | Path, values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ReportInputError(f"{where}: {key!r} is {value!r}; write a whole number from 1")
    return value


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _sorted(summary: Mapping[str, Any]) -> list[str]:
    """Keys of the fixed models by value; those that are no number come last."""
    values = {delta: _as_float(delta) for delta in summary["fixed"]}
    return sorted(values, key=lambda delta: (values[delta] is None, values[delta] or 0.0))


def _grouped(
    history: Mapping[str, Mapping[int, EpochRecord]], groups: Mapping[str, str]
) -> dict[str, dict[int, EpochRecord]]:
    return {
        run: {i: replace(e, prior_precision=by_group(e.prior_precision, groups)) for i, e in epochs.items()}
        for run, epochs in history.items()
    }


def _match_runs(
    history: Mapping[str, Mapping[int, EpochRecord]], models: tuple[ModelSummary, ...]
) -> dict[str, tuple[EpochRecord, ...]]:
    """History in the order of the summary, whose keys may write the same number differently ("fixed-1", "1.0")."""
    written = {_run_key(model.run): model.run for model in models}
    named: dict[str, tuple[EpochRecord, ...]] = {}
    for run, epochs in history.items():
        named[written.get(_run_key(run), run)] = tuple(epochs[epoch] for epoch in sorted(epochs))
    order = [model.run for model in models]
    return {run: named[run] for run in [*order, *(run for run in named if run not in order)] if run in named}


def _run_key(run: str) -> str | float:
    value = _as_float(run.removeprefix(_FIXED_PREFIX)) if run.startswith(_FIXED_PREFIX) else None
    return run if value is None else value
