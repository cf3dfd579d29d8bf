"""Predictions of the trained weights alone: as they are (MAP), and with a temperature."""

from __future__ import annotations

import time
from collections.abc import Iterator

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, Predict, Prediction, require_validation
from laplace_ws.calibration.temperature import fit_temperature
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.experiment.evaluate import outputs

MAP, TEMPERATURE = "map", "temperature"


def map_method(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """The network as training left it."""
    yield Method(MAP, "MAP", scaled_predict(trained, 1.0), {}, trained.train_seconds)


def check_temperature(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Raise `ExperimentError` where temperature scaling is asked for and cannot be fitted."""
    if config.methods.temperature:
        require_validation(config, trained)


def temperature_method(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """Temperature scaling, fitted on validation images."""
    if not config.methods.temperature:
        return
    start = time.perf_counter()
    temperature = fit_temperature(outputs(trained.model, trained.x_validation), trained.y_validation)
    seconds = trained.train_seconds + time.perf_counter() - start
    predict = scaled_predict(trained, temperature)
    yield Method(TEMPERATURE, "temperature scaling", predict, {"temperature": temperature}, seconds)


def scaled_predict(trained: TrainedRun, temperature: float) -> Predict:
    """softmax(f / T)."""
    return lambda x: Prediction((outputs(trained.model, x).double() / temperature).softmax(-1))
