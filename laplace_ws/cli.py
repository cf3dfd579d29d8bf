"""The command line: `laplace-ws train --config configs/demo.yaml --marglik.n_epochs 20`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from laplace_ws._version import __version__
from laplace_ws.bench import (
    BenchConfig,
    BenchError,
    as_markdown,
    check_config,
    check_places,
    load_result,
    render,
    run_bench,
    write_result,
)
from laplace_ws.calibration import CalibrateConfig, as_text, output_folder, run_calibration
from laplace_ws.calibration import write_result as write_calibration
from laplace_ws.experiment.config import RunConfig, UnknownKeyError, check_keys, config_keys, flatten
from laplace_ws.experiment.folder import ExperimentError, summary_table
from laplace_ws.experiment.run import run_experiment
from laplace_ws.marglik.schedule import TrainingDiverged
from laplace_ws.records import RecordError
from laplace_ws.report import write_report
from laplace_ws.report.calibration_page import write_calibration_report
from laplace_ws.report.selection_page import write_selection_page
from laplace_ws.selection import SelectConfig, run_selection, selection_table

_OWN_OPTIONS = ("config", "help", "print_config")
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def make_parser(config_class: type, prog: str, description: str) -> ArgumentParser:
    """A parser in which every field of a configuration is an option."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_class_arguments(config_class, as_group=False)
    return parser


def parse_train(args: Sequence[str]) -> tuple[RunConfig, bool]:
    """Read the arguments of `train`: the run, and whether to resume it.

    Raises:
        UnknownKeyError: an option or a key of the YAML file does not exist.
        OSError: the YAML file cannot be read.
        ArgumentError: a value does not fit its type.
    """
    parser = make_parser(RunConfig, "laplace-ws train", "Train and tune a network; write a run folder.")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoints")
    values = parse(parser, RunConfig, args, [*_OWN_OPTIONS, "resume"])
    config = RunConfig(**{key: values[key] for key in RunConfig.__dataclass_fields__})
    return config, values["resume"]


def parse_select(args: Sequence[str]) -> tuple[SelectConfig, bool]:
    """Read the arguments of `select`: the comparison, and whether to resume it; raises what `parse_train` raises."""
    description = "Train or load several models and rank them by log marginal likelihood."
    parser = make_parser(SelectConfig, "laplace-ws select", description)
    parser.add_argument("--resume", action="store_true", help="keep finished candidates and go on with the others")
    values = parse(parser, SelectConfig, args, [*_OWN_OPTIONS, "resume"])
    return SelectConfig(**{key: values[key] for key in SelectConfig.__dataclass_fields__}), values["resume"]


def parse_calibrate(args: Sequence[str]) -> CalibrateConfig:
    """Read the arguments of `calibrate`; raises what `parse_train` raises."""
    description = "Score the predictives of a trained network: MAP, temperature scaling, Laplace posteriors."
    parser = make_parser(CalibrateConfig, "laplace-ws calibrate", description)
    values = parse(parser, CalibrateConfig, args, _OWN_OPTIONS)
    return CalibrateConfig(**{key: values[key] for key in CalibrateConfig.__dataclass_fields__})


def parse_bench(args: Sequence[str]) -> BenchConfig:
    """Read the arguments of `bench curvature`; raises what `parse_train` raises."""
    description = "Measure the cost of curvature, ours and other libraries', in units of a training step."
    parser = make_parser(BenchConfig, "laplace-ws bench curvature", description)
    values = parse(parser, BenchConfig, args, _OWN_OPTIONS)
    return BenchConfig(**{key: values[key] for key in BenchConfig.__dataclass_fields__})


def parse(parser: ArgumentParser, config_class: type, args: Sequence[str], own_options: Sequence[str]) -> Any:
    """Parse arguments after refusing unknown keys; sections come as their dataclasses."""
    check_arguments(args, config_keys(config_class), own_options)
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return instantiate(parser.parse_args(list(args)))


def check_arguments(args: Sequence[str], known: Sequence[str], own_options: Sequence[str]) -> None:
    """Refuse unknown keys before parsing, with the nearest known one."""
    for i, arg in enumerate(args):
        if not arg.startswith("--"):
            continue
        key, equals, value = arg[2:].partition("=")
        values = [value] if equals else args[i + 1 : i + 2]
        if key == "config" and values:
            check_file(Path(values[0]), known)
        check_keys([key], [*known, *own_options])


