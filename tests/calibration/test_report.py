"""The page and the pictures of a calibration, from numbers made up."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from laplace_ws.calibration import CalibrationResult, CorruptedScores, MethodResult, output_folder, write_result
from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.table import columns, shown_columns
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.metrics import ReliabilityCurve
from laplace_ws.report.calibration_page import calibration_verdict, render_calibration, write_calibration_report
from laplace_ws.report.calibration_pictures import method_styles

CURVE = ReliabilityCurve((0.0, 0.25, 0.5, 0.75, 1.0), (None, 0.4, 0.6, 0.9), (None, 0.5, 0.55, 0.85), (0, 5, 20, 75))


def method(name, label, nll, ece, *, ood=True, corrupted=True, **facts):
    scores = {"accuracy": 0.81, "nll": nll, "brier": 0.31, "ece": ece}
    damaged = tuple(
        CorruptedScores(corruption, strength, scores | {"accuracy": 0.81 - 0.1 * strength})
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
        {"auroc": 0.912, "fpr95": 0.345} if ood else None,
        damaged if corrupted else (),
        1.5,
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
    assert len(pictures) == (1 + 3) + 3 + 2  # reliability, confidence, corruption
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
    assert [c.title for c in shown_columns(bare)] == ["accuracy", "NLL", "Brier", "ECE", "prediction"]


def test_a_missing_value_is_a_dash_and_no_gap_in_the_pictures():
    failed = method("laplace", "Laplace diag (marglik)", None, 0.2)
    page = render_calibration(make_result(NETWORK, failed))
    assert "<td>–</td>" in page
    assert failed.mean_corrupted("nll") is None
    assert failed.mean_corrupted("accuracy") == pytest.approx(0.81 - 0.3)


def test_styles_of_many_methods_differ():
    methods = [method(str(i), str(i), 1.0, 0.1) for i in range(12)]
    styles = method_styles(methods)
    assert len({(s.color, s.linestyle, s.marker) for s in styles.values()}) == 12


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
