"""The page about a calibration run: the methods' table and pictures, and how to reproduce them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laplace_ws import tables
from laplace_ws.calibration import CalibrationResult, MethodResult
from laplace_ws.calibration.run import PAGE
from laplace_ws.calibration.table import shown_columns, uncertainty_columns
from laplace_ws.experiment.folder import write_whole
from laplace_ws.report.calibration_pictures import (
    FEWEST_IN_A_BIN,
    confidence_pictures,
    corruption_pictures,
    method_reliability_pictures,
    risk_coverage_picture,
)
from laplace_ws.report.page import duration, render
from laplace_ws.tables import Column


def write_calibration_report(result: CalibrationResult, folder: str | Path) -> Path:
    """Write calibration.html into a folder, one file without links to others; returns its path."""
    path = Path(folder) / PAGE
    write_whole(path, render_calibration(result))
    return path


def render_calibration(result: CalibrationResult) -> str:
    """The page as text."""
    data, methods = result.data, result.methods
    label: Column[MethodResult] = Column("method", "", lambda m: m.label)
    damage = {name: ", ".join(f"{v:g}" for v in values) for name, values in data["corruptions"].items()}
    return render(
        "calibration.html",
        title=f"Calibration of {Path(result.trained['checkpoint']).parent.name or 'a network'}",
        about=[
            str(data["name"]),
            f"{data['n_train']:,} training images",
            f"{data['n_validation']:,} for validation",
            f"{data['n_test']:,} test images",
            f"{duration(result.total_seconds)} in all",
        ],
        verdict=calibration_verdict(methods),
        warnings=[],
        methods=methods,
        columns=[label, *shown_columns(methods)],
        remarks=_remarks(result),
        sampled=(sampled := [method for method in methods if method.uncertainty is not None]),
        uncertainty_columns=[label, *tables.shown_columns(uncertainty_columns(), sampled)],
        risk_coverage=[risk_coverage_picture(methods)],
        fewest_in_a_bin=FEWEST_IN_A_BIN,
        reliability=method_reliability_pictures(methods),
        confidence=confidence_pictures(methods, str(data["name"]), str(data["ood"])),
        corruption=corruption_pictures(methods),
        n_corrupted=f"{data['n_corrupted']:,}",
        strengths="; ".join(f"{name}: {values}" for name, values in damage.items()),
        sources={
            "Calibration": result.config,
            "Training": result.trained,
            "Environment": result.environment,
            "Data": data,
        },
    )


def calibration_verdict(methods: Sequence[MethodResult]) -> str:
    """One sentence: which method has the lowest test NLL and which the lowest calibration error, compared with the network as it is."""
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


def _remarks(result: CalibrationResult) -> list[str]:
    remarks = [
        "Best value of a column in bold. Scores of one network, so small differences may be noise.",
        "Cost: wall time of all training and fitting that a method needs, in units of the training of the network.",
    ]
    if result.data["ood"] is not None:
        remarks.append(
            f"OOD: {result.data['n_ood']:,} images of {result.data['ood']} are to be found among the test images. FPR95 is the share of "
            "test images taken for one where 95 % of the others are found."
        )
    if result.data["corruptions"]:
        remarks.append("Corrupted: mean over corruptions and their five strengths.")
    temperatures = [m.facts["temperature"] for m in result.methods if "temperature" in m.facts]
    return remarks + [f"Temperature of the logits: {value:.3g}, fitted on validation images." for value in temperatures]
