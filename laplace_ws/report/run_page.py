"""The page about a training run: what the tuned prior precision bought over the fixed ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from laplace_ws.experiment.folder import PAGE, check_page, write_whole
from laplace_ws.marglik.hyperparameters import ELEMENTWISE, ELEMENTWISE_START
from laplace_ws.report.page import duration, render
from laplace_ws.report.plots import pictures_by_section
from laplace_ws.report.records import RunRecord, load_run
from laplace_ws.report.table import PRECISION_COLUMNS, model_columns, precisions
from laplace_ws.report.verdict import evidence_check, verdict
from laplace_ws.tables import shown_columns


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from `run_dir/summary.json` and `run_dir/metrics.jsonl`.

    Args:
        run_dir: folder of one training run.

    Returns:
        Path of the page, one file without links to others.

    Raises:
        RecordError: if one of the two files is missing or broken.
        ExperimentError: a page of somebody else would be replaced, or the run is being replaced.
    """
    path = Path(run_dir) / PAGE
    check_page(path)
    write_whole(path, render_run(load_run(run_dir)))
    return path


def render_run(record: RunRecord) -> str:
    """The page as text."""
    result, data = record.result, asdict(record.result.data)
    return render(
        "run.html",
        title=result.name,
        about=_about(record),
        verdict=verdict(record),
        warnings=[*_collapsed(record), *_changes(record), *record.notes],
        record=record,
        columns=shown_columns(model_columns(record.n_train), record.models),
        remarks=_remarks(record),
        pictures=pictures_by_section(record),
        precision_columns=PRECISION_COLUMNS,
        precisions=precisions(record),
        sources={"Configuration": result.config, "Environment": result.environment, "Data": data},
    )


def _about(record: RunRecord) -> list[str]:
    data, seconds = record.result.data, record.result.total_seconds
    about = [data.name, f"{data.n_train:,} training examples"]
    about += [] if data.n_test is None else [f"{data.n_test:,} test examples"]
    return about + ([] if seconds is None else [f"{duration(seconds)} in all"])


def _collapsed(record: RunRecord) -> list[str]:
    return [
        f"Collapsed prior precision ({model.label}): {', '.join(model.collapsed)}. These parameters are held at their prior mean."
        for model in record.models
        if model.collapsed
    ]


def _changes(record: RunRecord) -> list[str]:
    """What was changed where a training was resumed."""
    return [
        f"After epoch {c['epoch']} of the network {model.label}, {c['setting']} was changed from {c['was']} to {c['now']}: the training "
        "had diverged."
        for model in record.models
        for c in model.changes
    ]


def _remarks(record: RunRecord) -> list[str]:
    overhead = _overhead(record)
    return [*([overhead] if overhead else []), *_comparisons(record)]


def _overhead(record: RunRecord) -> str | None:
    """What the tuning cost, against the gradient steps."""
    tuned, marglik = record.tuned, record.result.config.get("marglik")
    if tuned.tuning_overhead is None or tuned.final_fit_overhead is None:
        return None
    said = (
        f"Tuning took {100 * tuned.tuning_overhead:.1f} % of the time of the gradient steps, the last fit, on all the data, "
        f"{100 * tuned.final_fit_overhead:.1f} %"
    )
    share = marglik.get("curvature_budget") if isinstance(marglik, dict) else None
    if share is None or tuned.over_budget is None:
        return f"{said}."
    limit = f"the budget of {100 * share:g} %"
    return f"{said}: " + (
        f"together {100 * tuned.over_budget:.1f} percentage points above {limit}."
        if tuned.over_budget
        else f"within {limit}."
    )


def _comparisons(record: RunRecord) -> list[str]:
    """What to know of the table where it compares networks."""
    if not record.fixed:
        return []
    shared = record.tuned.prior_precision.get(ELEMENTWISE)
    remarks = [
        f"Prior precision and weight decay are of the layers. Elementwise scales and biases share one prior precision of their own: "
        f"{shared:.3g} in the tuned network, {ELEMENTWISE_START:g} in the fixed ones."
        if shared is not None
        else None,
        "Best value of a column in bold. Each row is one training run, so small differences may be noise of the seed.",
        _curvature_remark(record),
        evidence_check(record),
    ]
    return [remark for remark in remarks if remark]


def _curvature_remark(record: RunRecord) -> str | None:
    """Why the table and the curve of the log marginal likelihood may differ."""
    marglik = record.result.config.get("marglik")
    if not isinstance(marglik, dict):
        return None
    tuning = [marglik.get("curvature"), marglik.get("kfac_approx") or "reduce"]
    final = [marglik.get("final_curvature") or tuning[0], marglik.get("final_kfac_approx") or tuning[1]]
    if final == tuning:
        return None
    words = [f"{curvature}, kfac_approx={approx}" for curvature, approx in (final, tuning)]
    return f"The table's log marginal likelihoods are taken with {words[0]}, those over the epochs with {words[1]}, so they differ."
