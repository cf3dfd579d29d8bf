"""One measurement each, in the process that calls: of a case, of its memory, of a cost curve, of a factor update, of a whole tuning."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from bench_curvature.cases import SMALL, training_and_setting
from bench_curvature.config import BenchConfig
from bench_curvature.contestants import CONTESTANTS
from bench_curvature.meter import peak_bytes, seconds_of
from bench_curvature.ours import prepare
from bench_curvature.setting import DoesNotFit, NotOffered, Setting, TrainingStep, Work, make_batch, make_network
from bench_curvature.tuning import measure_tuning, measure_tuning_memory

Item = dict[str, Any]
"""What to measure (`kind` and its options), and after that what was measured; goes through JSON."""

_LONGEST_ERROR = 160


def measure(config: BenchConfig, item: Item) -> Item:
    """The item with what was measured, or with `error`, one line that says why nothing was."""
    try:
        return {**item, **_KINDS[item["kind"]](config, item)}
    except Exception as error:  # whatever another library raises is a result
        return {**item, "error": one_line(error)}


def one_line(error: Exception) -> str:
    """An error as one short line."""
    text = re.sub(" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    if isinstance(error, DoesNotFit):
        text = f"does not fit: {text}"
    elif isinstance(error, NotOffered):
        text = f"not offered: {text}"
    elif isinstance(error, ModuleNotFoundError):
        text = f"not installed: {text}"
    else:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR - 1]}…"


def measure_times(config: BenchConfig, item: Item) -> Item:
    """Seconds of training steps and of the curvature of the same batch in turns, and of the first batch, set-up included.

    What a process does once, whatever the model, is done before on a small network.
    """
    device, step, make_work = _of_case(config, item)
    _, small = training_and_setting(config, SMALL, device, 2, item["kfac_approx"], item["curvature"])
    CONTESTANTS[item["contestant"]].prepare(small)()
    step()
    work = _SetUpAtFirst(make_work)
    measured: Item = {"first_seconds": seconds_of(work, device)}
    return measured | _in_turns(step, work, config.n_repeats, device)


def measure_memory(config: BenchConfig, item: Item) -> Item:
    """Peak bytes of a training step, of the first batch with its set-up, and of one more batch."""
    device, step, make_work = _of_case(config, item)
    step()
    step.forget()
    (training_peak,) = peak_bytes([step], device)
    step.forget()
    work = _SetUpAtFirst(make_work)
    first_peak, peak = peak_bytes([work, work], device)
    return {"training_peak_bytes": training_peak, "first_peak_bytes": first_peak, "peak_bytes": peak}


def measure_curve(config: BenchConfig, item: Item) -> Item:
    """Seconds of the exact GGN by batch size or by number of classes, the points in turns."""
    device = torch.device(config.device)
    network, curves = config.network, config.curves
    by_batch = item["axis"] == "batch_size"
    points = []
    for value in curves.batch_sizes if by_batch else curves.n_classes:
        n_images, n_classes = (value, network.n_classes) if by_batch else (network.n_images, value)
        model = make_network(curves.depth, curves.width, n_classes, network.norm, network.image_size, config.seed).to(
            device
        )
        x, y = make_batch(n_images, n_classes, network.image_size, config.seed)
        work = prepare(Setting(model, x.to(device), y.to(device), item["kfac_approx"], "ggn"))
        work()
        points.append((value, work, []))
    for _ in range(curves.n_repeats):
        for _, work, seconds in points:
            seconds.append(seconds_of(work, device))
    return {"points": [{"value": value, "seconds": seconds} for value, _, seconds in points]}


def measure_update(config: BenchConfig, item: Item) -> Item:
    """Seconds of training steps and of one K-FAC factor update (`ggn_mc`, native) of the same batch in turns."""
    device = torch.device(config.updates.device)
    step, setting = training_and_setting(
        config, config.network, device, item["batch_size"], item["kfac_approx"], "ggn_mc"
    )
    work = prepare(setting, factor_precision=item["precision"])
    step()
    work()
    return _in_turns(step, work, config.n_repeats, device)


_KINDS: dict[str, Callable[[BenchConfig, Item], Item]] = {
    "times": measure_times,
    "memory": measure_memory,
    "curve": measure_curve,
    "update": measure_update,
    "tuning": measure_tuning,
    "tuning_memory": measure_tuning_memory,
}


class _SetUpAtFirst:
    """Work whose first call includes its set-up."""

    def __init__(self, make: Callable[[], Work]):
        self._make = make
        self._work: Work | None = None

    def __call__(self) -> None:
        if self._work is None:
            self._work = self._make()
        self._work()


def _of_case(config: BenchConfig, item: Item) -> tuple[torch.device, TrainingStep, Callable[[], Work]]:
    contestant = CONTESTANTS[item["contestant"]]
    importlib.import_module(contestant.module)
    device = torch.device(config.device)
    step, setting = training_and_setting(
        config, config.network, device, config.network.n_images, item["kfac_approx"], item["curvature"]
    )
    return device, step, lambda: contestant.prepare(setting)


def _in_turns(step: Work, work: Work, n_repeats: int, device: torch.device) -> Item:
    training, curvature = [], []
    for _ in range(n_repeats):
        training.append(seconds_of(step, device))
        curvature.append(seconds_of(work, device))
    return {"training_seconds": training, "seconds": curvature}
