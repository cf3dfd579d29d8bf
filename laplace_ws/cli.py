"""The command line: `laplace-ws train --config demo --marglik.n_epochs 20`."""

from __future__ import annotations

import pkgutil
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser

from laplace_ws._version import __version__
from laplace_ws.errors import InputError
from laplace_ws.interrupts import INTERRUPTED, Terminated, asked_to_end
from laplace_ws.marglik.schedule import TrainingDiverged
from laplace_ws.option_errors import check_values, explained
from laplace_ws.options import Options, UnknownKeyError, instantiated
from laplace_ws.registry import unknown_name

if TYPE_CHECKING:
    from laplace_ws.calibration import CalibrateConfig
    from laplace_ws.experiment.config import RunConfig
    from laplace_ws.selection import SelectConfig

NAME = "laplace-ws"
OK, FAILED, USAGE = 0, 1, 2


def train(config: RunConfig, *, resume: bool, overwrite: bool) -> int:
    """Run `laplace-ws train`; returns the exit status."""
    from laplace_ws.distributed import is_first_process
    from laplace_ws.experiment.folder import summary_table
    from laplace_ws.experiment.run import run_experiment
    from laplace_ws.report import write_report

    folder, result = run_experiment(config, resume=resume, overwrite=overwrite)
    if not is_first_process():
        return OK
    print(summary_table(result))
    print(f"report: {write_report(folder)}" if config.report else f"summary: {folder / 'summary.json'}")
    return OK


def select(config: SelectConfig, *, resume: bool, overwrite: bool) -> int:
    """Run `laplace-ws select`; returns the exit status, that of a failed training where a candidate diverged."""
    from laplace_ws.report.selection_page import write_selection_page
    from laplace_ws.selection import run_selection, selection_table

    selection = run_selection(config, resume=resume, overwrite=overwrite)
    print(selection_table(selection))
    folder = config.folder
    print(f"report: {write_selection_page(folder)}" if config.report else f"ranking: {folder / 'select.json'}")
    return FAILED if selection.failed else OK


def calibrate(config: CalibrateConfig, *, overwrite: bool) -> int:
    """Run `laplace-ws calibrate`; returns the exit status."""
    from laplace_ws.calibration import as_text, output_folder, run_calibration, write_result
    from laplace_ws.distributed import is_first_process
    from laplace_ws.experiment.lock import sole_writer
    from laplace_ws.report.calibration_page import write_calibration_report

    folder = output_folder(config, overwrite=overwrite)
    if not is_first_process():
        run_calibration(config)
        return OK
    with sole_writer(folder):
        result = run_calibration(config)
        print(as_text(result.methods))
        print(f"result: {write_result(result, folder)}")
        print(f"report: {write_calibration_report(result, folder)}")
    return OK


@dataclass(frozen=True)
class ReportConfig:
    """A page to write anew.

    Attributes:
        run_dir: folder of a finished run.
    """

    run_dir: str


def report(config: ReportConfig) -> int:
    """Run `laplace-ws report`; returns the exit status."""
    from laplace_ws.report import write_report

    print(f"report: {write_report(Path(config.run_dir))}")
    return OK


@dataclass(frozen=True)
class ConfigsConfig:
    """What to say of the bundled configurations.

    Attributes:
        show: name of one that is printed whole; a line about each if not given.
    """

    show: str | None = None


