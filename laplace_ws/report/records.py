"""A run as its report shows it: results by network, with the epochs that led to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laplace_ws.experiment.folder import check_whole
from laplace_ws.experiment.records import (
    FIXED,
    TUNED,
    EpochRecord,
    ModelResult,
    RunResult,
    read_epochs,
    read_run,
)


@dataclass(frozen=True, kw_only=True)
class Model(ModelResult):
    """A network of the run; `prior_precision` is by group where the run says which parameters share one, else by parameter.

    Attributes:
        run: "tuned", or "fixed-" and the prior precision.
    """

    run: str

    @property
    def label(self) -> str:
        """Name for readers."""
        return run_label(self.run)

    @property
    def is_tuned(self) -> bool:
        """Whether the prior precision was learned rather than fixed."""
        return self.run == TUNED


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows.

    Attributes:
        result: as the run wrote it.
        models: the tuned network, then the fixed ones from the smallest prior precision to the largest.
        history: the epochs in order, by run.
        notes: what a reader should know about the files.
    """

    result: RunResult
    models: tuple[Model, ...]
    history: Mapping[str, tuple[EpochRecord, ...]]
    notes: Sequence[str] = ()

    @property
    def tuned(self) -> Model:
        """The network whose prior precision was learned."""
        return self.models[0]

    @property
    def fixed(self) -> tuple[Model, ...]:
        """The others."""
        return self.models[1:]

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return self.result.data.n_train


def load_run(run_dir: str | Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        RecordError: naming the file, what is wrong and how to mend it.
    """
    check_whole(Path(run_dir))
    result = read_run(Path(run_dir))
    epochs, notes = read_epochs(Path(run_dir))
    order = sorted(result.fixed, key=lambda delta: (_as_float(delta) is None, _as_float(delta) or 0.0))
    models = {TUNED: result.tuned, **{f"{FIXED}{delta}": result.fixed[delta] for delta in order}}
    shown = tuple(_shown(run, model) for run, model in models.items())
    groups = result.tuned.prior_group
    return RunRecord(result, shown, _history(epochs, [model.run for model in shown], groups), notes)


def run_label(run: str) -> str:
    """Name of a run as readers see it: "tuned", or "fixed δ = 5" for "fixed-5"."""
    return f"fixed δ = {run.removeprefix(FIXED)}" if run.startswith(FIXED) else run


def by_group(precision: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """One entry per group of parameters that share a prior precision, in the order of their first parameters."""
    grouped: dict[str, float] = {}
    for name, value in precision.items():
        grouped.setdefault(groups.get(name, name), value)
    return grouped


def _shown(run: str, model: ModelResult) -> Model:
    values: dict[str, Any] = {**vars(model), "prior_precision": by_group(model.prior_precision, model.prior_group)}
    return Model(run=run, **values)


def _history(
    epochs: Iterable[EpochRecord], runs: Sequence[str], groups: Mapping[str, str]
) -> dict[str, tuple[EpochRecord, ...]]:
    """Epochs by run, in the order of `runs`; of one written twice, as after a resume, the last record counts.

    The two files may write the same number differently ("fixed-1", "fixed-1.0").
    """
    known = {_run_key(run): run for run in runs}
    found: dict[str, dict[int, EpochRecord]] = {run: {} for run in runs}
    for e in epochs:
        run = known.get(_run_key(e.run), e.run)
        found.setdefault(run, {})[e.epoch] = replace(e, prior_precision=by_group(e.prior_precision, groups))
    return {run: tuple(by_epoch[i] for i in sorted(by_epoch)) for run, by_epoch in found.items() if by_epoch}


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _run_key(run: str) -> str | float:
    value = _as_float(run.removeprefix(FIXED)) if run.startswith(FIXED) else None
    return run if value is None else value
