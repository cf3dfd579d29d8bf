"""The files of a benchmark: its result as JSON, its tables, its pictures."""

from __future__ import annotations

import json
from pathlib import Path

from bench_curvature.config import BenchError
from bench_curvature.figures import pictures
from bench_curvature.run import FORMAT_VERSION
from bench_curvature.tables import Result, as_markdown, check_markers, write_between_markers
from laplace_ws.experiment.folder import check_free, check_name, make_writable, write_whole


def check_places(folder: Path, docs: Path | None, name: str, *, overwrite: bool) -> None:
    """See that the results can be written, before they are measured.

    Raises:
        ExperimentError: the folder cannot be written to, or holds results of this name that may not be replaced.
        BenchError: the document has no place for the tables.
    """
    check_name(name)
    check_free(folder / f"{name}.json", "measurements", overwrite)
    make_writable(folder, "--out")
    if docs is not None:
        check_markers(docs, name)


def write_result(result: Result, folder: Path, docs: Path | None = None) -> list[Path]:
    """Write `name.json`, `name.md` and pictures into a folder, and the tables into a document; returns what was written."""
    name = result["name"]
    write_whole(folder / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return [folder / f"{name}.json", *render(result, folder, docs)]


def render(result: Result, folder: Path, docs: Path | None = None) -> list[Path]:
    """Write tables and pictures of a result anew; returns what was written."""
    name, tables = result["name"], as_markdown(result)
    written = [folder / f"{name}.md"]
    write_whole(written[0], tables + "\n")
    for end, svg in pictures(result).items():
        written.append(folder / f"{name}{end}.svg")
        write_whole(written[-1], svg.decode("utf-8"))
    if docs is not None:
        write_between_markers(docs, name, tables)
        written.append(docs)
    return written


def load_result(path: Path) -> Result:
    """Read a result.

    Raises:
        BenchError: the file holds no result of a benchmark of this version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BenchError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format_version") != FORMAT_VERSION or "cases" not in result:
        raise BenchError(f"'{path}' holds no result of this benchmark; measure it anew")
    return result