def configs(config: ConfigsConfig) -> int:
    """Run `laplace-ws configs`; returns the exit status."""
    bundled = bundled_configs()
    if config.show is None:
        for name, path in bundled.items():
            command, about = path.parent.name, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            print(f"laplace-ws {command} --config {name}\n    {about}")
    elif config.show in bundled:
        print(bundled[config.show].read_text(encoding="utf-8"), end="")
    else:
        raise UnknownKeyError(str(unknown_name("configuration", config.show, bundled)))
    return OK


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        run: executes it, given its configuration and each flag by name; returns the exit status.
        config: the dataclass of its options, as "module:name", which is imported only when they are read.
        help: what it does.
        flags: what further options without a value do, by name.
        as_positional: whether options without a default are positional.
    """

    run: Callable[..., int]
    config: str
    help: str
    flags: dict[str, str] = field(default_factory=dict)
    as_positional: bool = False

    def options(self) -> Options[Any]:
        """Its options."""
        return Options(pkgutil.resolve_name(self.config), self.flags, self.as_positional)


_REPLACE = "replace results that are in the folder already"
COMMANDS = {
    "train": Command(
        train,
        "laplace_ws.experiment.config:RunConfig",
        "train a network and tune its prior precisions",
        {"resume": "go on from the run folder's checkpoints", "overwrite": f"{_REPLACE} when this one has finished"},
    ),
    "select": Command(
        select,
        "laplace_ws.selection:SelectConfig",
        "train or load several models and rank them by a criterion that needs no test images",
        {
            "resume": "keep finished candidates and go on with the others",
            "overwrite": f"{_REPLACE} when this one has finished",
        },
    ),
    "calibrate": Command(
        calibrate,
        "laplace_ws.calibration:CalibrateConfig",
        "score a trained network's probabilities beside those of Laplace posteriors",
        {"overwrite": _REPLACE},
    ),
    "report": Command(
        report, "laplace_ws.cli:ReportConfig", "write report.html anew from a run folder", as_positional=True
    ),
    "configs": Command(configs, "laplace_ws.cli:ConfigsConfig", "list the configurations that come with the package"),
}


def bundled_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name; each lies in a folder that is called like its command."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*/*.yaml"))}


def with_paths(args: Sequence[str]) -> list[str]:
    """Arguments with the path of each bundled configuration in place of its name.

    Raises:
        UnknownKeyError: a configuration is neither a file nor bundled.
    """
    found = list(args)
    for i, arg in enumerate(args):
        key, equals, value = arg.partition("=")
        if key == "--config" and (equals or i + 1 < len(args)):
            path = _config_path(value if equals else args[i + 1])
            found[i if equals else i + 1] = f"--config={path}" if equals else path
    return found


def _config_path(given: str) -> str:
    bundled = bundled_configs()
    if Path(given).is_file():
        return given
    if given in bundled:
        return str(bundled[given])
    raise UnknownKeyError(
        f"'{given}' is no file; give a YAML file, or the name of a bundled configuration: {', '.join(sorted(bundled))}"
    )


def parse(args: Sequence[str]) -> tuple[Command, Any, dict[str, bool]]:
    """The command that the arguments name, its configuration, and its flags.

    Raises:
        OptionError: a command, an option or a key of the YAML file does not exist, or a value does not fit its type.
        OSError: the YAML file cannot be read.
        SystemExit: the arguments ask for help or the version, which is printed.
    """
    parser = ArgumentParser(
        prog=NAME,
        description="Laplace approximations and marginal likelihoods of networks with weight sharing.",
        version=__version__,
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(dest="command")
    args = with_paths(args)
    chosen = args[0] if args else ""
    options = None
    if chosen in COMMANDS:
        options = COMMANDS[chosen].options()
        options.check(args[1:])
    elif chosen and not chosen.startswith("-"):
        raise UnknownKeyError(str(unknown_name("command", chosen, COMMANDS)))
    for name, command in COMMANDS.items():
        # a configuration, with all that it imports, is imported only for its own command
        own = options.parser(description=command.help) if options and name == chosen else ArgumentParser()
        subcommands.add_subcommand(name, own, help=command.help)
    if options is None and not {"-h", "--help", "--version"} & set(args):
        raise UnknownKeyError(f"name the command first: {', '.join(COMMANDS)}")
    with explained(options.kind if options else ReportConfig):
        values = parser.parse_args(args)
    if options is None:
        raise UnknownKeyError(f"name the command first: {', '.join(COMMANDS)}")
    check_values(options.kind, values[chosen])
    given = instantiated(parser, values)[chosen]
    return COMMANDS[chosen], options.of(given), {flag: given[flag] for flag in options.flags}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 training failed, 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        command, config, flags = parse(args)
        return command.run(config, **flags)

    kept = "nothing was written"
    if args and args[0] in COMMANDS and "resume" in COMMANDS[args[0]].flags:
        again = shlex.join([*called(), *[arg for arg in args if arg not in ("--resume", "--overwrite")], "--resume"])
        kept = f"this goes on from the last checkpoint, if there is one:\n  {again}"
    return exit_status(run, NAME, kept)


def called() -> list[str]:
    """How this program was called, without its arguments."""
    path = Path(sys.argv[0])
    return ["python", "-m", "laplace_ws"] if path.name == "__main__.py" else [str(path)]


def exit_status(run: Callable[[], int], name: str, kept: str) -> int:
    """Run a command; errors that the user can fix are reported in one line, without a traceback.

    Args:
        run: does the work; returns the exit status.
        name: of the command.
        kept: what remains of the work when it is interrupted.
    """
    try:
        with asked_to_end():
            return run()
    except SystemExit as done:  # help and version were printed
        return int(done.code or OK)
    except (InputError, ArgumentError, OSError, TrainingDiverged) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, TrainingDiverged) else USAGE
    except Terminated as end:
        print(f"\n{name}: asked to end; {kept}", file=sys.stderr)
        return end.status
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
