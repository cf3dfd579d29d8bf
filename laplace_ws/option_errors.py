"""Values of options that do not fit their type: which option, what was given, and what is allowed."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, Namespace

from laplace_ws.errors import InputError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
}


class OptionError(InputError):
    """An option does not exist, or does not take the value that it is given."""


@contextmanager
def explained(kind: type) -> Iterator[None]:
    """Say in words of the options what the parser objects to.

    Args:
        kind: the dataclass of the options.
    """
    try:
        yield
    except ArgumentError as error:
        raise _translated(" ".join(str(error).split()), kind) from error


def check_values(kind: type, values: Namespace | Mapping[str, Any], prefix: str = "") -> None:
    """Raise for a section that is none, and for a null where a value is needed: the parser takes both.

    Args:
        kind: the dataclass of the options.
        values: parsed values, sections within.
        prefix: of their keys.

    Raises:
        OptionError: names the key and what it takes.
    """
    for name, hint in get_type_hints(kind).items():
        value = values.get(name)
        if is_dataclass(hint):
            if not isinstance(value, (Namespace, Mapping)):
                raise _wrong_value(prefix + name, "null" if value is None else value, hint)
            check_values(hint, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif value is None and type(None) not in _options_of(hint):
            raise _wrong_value(prefix + name, "null", hint)


def _translated(text: str, kind: type) -> OptionError:
    found = re.search(r'Parser key "([\w.]+)"', text) or re.search(r"argument --([\w.]+)", text)
    key = found[1] if found else ""
    hint = _hint_of(kind, key)
    if hint is not None and "expected one argument" in text:
        return OptionError(f"--{key} needs a value: {allowed(hint, key)}")
    if hint is not None and (unknown := re.search(r"Option '([^']*)' is not accepted", text)):
        return OptionError(f"unknown key '{unknown[1]}' in {key}, which must be {allowed(hint, key)}")
    if hint is not None:
        return _wrong_value(key, _value_in(text), hint)
    if "expected one argument" in text:
        return OptionError(f"--{key} needs a value")
    if stray := re.search(r"unrecognized arguments: (.*)$", text):
        near = difflib.get_close_matches(stray[1].lstrip("-"), get_type_hints(kind), n=1)
        hint_of_name = f"; did you mean '--{near[0]} …'?" if near else "; give each option as '--name value'"
        return OptionError(f"'{stray[1]}' is no option{hint_of_name}")
    if missing := re.search(r"are required: (.*)$", text):
        return OptionError(f"{missing[1].rpartition('.')[2]} must be given; see --help")
    return OptionError(f"the options cannot be read: {text}")


def _value_in(text: str) -> str | None:
    """The value that a message of the parser repeats, if it does."""
    for pattern in (r"Given value: (.*)$", r"Got value: (.*)$", r"Unable to load config '(.*?)'", r"string: (.*)$"):
        if found := re.search(pattern, text):
            return found[1]
    return None


def _wrong_value(key: str, value: object, hint: Any) -> OptionError:
    if value is None:
        return OptionError(f"{key} must be {allowed(hint, key)}")
    given = f"'{value}'" if value == "" or (isinstance(value, str) and " " in value) else value
    return OptionError(f"{key}={given} must be {allowed(hint, key)}")


def _hint_of(kind: type, key: str) -> Any:
    """The type of an option by its dotted key; None where there is none. A key may begin with the name of a command."""
    names = key.split(".")
    for start in range(2):
        hint: Any = kind
        for name in names[start:]:
            hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
        if hint is not None and names[start:]:
            return hint
    return None


def _options_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself where it is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def allowed(hint: Any, key: str = "") -> str:
    """What a type takes, in words: "a whole number, or null"."""
    options = _options_of(hint)
    if len(options) > 1:
        *first, last = [allowed(option) for option in options]
        return f"{', '.join(first)}, or {last}"
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return (
            f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else f"{''.join(map(str, inner))}, the only choice"
        )
    if origin in (list, Sequence):
        return f"a list of {_plural(inner[0])}"
    if origin in (dict, Mapping):
        return "a mapping, {key: value, …}"
    if is_dataclass(hint):
        first = fields(hint)[0].name
        return f"a section of options, such as {key}.{first}" if key else "a mapping of options"
    return _WORDS.get(hint, str(hint))


def _plural(hint: Any) -> str:
    """What the entries of a list are."""
    if is_dataclass(hint):
        is_needed = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(hint)}
        return f"entries {{{', '.join(f'{name}: …' if needed else f'{name}: … (optional)' for name, needed in is_needed.items())}}}"
    if get_origin(hint) is Literal:
        return f"some of {', '.join(map(str, get_args(hint)))}"
    return _WORDS.get(hint, str(hint)).removeprefix("a ") + "s"
