"""The page about a calibration run: the methods' table and pictures, and how to reproduce them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from laplace_ws.calibration import CalibrationResult, MethodResult
from laplace_ws.calibration.table import shown_columns
from laplace_ws.report.calibration_figures import (
    FEWEST_IN_A_BIN,
    confidence_pictures,
    corruption_pictures,
    method_reliability_pictures,
)
from laplace_ws.report.html import document, duration, picture_grid, section, yaml_blocks

PAGE = "calibration.html"


def write_calibration_report(result: CalibrationResult, folder: str | Path) -> Path:
    """Write calibration.html into a folder, one file without links to others; says where."""
    path = Path(folder) / PAGE
    path.write_text(render_calibration(result), encoding="utf-8")
    return path


def render_calibration(result: CalibrationResult) -> str:
    """The page as text."""
    return document(
        _title(result),
        [
            _head(result),
            section("Methods", method_table(result.methods), _table_notes(result)),
            section(
                "Reliability",
                _note(
                    "Test images binned by the probability of the top label. On the dotted diagonal a method is right as often as it says; "
                    "vertical lines are 95 % intervals of the accuracy. The picture of all methods leaves out bins of fewer than "
                    f"{FEWEST_IN_A_BIN} images."
                ),
                picture_grid(method_reliability_pictures(result.methods), "small"),
            ),
            _ood_section(result),
            _corruption_section(result),
            section("How to reproduce", _sources(result)),
        ],
    )


def method_table(methods: Sequence[MethodResult]) -> str:
    """One row per method, the best value of a column in bold; columns that no method has are left out."""
    columns = shown_columns(methods)
    titles = [("method", ""), *((column.title, column.unit) for column in columns)]
    head = "".join(
        f'<th scope="col">{escape(title)}{f"<small>{escape(unit)}</small>" if unit else ""}</th>'
        for title, unit in titles
    )
    best = [column.best(methods) for column in columns]
    rows = []
    for method in methods:
        cells = [
            f"<strong>{escape(text)}</strong>" if (text := column.text(method)) == best_text else escape(text)
            for column, best_text in zip(columns, best, strict=True)
        ]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(method.label)}</th>{body}</tr>')
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def calibration_verdict(methods: Sequence[MethodResult]) -> str:
    """One sentence: which method has the lowest test NLL and which the lowest calibration error, beside the network as it is."""
    parts = []
    for score, name, scale, unit in (("nll", "test NLL", 1.0, " nats"), ("ece", "calibration error", 100.0, " %")):
        scored = [(value, method) for method in methods if (value := method.test[score]) is not None]
        if not scored:
            continue
        value, best = min(scored, key=lambda pair: pair[0])
        own = methods[0].test[score]
        beside = "" if best is methods[0] or own is None else f", {scale * own:.3g}{unit} as {methods[0].label}"
        parts.append(f"the lowest {name} is that of {best.label} ({scale * value:.3g}{unit}{beside})")
    sentence = "; ".join(parts) or "no method has a finite test NLL or calibration error"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _title(result: CalibrationResult) -> str:
    return f"Calibration of {Path(result.trained['checkpoint']).parent.name or 'a network'}"


def _head(result: CalibrationResult) -> str:
    data = result.data
    about = [
        str(data["name"]),
        f"{data['n_train']:,} training images",
        f"{data['n_validation']:,} for validation",
        f"{data['n_test']:,} test images",
        f"{duration(result.total_seconds)} in all",
    ]
    return (
        f"<h1>{escape(_title(result))}</h1>\n"
        f'<p class="about">{escape(" · ".join(about))}</p>\n'
        f'<p class="verdict">{escape(calibration_verdict(result.methods))}</p>'
    )


def _table_notes(result: CalibrationResult) -> str:
    notes = ["Best value of a column in bold. Scores of one network, so small differences may be noise."]
    if result.data["ood"] is not None:
        notes.append(
            f"OOD: {result.data['n_ood']:,} images of {result.data['ood']} are to be found among the test images. FPR95 is the share of "
            "test images taken for one where 95 % of the others are found."
        )
    if result.data["corruptions"]:
        notes.append("Corrupted: mean over corruptions and their five strengths.")
    temperatures = [m.facts["temperature"] for m in result.methods if "temperature" in m.facts]
    notes += [f"Temperature of the logits: {value:.3g}, fitted on validation images." for value in temperatures]
    return "".join(map(_note, notes))


def _ood_section(result: CalibrationResult) -> str:
    pictures = confidence_pictures(result.methods, str(result.data["name"]), str(result.data["ood"]))
    note = _note("How sure each method is of the test images, and of images of things that the network has never seen.")
    return section("Out-of-distribution images", note, picture_grid(pictures, "small")) if pictures else ""


def _corruption_section(result: CalibrationResult) -> str:
    pictures = corruption_pictures(result.methods)
    if not pictures:
        return ""
    values = "; ".join(
        f"{name}: {', '.join(f'{v:g}' for v in parameters)}" for name, parameters in result.data["corruptions"].items()
    )
    note = _note(
        f"Scores on {result.data['n_corrupted']:,} damaged test images. Strengths 1 to 5 are {values} (standard deviation of noise with "
        "pixels from 0 to 1, of blur in pixels, factor on contrast)."
    )
    return section("Damaged images", note, picture_grid(pictures, "three"))


def _sources(result: CalibrationResult) -> str:
    return yaml_blocks(
        {
            "Calibration": result.config,
            "Training": result.trained,
            "Environment": result.environment,
            "Data": result.data,
        }
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
