"""The page itself: words, table, pictures and how to reproduce them, in one HTML file that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from laplace_ws.marglik.hyperparameters import ELEMENTWISE, ELEMENTWISE_START
from laplace_ws.report.figures import reliability_pictures, training_pictures
from laplace_ws.report.html import document, duration, picture_grid, section, yaml_blocks
from laplace_ws.report.precision_figures import precision_pictures
from laplace_ws.report.records import RunRecord, load_run
from laplace_ws.report.table import model_table, precision_table
from laplace_ws.report.verdict import evidence_check, verdict


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from `run_dir/summary.json` and `run_dir/metrics.jsonl`.

    Args:
        run_dir: folder of one training run.

    Returns:
        Path of the page, one file without links to others.

    Raises:
        ReportInputError: if one of the two files is missing or broken.
    """
    run_dir = Path(run_dir)
    page = render_page(load_run(run_dir))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def render_page(record: RunRecord) -> str:
    """The page as text."""
    sections = [
        _head(record),
        section(
            "Tuned against fixed prior precision" if record.fixed else "Result",
            model_table(record),
            _table_notes(record),
        ),
        section("Training", picture_grid(training_pictures(record), "three")),
        section(
            "Prior precision by layer (tuned)",
            picture_grid(precision_pictures(record), "two"),
            precision_table(record),
        ),
        _reliability_section(record),
        section("How to reproduce", _sources(record)),
    ]
    return document(record.name, sections)


def _head(record: RunRecord) -> str:
    about = [f"{record.data.get('name', 'data')}", f"{record.n_train:,} training examples"]
    if isinstance(n_test := record.data.get("n_test"), int):
        about.append(f"{n_test:,} test examples")
    if record.total_seconds is not None:
        about.append(f"{duration(record.total_seconds)} in all")
    parts = [
        f"<h1>{escape(record.name)}</h1>",
        f'<p class="about">{escape(" · ".join(about))}</p>',
        f'<p class="verdict">{escape(verdict(record))}</p>',
    ]
    collapsed = [(model.label, model.collapsed) for model in record.models if model.collapsed]
    for label, names in collapsed:
        parts.append(
            f'<p class="warning">Collapsed prior precision ({escape(label)}): {escape(", ".join(names))}. '
            "These parameters are held at their prior mean.</p>"
        )
    parts += [f'<p class="warning">{escape(note)}</p>' for note in record.notes]
    return "\n".join(parts)


def _table_notes(record: RunRecord) -> str:
    if not record.fixed:
        return ""
    shared = record.tuned.prior_precision.get(ELEMENTWISE)
    notes = [
        f"Prior precision and weight decay are of the layers. Elementwise scales and biases share one prior precision of their own: "
        f"{shared:.3g} in the tuned network, {ELEMENTWISE_START:g} in the fixed ones."
        if shared is not None
        else None,
        "Best value of a column in bold. Each row is one training run, so small differences may be noise of the seed.",
        _curvature_note(record),
        evidence_check(record),
    ]
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)


def _curvature_note(record: RunRecord) -> str | None:
    """Why the table and the curve of the log marginal likelihood may differ."""
    marglik = record.config.get("marglik")
    tuning, final = (
        (marglik.get(key) for key in ("curvature", "final_curvature")) if isinstance(marglik, dict) else (None, None)
    )
    if final in (None, tuning):
        return None
    return f"The table's log marginal likelihoods are taken with {final}, those over the epochs with {tuning}, so they differ."


def _reliability_section(record: RunRecord) -> str:
    pictures = reliability_pictures(record)
    explanation = (
        '<p class="note">Test examples binned by the probability of the top label. On the dotted diagonal the model is '
        "right as often as it says; vertical lines are 95 % intervals of the accuracy.</p>"
    )
    title = "Calibration: fixed, then tuned" if record.fixed else "Calibration"
    return section(title, explanation, picture_grid(pictures, "small")) if pictures else ""


def _sources(record: RunRecord) -> str:
    return yaml_blocks({"Configuration": record.config, "Environment": record.environment, "Data": record.data})
