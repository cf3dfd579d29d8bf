"""Options of a command as a frozen dataclass: read from arguments, YAML files and mappings, with one clear error for a mistyped key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from laplace_ws.option_errors import OptionError, check_values, explained
from laplace_ws.registry import nearest

T = TypeVar("T")
_OWN_OPTIONS = ("config", "help", "print_config")

if TYPE_CHECKING:
    OneOf = str | T
else:

    class OneOf:
        """Type of an option that takes one of the strings of an enumeration: `OneOf[Curvature]` is "ggn", "ef", …"""

        def __class_getitem__(cls, choices: type) -> Any:
            return Literal[tuple(choice.value for choice in choices)]


class UnknownKeyError(OptionError):
    """A key that no section of the options has."""


@dataclass(frozen=True)
class Options(Generic[T]):
    """The options of a command: each field of a dataclass, in sections by dotted keys, and `--config` for a file of them.

    Attributes:
        kind: the dataclass.
        flags: what further options without a value do, by name.
        as_positional: whether fields without a default are given by position, not by name.
    """

    kind: type[T]
    flags: Mapping[str, str] = field(default_factory=dict)
    as_positional: bool = False

    def parser(self, **kwargs: Any) -> ArgumentParser:
        """A parser with these options that raises its errors; takes the arguments of jsonargparse's."""
        parser = ArgumentParser(exit_on_error=False, **kwargs)
        parser.add_argument("--config", action="config", help="YAML file; options after it override it")
        parser.add_class_arguments(self.kind, as_group=False, as_positional=self.as_positional)
        for name, meaning in self.flags.items():
            parser.add_argument(f"--{name}", action="store_true", help=meaning)
        return parser

    def check(self, args: Sequence[str]) -> None:
        """Reject an unknown key, among arguments or in a file that they name, and suggest the nearest known one.

        Raises:
            UnknownKeyError: says which.
            OptionError: the file cannot be read.
        """
        known = config_keys(self.kind)
        for i, arg in enumerate(args):
            if not arg.startswith("--"):
                continue
            key, equals, value = arg[2:].partition("=")
            values = [value] if equals else args[i + 1 : i + 2]
            if key == "config" and values:
                check_file(Path(values[0]), known)
            check_keys([key], [*known, *self.flags, *_OWN_OPTIONS])

    def read(self, args: Sequence[str], **kwargs: Any) -> T:
        """The dataclass that the arguments specify; keywords are those of the parser.

        Raises:
            OptionError: there is no such key, or a value does not fit its type.
        """
        self.check(args)
        parser = self.parser(**kwargs)
        with explained(self.kind):
            values = parser.parse_args(list(args))
        check_values(self.kind, values)
        return self.of(instantiated(parser, values))

    def of(self, values: Namespace) -> T:
        """The dataclass whose fields some parsed values are, among others."""
        return self.kind(**{name: values[name] for name in get_type_hints(self.kind)})


def instantiated(parser: ArgumentParser, values: Namespace) -> Any:
    """Parsed values with sections as their dataclasses."""
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return make(values)


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass of some keys, sections by name or by dotted keys; fields that are not given have their defaults.

    Raises:
        OptionError: there is no such key, or a value does not fit its type.
    """
    known = config_keys(kind)
    check_keys(flatten(values, known), known)
    options = Options(kind)
    parser = options.parser()
    with explained(kind):
        parsed = parser.parse_object(dict(values))
    check_values(kind, parsed)
    return options.of(instantiated(parser, parsed))


def config_keys(kind: type, prefix: str = "") -> list[str]:
    """All dotted keys, sections included: "data", "data.name", …"""
    hints = get_type_hints(kind)
    keys = []
    for name in hints:
        keys.append(prefix + name)
        if is_dataclass(hints[name]):
            keys += config_keys(hints[name], f"{prefix}{name}.")
    return keys


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Reject an unknown key.

    Raises:
        UnknownKeyError: says which, and the nearest known one.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise UnknownKeyError(f"unknown key '{key}'; did you mean '{nearest(key, known, cutoff=0.0)}'?")


def check_file(path: Path, known: Sequence[str]) -> None:
    """Reject a YAML file with an unknown key, or one that is not a mapping.

    Raises:
        UnknownKeyError: says which file, and why.
        OptionError: it cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise OptionError(
            f"'{path}' is not valid YAML{where}; look for brackets, quotes and indents that do not match"
        ) from error
    except UnicodeDecodeError as error:
        raise OptionError(f"'{path}' is not a text in UTF-8; give a YAML file") from error
    except OSError as error:
        raise OptionError(f"'{path}' cannot be read ({error.strerror}); give the path of a YAML file") from error
    if not isinstance(values, dict):
        raise UnknownKeyError(f"'{path}' must hold keys and values, such as 'name: demo'")
    try:
        check_keys(flatten(values, known), known)
    except UnknownKeyError as error:
        raise UnknownKeyError(f"'{path}': {error}") from None


def flatten(values: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys, sections included; goes down into sections only, not into a value that is a mapping."""
    known = list(known)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat[key] = value
        if isinstance(value, Mapping) and any(k.startswith(f"{key}.") for k in known):
            flat |= flatten(value, known, f"{key}.")
    return flat
