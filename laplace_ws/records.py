"""Results as frozen dataclasses in JSON files: the dataclass defines what a file holds, and writes and reads it."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from laplace_ws.errors import InputError

T = TypeVar("T")
_WORDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", tuple: "a list"}


class RecordError(InputError):
    """A file of results is missing, broken or of another format; the message names the file, what is wrong and how to fix it."""


def read_text(path: Path, absent: str) -> str:
    """The text of a file.

    Args:
        path: of the file.
        absent: what to do where it cannot be read, for the message.

    Raises:
        RecordError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}); {absent}") from error


def read_record(cls: type[T], path: Path, *, version: int, absent: str, broken: str) -> T:
    """Read a JSON file into a dataclass.

    Args:
        cls: the dataclass.
        path: of the file.
        version: its entry `format_version`.
        absent: what to do where it cannot be read, for the message.
        broken: what to do where it is damaged, for the message.

    Raises:
        RecordError: the file is missing, of another format, or lacks something.
    """
    try:
        values = json.loads(read_text(path, absent))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not valid JSON ({error}); {broken}") from error
    if not isinstance(values, dict):
        raise RecordError(f"{path} holds no JSON object; {broken}")
    if values.get("format_version") != version:
        raise RecordError(
            f"{path} has format_version {values.get('format_version')!r}, this report reads {version}; read it with the version of "
            f"laplace_ws that wrote it, or {broken}"
        )
    return _made(cls, values, str(path))


def from_dict(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from the plain values that `dataclasses.asdict` gives, each checked against the type of its field.

    A field that is missing or null gets its default; entries that are not fields are ignored, so that a file may hold more.

    Args:
        cls: the dataclass.
        values: by name of the field.
        where: the file and the place in it, for messages.

    Raises:
        RecordError: a field without a default is missing, or a value is of another type or refused by the class.
    """
    if not isinstance(values, dict):
        raise RecordError(f"{where} holds {values!r}; write an object")
    hints, read = get_type_hints(cls), {}
    for f in fields(cls):  # type: ignore[arg-type]
        value = values.get(f.name)
        if value is None and _has_default(f):
            continue
        if f.name not in values:
            raise RecordError(f"{where} lacks {f.name!r}; write {_words(hints[f.name])}")
        read[f.name] = _read(hints[f.name], value, where, f.name)
    try:
        return cls(**read)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from error


def _made(cls: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass by its own `from_dict` where it has one."""
    return cls.from_dict(values, where) if hasattr(cls, "from_dict") else from_dict(cls, values, where)  # type: ignore[attr-defined]


def _has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def _read(hint: Any, value: Any, where: str, name: str) -> Any:
    """A value of a type; `name` is what it is called in messages, `where` the object that holds it."""
    if hint is Any:
        return value
    if (inner := _of_optional(hint)) is not None:
        return None if value is None else _read(inner, value, where, name)
    kind, arguments, place = get_origin(hint) or hint, get_args(hint), f"{where}, {name}"
    if is_dataclass(kind) and isinstance(value, dict):
        return _made(hint, value, place)
    if kind is Mapping and isinstance(value, dict):
        return {key: _read(arguments[1], entry, place, key) for key, entry in value.items()}
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(arguments[0], entry, where, f"{name}[{i}]") for i, entry in enumerate(value))
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    raise RecordError(f"{where}: {name!r} is {value!r}; write {_words(hint)}")


def _of_optional(hint: Any) -> Any:
    """X, of the type `X | None`; None for another type."""
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    (inner,) = [argument for argument in get_args(hint) if argument is not types.NoneType]
    return inner


def _words(hint: Any) -> str:
    """What to write for a type: "a number, or null where there is none"."""
    if (inner := _of_optional(hint)) is not None:
        return f"{_words(inner)}, or null where there is none"
    return _WORDS.get(get_origin(hint) or hint, "an object")
