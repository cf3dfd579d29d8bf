"""A metric from outside the package: one function and one registration, and it is scored, written and shown."""

from __future__ import annotations

import json

import pytest
import torch
from calibration.tiny import train_tiny

from laplace_ws.calibration import (
    CalibrateConfig,
    CalibrationDataConfig,
    MethodsConfig,
    as_text,
    run_calibration,
    write_result,
)
from laplace_ws.metrics import METRICS, Metric, evaluate_classification
from laplace_ws.report.calibration_page import render_calibration


def certainty(probs, labels):
    """Mean top probability, whatever the labels are."""
    return probs.max(-1).values.mean()


@pytest.fixture
def certainty_is_registered():
    METRICS.register("certainty", Metric("certainty", certainty, "%", 3, 100.0, higher_is_better=None, on_damaged=True))
    yield
    METRICS.unregister("certainty")


@pytest.fixture
def result(certainty_is_registered, tmp_path):
    data = CalibrationDataConfig(n_validation=50, corruptions=["contrast"], n_corrupted=20)
    return run_calibration(CalibrateConfig(str(train_tiny(tmp_path)), data=data, methods=MethodsConfig(laplace=[])))


def test_it_is_in_the_scores_the_file_the_table_and_the_page(result, tmp_path):
    network, scaled = result.methods
    values = [method.test["certainty"] for method in result.methods]
    curve = network.reliability
    weighted = [n * confidence for n, confidence in zip(curve.count, curve.confidence, strict=True) if n]
    assert values[0] == pytest.approx(sum(weighted) / curve.n_examples)
    assert values[0] != values[1]

    written = json.loads(write_result(result, tmp_path).read_text())["methods"]
    assert [entry["test"]["certainty"] for entry in written.values()] == values
    assert all(0 < damaged["certainty"] < 1 for damaged in written["map"]["corrupted"])

    titles, _, *rows = as_text(result.methods).splitlines()
    assert "certainty" in titles
    assert "corrupted certainty" in titles
    page = render_calibration(result)
    assert '<th scope="col">certainty<small>%</small></th>' in page
    for value, row in zip(values, rows, strict=True):
        assert f"{100 * value:.3f}" in row
        assert f">{100 * value:.3f}</td>" in page
    assert f">{100 * scaled.mean_corrupted('certainty'):.3f}</td>" in page


def test_any_classifier_is_scored_by_it(certainty_is_registered):
    probs = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    assert evaluate_classification(probs, torch.tensor([0, 0]))["certainty"] == pytest.approx(0.75)
