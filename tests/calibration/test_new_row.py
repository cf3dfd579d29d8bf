"""A row from outside the package: one function and one registration, and it is checked, scored, written and shown."""

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
from laplace_ws.calibration.method import Method, Prediction
from laplace_ws.calibration.rows import ROWS, Row
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.report.calibration_page import render_calibration


def even(config, trained):
    """The same probability for every class."""
    n_classes = trained.data.n_classes
    predict = lambda x: Prediction(torch.full((len(x), n_classes), 1 / n_classes, dtype=torch.float64))  # noqa: E731
    yield Method("even", "even odds", predict, {"classes": n_classes}, 2 * trained.train_seconds)


def refuse(config, trained):
    if config.seed == 13:
        raise ValueError("seed=13 is refused")


@pytest.fixture
def even_is_registered():
    ROWS.register("even", Row(even, refuse))
    yield
    ROWS.unregister("even")


def test_it_is_a_row_of_everything(even_is_registered, tmp_path):
    data = CalibrationDataConfig(n_validation=50, corruptions=[])
    config = CalibrateConfig(str(train_tiny(tmp_path)), data=data, methods=MethodsConfig(laplace=[]))
    result = run_calibration(config)
    assert [method.name for method in result.methods] == ["map", "temperature", "even"]
    row = result.methods[-1]
    assert row.test["nll"] == pytest.approx(torch.tensor(10.0).log().item())
    assert row.training_runs == pytest.approx(2.0)
    assert "even odds" in as_text(result.methods)
    assert "even odds" in render_calibration(result)
    assert json.loads(write_result(result, tmp_path).read_text())["methods"]["even"]["classes"] == 10
    with pytest.raises(ExperimentError, match="seed=13 is refused"):
        run_calibration(CalibrateConfig(config.checkpoint, seed=13, data=data, methods=config.methods))
