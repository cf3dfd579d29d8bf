"""The command of the benchmark: measure, or render what was measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_curvature.config import BenchConfig, check_config
from bench_curvature.files import check_places, load_result, render, write_result
from bench_curvature.run import run_bench
from bench_curvature.tables import Result, as_markdown
from laplace_ws.cli import OK, exit_status
from laplace_ws.experiment.lock import sole_writer
from laplace_ws.options import Options

NAME, OVERWRITE = "bench_curvature.py", "overwrite"


@dataclass(frozen=True)
class RenderConfig:
    """A measured benchmark whose tables and pictures are written anew.

    Attributes:
        result: JSON file of a benchmark.
        docs: markdown file whose section of this name is written anew; none if not given.
    """

    result: str
    docs: str | None = None


def parse(args: Sequence[str]) -> BenchConfig:
    """The benchmark that arguments ask for; raises what `Options.read` raises."""
    description = (
        "Measure the cost of curvature, ours and other libraries', in units of a training step; "
        f"'{NAME} render --help' says how to print the tables of a measured benchmark."
    )
    flags = {OVERWRITE: "replace the results of this name that are in the folder already"}
    return Options(BenchConfig, flags).read(args, prog=NAME, description=description)


def measure(args: Sequence[str]) -> int:
    """Measure, print and write; returns the exit status."""
    config = parse(args)
    folder, docs = Path(config.out), None if config.docs is None else Path(config.docs)
    check_config(config)
    check_places(folder, docs, config.name, overwrite=f"--{OVERWRITE}" in args)
    with sole_writer(folder):
        result = run_bench(config)
        print_result(result, write_result(result, folder, docs))
    return OK


def render_again(args: Sequence[str]) -> int:
    """Print the tables of a measured benchmark, and write tables and pictures beside it; returns the exit status."""
    description = "Print the tables of a measured benchmark; write tables and pictures anew beside it."
    options = Options(RenderConfig, as_positional=True)
    config = options.read(args, prog=f"{NAME} render", description=description)
    result = load_result(Path(config.result))
    print_result(result, render(result, Path(config.result).parent, config.docs and Path(config.docs)))
    return OK


def print_result(result: Result, written: Sequence[Path]) -> None:
    """Print the tables of a benchmark and where it was written."""
    print(as_markdown(result))
    print(f"\nwritten: {', '.join(map(str, written))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    rendering = args[:1] == ["render"]
    run = (lambda: render_again(args[1:])) if rendering else (lambda: measure(args))
    return exit_status(run, NAME, "nothing was written")
