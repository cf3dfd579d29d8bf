"""The page and the pictures of a calibration, from numbers made up."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from laplace_ws.calibration import (
    CalibrationResult,
    CorruptedScores,
    MethodResult,
    Uncertainty,
    as_text,
    output_folder,
    write_result,
)
from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.table import columns, shown_columns, uncertainty_columns
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.metrics import ReliabilityCurve, RiskCoverageCurve
from laplace_ws.report.calibration_page import calibration_verdict, render_calibration, write_calibration_report
from laplace_ws.report.calibration_pictures import method_styles, risk_coverage_picture

CURVE = ReliabilityCurve((0.0, 0.25, 0.5, 0.75, 1.0), (None, 0.4, 0.6, 0.9), (None, 0.5, 0.55, 0.85), (0, 5, 20, 75))
RISKS = RiskCoverageCurve((0.25, 0.5, 0.75, 1.0), (0.0, 0.1, 0.15, 0.19))


def method(name, label, nll, ece, *, ood=True, corrupted=True, sampled=False, cost=1.0, **facts):
    scores = {"accuracy": 0.81, "nll": nll, "brier": 0.31, "ece": ece, "aurc": 0.0543}
    damaged = tuple(
        CorruptedScores(
            corruption,
            strength,
            scores | {"accuracy": 0.81 - 0.1 * strength},
            Uncertainty(1.0 + strength, 1.0, float(strength)) if sampled else None,
        )
        for corruption in ("noise", "blur")
        for strength in range(6)
    )
    return MethodResult(
        name,
        label,
        facts,
        scores,
        CURVE,
        (1, 2, 3, 4) if ood else None,
        {"auroc": 0.912, "fpr95": 0.345} | ({"auroc_epistemic": 0.9345} if sampled else {}) if ood else None,
        damaged if corrupted else (),
        1.5,
        20.0 * cost,
        RISKS,
        Uncertainty(0.5, 0.4, 0.1) if sampled else None,
        Uncertainty(0.9, 0.5, 0.4) if sampled and ood else None,
        cost,
        2.5 * cost,
    )


def make_result(*methods):
    return CalibrationResult(
        config={"checkpoint": "runs/<demo>/checkpoint.pt", "note": "<script>alert(1)</script>"},
        environment={"torch": "2.9.0"},
        trained={"checkpoint": "runs/<demo>/checkpoint.pt", "epoch": 3},
        data={
            "name": "fashion-mnist-subset", "n_train": 3000, "n_validation": 1000, "n_test": 100, "ood": "mnist", "n_ood": 10,
            "n_corrupted": 50, "corruptions": {"noise": [0.08, 0.12], "blur": [0.5, 0.75]},
        },
        methods=methods,
        total_seconds=200.0,
    )  # fmt: skip


NETWORK = method("map", "MAP", 0.912, 0.123)
SCALED = method("temperature", "temperature scaling", 0.534, 0.021, temperature=1.875)
LAPLACE = method("laplace_kron_marglik", "Laplace kron (marglik)", 0.545, 0.034, fit_seconds=4.2)
ENSEMBLE = method("ensemble", "deep ensemble of 5", 0.54, 0.03, sampled=True, cost=5.0)


@pytest.fixture(scope="module")
def page():
    return render_calibration(make_result(NETWORK, SCALED, LAPLACE))


def text_of(page):
    parts = []
    parser = HTMLParser()
    parser.handle_data = parts.append
    parser.feed(page)
    return " ".join(" ".join(parts).split())


def test_page_stands_alone_and_has_every_picture(page):
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(pictures) == (1 + 3) + 1 + 3 + 2  # reliability, risk by coverage, confidence, corruption
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert len(re.findall(r"<img alt=\"[^\"]{20,}\"", page)) == len(pictures)


def test_numbers_are_on_the_page(page):
    text = text_of(page)
    for number in (
        "81.00",
        "0.9120",
        "0.5340",
        "91.20",
        "34.50",
        "4.2",
        "1.88",
        "3,000 training images",
        "3 min in all",
    ):
        assert number in text, number
    assert "Strengths 1 to 5 are noise: 0.08, 0.12; blur: 0.5, 0.75" in text
    assert "10 images of mnist" in text
    assert "Calibration of <demo>" in text
    bold = re.findall(r"<strong>([^<]*)</strong>", page)
    assert "0.5340" in bold
    assert "0.9120" not in bold
    assert "4.2" not in bold  # times are not judged


def test_verdict_names_the_best_beside_the_network():
    assert calibration_verdict([NETWORK, SCALED, LAPLACE]) == (
        "The lowest test NLL is that of temperature scaling (0.534 nats, 0.912 nats as MAP); "
        "the lowest calibration error is that of temperature scaling (2.1 %, 12.3 % as MAP)."
    )
    assert calibration_verdict([NETWORK]) == (
        "The lowest test NLL is that of MAP (0.912 nats); the lowest calibration error is that of MAP (12.3 %)."
    )
    failed = method("map", "MAP", None, None)
    assert calibration_verdict([failed]) == "No method has a finite test NLL or calibration error."
    assert calibration_verdict([failed, LAPLACE]).startswith(
        "The lowest test NLL is that of Laplace kron (marglik) (0.545 nats);"
    )


def test_what_was_not_asked_for_is_left_out():
    bare = [method("map", "MAP", 0.9, 0.1, ood=False, corrupted=False)]
    result = make_result(*bare)
    result = CalibrationResult(**{**vars(result), "data": {**result.data, "ood": None, "corruptions": {}}})
    text = text_of(render_calibration(result))
    assert "Out-of-distribution" not in text
    assert "Damaged" not in text
    assert "Uncertainty" not in text
    titles = ["accuracy", "NLL", "Brier", "ECE", "AURC", "prediction", "cost", "prediction cost"]
    assert [c.title for c in shown_columns(bare)] == titles


def test_a_missing_value_is_a_dash_and_no_gap_in_the_pictures():
    failed = method("laplace", "Laplace diag (marglik)", None, 0.2)
    page = render_calibration(make_result(NETWORK, failed))
    assert ">–</td>" in page
    assert failed.mean_corrupted("nll") is None
    assert failed.mean_corrupted("accuracy") == pytest.approx(0.81 - 0.3)


def test_styles_of_many_methods_differ():
    methods = [method(str(i), str(i), 1.0, 0.1) for i in range(12)]
    styles = method_styles(methods)
    assert len({s.color for s in styles.values()}) == len({s.marker for s in styles.values()}) == 12


def test_costs_and_uncertainty_are_in_tables_page_and_file(tmp_path):
    methods = [NETWORK, ENSEMBLE]
    by_title = {column.title: column for column in columns()}
    assert [by_title["cost"].text(m) for m in methods] == ["1.00", "5.00"]
    assert [by_title["prediction cost"].text(m) for m in methods] == ["2.5", "12.5"]
    assert [by_title["OOD AUROC, epistemic"].text(m) for m in methods] == ["–", "93.45"]
    split = {column.title: column.text(ENSEMBLE) for column in uncertainty_columns()}
    assert split["total, test"] == "0.5000"
    assert split["epistemic, OOD"] == "0.4000"
    assert split["epistemic, corrupted"] == "3.0000"  # the undamaged images are left out
    assert [column.text(NETWORK) for column in uncertainty_columns()] == ["–"] * 9
    text = as_text(methods)
    assert text.count("deep ensemble of 5") == 2
    assert text.count("MAP") == 2  # a row of the first table, and the unit of a column
    page = render_calibration(make_result(*methods))
    assert "<h2>Uncertainty</h2>" in page
    assert '<th scope="col">cost<small>training runs</small></th>' in page
    assert ">0.4000</td>" in page
    written = json.loads(write_result(make_result(*methods), tmp_path).read_text())["methods"]
    assert written["ensemble"]["training_runs"] == 5.0
    assert written["ensemble"]["ood"]["auroc_epistemic"] == 0.9345
    assert written["ensemble"]["uncertainty"] == {"total": 0.5, "aleatoric": 0.4, "epistemic": 0.1}
    assert written["ensemble"]["corrupted"][5]["uncertainty"]["epistemic"] == 5.0
    assert written["map"]["uncertainty"] is None


def test_the_risk_of_every_method_is_drawn():
    picture = risk_coverage_picture([NETWORK, method("x", "failed", None, 0.1), ENSEMBLE])
    assert "MAP: 5.43 %; failed: 5.43 %; deep ensemble of 5: 5.43 %" in picture.alt
    assert picture.svg.count(method_styles([NETWORK, SCALED])["temperature"].color.lower().encode()) >= 2


def test_best_of_a_column_is_at_its_better_end():
    by_title = {column.title: column for column in columns()}
    assert by_title["NLL"].best([NETWORK, SCALED, LAPLACE]) == "0.5340"
    better = method("x", "x", 1.0, 0.1)
    better = MethodResult(**{**vars(better), "test": {**better.test, "accuracy": 0.9}})
    assert by_title["accuracy"].best([NETWORK, better]) == "90.00"
    assert by_title["accuracy"].best([better]) is None
    assert by_title["prediction"].best([NETWORK, SCALED]) is None


def test_files_are_written_whole(tmp_path):
    result = make_result(NETWORK, SCALED)
    path = write_result(result, tmp_path)
    found = json.loads(path.read_text())
    assert found["format_version"] == 1
    assert found["methods"]["temperature"]["temperature"] == 1.875
    assert ReliabilityCurve.from_dict(found["methods"]["map"]["reliability"]) == CURVE
    assert found["methods"]["map"]["ood_confidence"] == [1, 2, 3, 4]
    assert write_calibration_report(result, tmp_path).name == "calibration.html"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["calibration.html", "calibration.json"]


def test_folder_is_tried_before_the_work(tmp_path):
    assert output_folder(CalibrateConfig("absent", out=str(tmp_path / "new"))) == tmp_path / "new"
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match=r"cannot be written .*; set another with --out"):
        output_folder(CalibrateConfig("absent", out=str(tmp_path / "file" / "x")))
    with pytest.raises(ExperimentError, match="no checkpoint at 'absent'"):
        output_folder(CalibrateConfig("absent"))
