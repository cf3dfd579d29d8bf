"""Results as markdown, printed and written between the markers of a document."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench_curvature.config import BenchError
from laplace_ws.experiment.folder import write_whole

Result = dict[str, Any]
Row = dict[str, Any]

NOTHING = "–"
_AXES = {"batch_size": "images of a batch", "n_classes": "classes"}


def as_markdown(result: Result) -> str:
    """All tables of a result."""
    parts = [setting_line(result), *overview(result), *details(result), *curves(result), *updates(result)]
    return "\n\n".join(part for part in parts if part)


def check_markers(path: Path, name: str) -> None:
    """See that a document has a place for the tables of this name.

    Raises:
        BenchError: it has not, or it cannot be read.
    """
    begin, end = _markers(name)
    try:
        found = _between(name).search(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"the document '{path}' cannot be read ({error.strerror})") from error
    if not found:
        raise BenchError(f"'{path}' has no place for the tables: add the lines '{begin}' and '{end}'")


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- bench curvature: name -->` and `<!-- end of bench curvature: name -->` in a document.

    Raises:
        BenchError: the document has no such pair of markers.
    """
    check_markers(path, name)
    begin, end = _markers(name)
    document = path.read_text(encoding="utf-8")
    write_whole(path, _between(name).sub(lambda _: f"{begin}\n\n{text}\n\n{end}", document, count=1))


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- bench curvature: {name} -->", f"<!-- end of bench curvature: {name} -->"


def _between(name: str) -> re.Pattern[str]:
    begin, end = map(re.escape, _markers(name))
    return re.compile(f"{begin}.*?{end}", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting_line(result: Result) -> str:
    """What was measured on what, in one paragraph."""
    config, machine = result["config"], result["machine"]
    network = config["network"]
    processor = machine["gpu"] if config["device"] == "cuda" else f"{machine['cpu']}, {machine['threads']} thread(s)"
    versions = {"torch": machine["torch"], **machine["libraries"]}
    timed = [row for row in result["cases"] if not row["error"]]
    step = f" A training step took {spread_ms(timed[0]['training_step_seconds'])} ms" if timed else ""
    peak = next((row["training_step_peak_bytes"] for row in timed if "training_step_peak_bytes" in row), None)
    step += f" and at its peak {_digits(peak / 2**20)} MiB above what was held before." if peak else "." if step else ""
    return (
        f"WRN-{network['depth']}-{network['width']}, norm {network['norm']}, {network['n_images']} images of "
        f"3×{network['image_size']}×{network['image_size']}, {network['n_classes']} classes, float32, on {processor or 'no GPU'}; "
        f"{config['n_rounds']} round(s) of {config['n_repeats']}; "
        f"{', '.join(f'{name} {version or NOTHING}' for name, version in versions.items())}.{step}"
    )


def overview(result: Result) -> list[str]:
    """Median time of one batch in training steps, contestants by cases."""
    cases = list(dict.fromkeys((row["kfac_approx"], row["curvature"]) for row in result["cases"]))
    if not cases:
        return []
    cells = {(row["contestant"], row["kfac_approx"], row["curvature"]): row for row in result["cases"]}
    rows = []
    for name in result["contestants"]:
        row = [cells[(name, *case)] for case in cases]
        rows.append([name, *(NOTHING if r["error"] else f"{r['in_training_steps']['median']:.2f}" for r in row)])
    title = f"Time of one batch in training steps, median ({NOTHING}: see the error below):"
    return [title, table(["", *(f"{approx}, {curvature}" for approx, curvature in cases)], rows)]


def details(result: Result) -> list[str]:
    """Every case and contestant with its spread, its first batch and its memory, or its error; and what each computes."""
    header = ["approximation", "curvature", "contestant", "training steps (quartiles)", "ms (quartiles)", "first batch"]
    header += ["peak memory", "of the first batch"]
    if not result["cases"]:
        return []
    notes = [f"- `{name}`: {computes}." for name, computes in result["contestants"].items() if computes]
    return [
        "In full; the first batch, set-up included, in training steps, and peak memory in peaks of a training step:",
        table(header, [_detail(row) for row in result["cases"]]),
        "What each computes:",
        "\n".join(notes),
    ]


def _detail(row: Row) -> list[str]:
    key = [row["kfac_approx"], row["curvature"], row["contestant"]]
    if row["error"]:
        return [*key, row["error"], *[NOTHING] * 4]
    memory = [f"{row[k]:.2f}" if k in row else row.get("memory_error", NOTHING) for k in _PEAKS]
    first = f"{row['first_batch_in_training_steps']['median']:.2f}"
    return [*key, spread(row["in_training_steps"]), spread_ms(row["seconds"]), first, *memory]


_PEAKS = ("peak_in_training_steps", "first_batch_peak_in_training_steps")


def curves(result: Result) -> list[str]:
    """One table for each axis: milliseconds by value, and the straight line through them."""
    parts = []
    config = result["config"]["curves"]
    for axis, words in _AXES.items():
        rows = [row for row in result["curves"] if row["axis"] == axis]
        if not rows:
            continue
        values = list(dict.fromkeys(point["value"] for row in rows for point in row["points"]))
        parts.append(
            f"Median milliseconds of one batch by {words}; `ours-native`, exact GGN, WRN-{config['depth']}-{config['width']}:"
        )
        parts.append(table(["", *map(str, values), "straight line", "R²"], [_curve(row, values) for row in rows]))
    return parts


def _curve(row: Row, values: list[int]) -> list[str]:
    if row["error"]:
        return [row["kfac_approx"], *[NOTHING] * len(values), row["error"], NOTHING]
    by_value = {point["value"]: f"{1e3 * point['seconds']['median']:.3g}" for point in row["points"]}
    fit = [NOTHING] * 2
    if line := row["line"]:
        fit = [f"{1e3 * line['intercept']:.3g} {1e3 * line['slope']:+.3g}·n", f"{line['r_squared']:.4f}"]
    return [row["kfac_approx"], *(by_value[value] for value in values), *fit]


def updates(result: Result) -> list[str]:
    """One K-FAC factor update by precision, batch size and approximation."""
    rows = []
    for row in result["updates"]:
        key = [row["precision"], str(row["batch_size"]), row["kfac_approx"]]
        done = not row["error"]
        rows.append(
            [
                *key,
                *([spread_ms(row["seconds"]), spread(row["in_training_steps"])] if done else [row["error"], NOTHING]),
            ]
        )
    if not rows:
        return []
    header = ["precision", "images", "approximation", "ms (quartiles)", "training steps (quartiles)"]
    device = result["config"]["updates"]["device"]
    return [
        f"One factor update (`ours-native`, `ggn_mc`) of the network by batch size, device {device}:",
        table(header, rows),
    ]


def spread(summary: Row, factor: float = 1.0) -> str:
    """Median and quartiles: "1.60 (1.58–1.63)"."""
    median, q1, q3 = (_digits(factor * summary[key]) for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def spread_ms(summary: Row) -> str:
    """Seconds in milliseconds, with quartiles."""
    return spread(summary, 1e3)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 20 else f"{value:.2f}"
