"""The command line: `laplace-ws train --config configs/demo.yaml --marglik.n_epochs 20`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from laplace_ws._version import __version__
from laplace_ws.experiment.config import RunConfig, UnknownKeyError, check_keys, config_keys, flatten
from laplace_ws.experiment.folder import ExperimentError, summary_table
from laplace_ws.experiment.run import run_experiment
from laplace_ws.marglik.schedule import TrainingDiverged
from laplace_ws.report import ReportInputError, write_report

_OWN_OPTIONS = ("config", "resume", "help", "print_config")
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def make_parser() -> ArgumentParser:
    """The parser of `laplace-ws train`; every field of `RunConfig` is an option."""
    parser = ArgumentParser(
        prog="laplace-ws train", description="Train and tune a network; write a run folder.", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoints")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def parse_train(args: Sequence[str]) -> tuple[RunConfig, bool]:
    """Read the arguments of `train`: the run, and whether to resume it.

    Raises:
        UnknownKeyError: an option or a key of the YAML file does not exist.
        OSError: the YAML file cannot be read.
        ArgumentError: a value does not fit its type.
    """
    check_arguments(args)
    parser = make_parser()
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    values = instantiate(parser.parse_args(list(args)))
    config = RunConfig(**{key: values[key] for key in RunConfig.__dataclass_fields__})
    return config, values["resume"]


def check_arguments(args: Sequence[str]) -> None:
    """Refuse unknown keys before parsing, with the nearest known one."""
    known = config_keys()
    for i, arg in enumerate(args):
        if not arg.startswith("--"):
            continue
        key, equals, value = arg[2:].partition("=")
        values = [value] if equals else args[i + 1 : i + 2]
        if key == "config" and values:
            check_file(Path(values[0]), known)
        check_keys([key], [*known, *_OWN_OPTIONS])


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
    folder, summary = run_experiment(config, resume=resume)
    print(summary_table(summary))
    if config.report:
        print(f"report: {write_report(folder)}")
    else:
        print(f"summary: {folder / 'summary.json'}")
    return OK


def report(args: Sequence[str]) -> int:
    """Run `laplace-ws report`; returns the exit status."""
    parser = ArgumentParser(prog="laplace-ws report", description="Write report.html anew from a run folder.")
    parser.add_argument("run_dir", type=str, help="folder of a finished run")
    print(f"report: {write_report(Path(parser.parse_args(list(args)).run_dir))}")
    return OK


COMMANDS = {"train": train, "report": report}
USAGE_TEXT = """usage: laplace-ws {train,report} ...

  train   train a network and tune its prior precisions (laplace-ws train --help lists every option)
  report  write report.html anew from a run folder

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
    except (UnknownKeyError, ExperimentError, ArgumentError, ReportInputError, OSError) as error:
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
