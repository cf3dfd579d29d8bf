"""Rows of results from single measurements: medians and quartiles over all rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from bench_curvature.config import BenchConfig
from bench_curvature.measure import Item
from bench_curvature.summary import ratios, straight_line, summarise

Row = dict[str, Any]


def case_rows(config: BenchConfig, measured: Sequence[Item]) -> list[Row]:
    """One row for each case and contestant: figures, or an error."""
    rows = []
    for case in config.cases():
        for contestant in config.contestants:
            key = {"contestant": contestant, **case._asdict()}
            times = _matching(measured, key | {"kind": "times"})
            memory = _matching(measured, key | {"kind": "memory"})
            rows.append({**key, **_timed(times), **_memory(memory)})
    return rows


def curve_rows(measured: Sequence[Item]) -> list[Row]:
    """One row for each axis and approximation: a time for every value, and the straight line through their medians."""
    rows = []
    for key, items in _grouped(measured, "curve", ("axis", "kfac_approx")):
        if error := _error(items):
            rows.append({**key, "error": error, "points": [], "line": None})
            continue
        seconds: dict[int, list[float]] = {}
        for point in (point for item in items for point in item["points"]):
            seconds.setdefault(point["value"], []).extend(point["seconds"])
        summaries = {value: summarise(s) for value, s in seconds.items()}
        line = straight_line(list(summaries), [s.median for s in summaries.values()])
        points = [{"value": value, "seconds": asdict(s)} for value, s in summaries.items()]
        rows.append({**key, "error": None, "points": points, "line": line and asdict(line)})
    return rows


def update_rows(measured: Sequence[Item]) -> list[Row]:
    """One row for each precision, batch size and approximation."""
    keys = ("precision", "batch_size", "kfac_approx")
    return [{**key, **_timed(items)} for key, items in _grouped(measured, "update", keys)]


def _timed(items: Sequence[Item]) -> Row:
    """Figures of some measurements of one thing, in seconds and in training steps of the same process."""
    if error := _error(items):
        return {"error": error}
    training = [s for item in items for s in item["training_seconds"]]
    seconds = [s for item in items for s in item["seconds"]]
    row: Row = {
        "error": None,
        "in_training_steps": asdict(summarise(ratios(seconds, training))),
        "seconds": asdict(summarise(seconds)),
        "training_step_seconds": asdict(summarise(training)),
    }
    if all("first_seconds" in item for item in items):
        first = [item["first_seconds"] for item in items]
        units = [median(item["training_seconds"]) for item in items]
        row["first_batch_in_training_steps"] = asdict(summarise(ratios(first, units)))
        row["first_batch_seconds"] = asdict(summarise(first))
    return row


def _memory(items: Sequence[Item]) -> Row:
    """Peak memory in bytes, and in peaks of a training step."""
    if not items:
        return {}
    if error := _error(items):
        return {"memory_error": error}
    (item,) = items
    unit = item["training_peak_bytes"]
    return {
        "peak_in_training_steps": item["peak_bytes"] / unit,
        "first_batch_peak_in_training_steps": item["first_peak_bytes"] / unit,
        "peak_bytes": item["peak_bytes"],
        "first_batch_peak_bytes": item["first_peak_bytes"],
        "training_step_peak_bytes": unit,
    }


def _error(items: Sequence[Item]) -> str | None:
    return next((item["error"] for item in items if "error" in item), None)


def _matching(measured: Iterable[Item], key: Item) -> list[Item]:
    return [item for item in measured if key.items() <= item.items()]


def _grouped(measured: Sequence[Item], kind: str, names: Sequence[str]) -> Iterable[tuple[Row, list[Item]]]:
    """Measurements of a kind by the values of some keys, in the order of their first appearance."""
    keys = [{name: item[name] for name in names} for item in measured if item["kind"] == kind]
    for i, key in enumerate(keys):
        if key not in keys[:i]:
            yield key, _matching(measured, {"kind": kind, **key})
