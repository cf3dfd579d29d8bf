"""The page itself: words, table, pictures and how to reproduce them, in one HTML file that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml

from laplace_ws.marglik.hyperparameters import ELEMENTWISE, ELEMENTWISE_START
from laplace_ws.report.figures import reliability_pictures, training_pictures
from laplace_ws.report.precision_figures import precision_pictures
from laplace_ws.report.records import RunRecord, load_run
from laplace_ws.report.style import Picture
from laplace_ws.report.table import model_table, precision_table
from laplace_ws.report.verdict import evidence_check, verdict

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p { margin: .4rem 0; max-width: 60rem; }
.about, figcaption, .note { color: #555; font-size: .88rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid #d55e00; padding: .3rem 0 .3rem .8rem; margin: 1rem 0; }
.warning { border-left: 4px solid #e69f00; padding: .2rem 0 .2rem .8rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; white-space: normal; border-bottom: 2px solid #999; }
th small, td small { display: block; font-weight: 400; color: #555; white-space: nowrap; }
tbody th { font-weight: 400; text-align: left; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.tuned, tr.tuned th:first-child { background: #fdf1e9; }
.pictures { display: grid; gap: 1rem; align-items: start; }
.three { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.two { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto; }
.small figure img { max-width: 22rem; }
pre { background: #f6f6f6; padding: .8rem; font-size: .84rem; line-height: 1.45; overflow-x: auto; }
.sources { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
summary { cursor: pointer; margin: .8rem 0 .4rem; }
"""


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
        _section(
            "Tuned against fixed prior precision" if record.fixed else "Result",
            model_table(record),
            _table_notes(record),
        ),
        _section("Training", _pictures(training_pictures(record), "three")),
        _section(
            "Prior precision by layer (tuned)",
            _pictures(precision_pictures(record), "two"),
            precision_table(record),
        ),
        _reliability_section(record),
        _section("How to reproduce", _sources(record)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(record.name)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _head(record: RunRecord) -> str:
    about = [f"{record.data.get('name', 'data')}", f"{record.n_train:,} training examples"]
    if isinstance(n_test := record.data.get("n_test"), int):
        about.append(f"{n_test:,} test examples")
    if record.total_seconds is not None:
        about.append(f"{_duration(record.total_seconds)} in all")
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
    return _section(title, explanation, _pictures(pictures, "small")) if pictures else ""


def _sources(record: RunRecord) -> str:
    blocks = (("Configuration", record.config), ("Environment", record.environment), ("Data", record.data))
    return f'<div class="sources">{"".join(_yaml_block(title, values) for title, values in blocks)}</div>'


def _yaml_block(title: str, values: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return f"<div><h3>{escape(title)}</h3><pre>{escape(text)}</pre></div>"


def _section(title: str, *parts: str) -> str:
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _pictures(pictures: Iterable[Picture], layout: str) -> str:
    figures = "".join(_figure(picture) for picture in pictures)
    return f'<div class="pictures {layout}">{figures}</div>' if figures else ""


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode("ascii")
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img alt="{escape(picture.alt)}" src="data:image/svg+xml;base64,{data}">{caption}</figure>\n'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