def check_file(path: Path, known: Sequence[str]) -> None:
    """Refuse a YAML file with an unknown key, or one that is no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UnknownKeyError(f"'{path}' is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UnknownKeyError(f"'{path}' must hold keys and values, such as 'name: demo'")
    try:
        check_keys(flatten(values, known), known)
    except UnknownKeyError as error:
        raise UnknownKeyError(f"'{path}': {error}") from None


def train(args: Sequence[str]) -> int:
    """Run `laplace-ws train`; returns the exit status."""
    config, resume = parse_train(args)
    folder, result = run_experiment(config, resume=resume)
    print(summary_table(result))
    if config.report:
        print(f"report: {write_report(folder)}")
    else:
        print(f"summary: {folder / 'summary.json'}")
    return OK


def select(args: Sequence[str]) -> int:
    """Run `laplace-ws select`; returns the exit status, that of a failed training where a candidate diverged."""
    config, resume = parse_select(args)
    selection = run_selection(config, resume=resume)
    print(selection_table(selection))
    if config.report:
        print(f"report: {write_selection_page(config.folder)}")
    else:
        print(f"ranking: {config.folder / 'select.json'}")
    return FAILED if selection.failed else OK


def report(args: Sequence[str]) -> int:
    """Run `laplace-ws report`; returns the exit status."""
    parser = ArgumentParser(prog="laplace-ws report", description="Write report.html anew from a run folder.")
    parser.add_argument("run_dir", type=str, help="folder of a finished run")
    print(f"report: {write_report(Path(parser.parse_args(list(args)).run_dir))}")
    return OK


def calibrate(args: Sequence[str]) -> int:
    """Run `laplace-ws calibrate`; returns the exit status."""
    config = parse_calibrate(args)
    folder = output_folder(config)
    try:
        result = run_calibration(config)
    except KeyboardInterrupt:
        print("\nlaplace-ws: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print(as_text(result.methods))
    print(f"result: {write_calibration(result, folder)}")
    print(f"report: {write_calibration_report(result, folder)}")
    return OK


def bench(args: Sequence[str]) -> int:
    """Run `laplace-ws bench`; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(BENCH_USAGE_TEXT, file=sys.stdout if args else sys.stderr)
        return OK if args else USAGE
    check_keys([args[0]], BENCH_COMMANDS)
    return BENCH_COMMANDS[args[0]](args[1:])


def bench_curvature(args: Sequence[str]) -> int:
    """Run `laplace-ws bench curvature`; returns the exit status."""
    config = parse_bench(args)
    folder, docs = Path(config.out), None if config.docs is None else Path(config.docs)
    try:
        check_config(config)
        check_places(folder, docs, config.name)
        result = run_bench(config)
    except KeyboardInterrupt:
        print("\nlaplace-ws: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print_result(result, write_result(result, folder, docs))
    return OK


def bench_render(args: Sequence[str]) -> int:
    """Run `laplace-ws bench render`; returns the exit status."""
    description = "Print the tables of a measured benchmark; write tables and pictures anew beside it."
    parser = ArgumentParser(prog="laplace-ws bench render", description=description, exit_on_error=False)
    parser.add_argument("result", type=str, help="JSON file of a benchmark")
    parser.add_argument(
        "--docs", type=str, default=None, help="markdown file whose section of this name is written anew"
    )
    values = parser.parse_args(list(args))
    result = load_result(Path(values.result))
    print_result(result, render(result, Path(values.result).parent, values.docs and Path(values.docs)))
    return OK


def print_result(result: dict, written: Sequence[Path]) -> None:
    """Print the tables of a benchmark and where it was written."""
    print(as_markdown(result))
    print(f"\nwritten: {', '.join(map(str, written))}")


BENCH_COMMANDS = {"curvature": bench_curvature, "render": bench_render}
BENCH_USAGE_TEXT = """usage: laplace-ws bench {curvature,render} ...

  curvature  measure time and memory of Kronecker factors, ours and other libraries' (laplace-ws bench curvature --help
             lists every option; --config configs/bench_curvature.yaml is the usual start)
  render     print the tables of a measured benchmark, and write them into a document (--docs)

  --help     print this"""
COMMANDS = {"train": train, "select": select, "calibrate": calibrate, "report": report, "bench": bench}
USAGE_TEXT = """usage: laplace-ws {train,select,calibrate,report,bench} ...

  train      train a network and tune its prior precisions (laplace-ws train --help lists every option)
  select     train or load several models and rank them by log marginal likelihood (laplace-ws select --help)
  calibrate  score a trained network's probabilities beside those of Laplace posteriors (laplace-ws calibrate --help)
  report     write report.html anew from a run folder
  bench      measure the cost of curvature (laplace-ws bench --help)

  --version  print the version
  --help     print this"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 training failed, 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--version"]:
        print(f"laplace-ws {__version__}")
        return OK
    if not args or args[0] in ("-h", "--help"):
        print(USAGE_TEXT, file=sys.stdout if args else sys.stderr)
        return OK if args else USAGE
    try:
        check_keys([args[0]], COMMANDS)
        return COMMANDS[args[0]](args[1:])
    except (UnknownKeyError, ExperimentError, BenchError, ArgumentError, RecordError, OSError) as error:
        return complain(error, USAGE)
    except TrainingDiverged as error:
        return complain(error, FAILED)
    except KeyboardInterrupt:
        again = shlex.join([sys.argv[0], *[arg for arg in args if arg != "--resume"], "--resume"])
        print(
            f"\nlaplace-ws: interrupted; this goes on from the last checkpoint, if there is one:\n  {again}",
            file=sys.stderr,
        )
        return INTERRUPTED


def complain(error: Exception, status: int) -> int:
    """Print an error as one line, without traceback."""
    message = " ".join(str(error).split())
    print(f"laplace-ws: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
