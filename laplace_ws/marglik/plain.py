"""Values that a checkpoint can hold: `None`, bool, int, float, str, and lists and dicts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SCALARS = (type(None), bool, int, float, str)


def unwrapped(value: Any) -> Any:
    """The plain value in a numpy or torch scalar; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def plain_record(record: Mapping[Any, Any]) -> dict[str, Any]:
    """A copy of an epoch's record that a checkpoint can hold, its scalars unwrapped.

    Raises:
        TypeError: names the entry that is not a plain value.
    """
    return {_plain_key(key, "the record"): _plain(value, str(key)) for key, value in record.items()}


def described(value: Any) -> Any:
    """A plain form of `value` for comparing settings; a value without one, such as a function, is represented by its name."""
    value = unwrapped(value)
    # Subclasses (an enum of strings, say) are not plain values: a checkpoint that held them would not load.
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        return {str(unwrapped(key)): described(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [described(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _plain(value: Any, name: str) -> Any:
    value = unwrapped(value)
    if type(value) in _SCALARS:
        return value
    if isinstance(value, dict):
        return {_plain_key(key, f"'{name}'"): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise TypeError(
        f"on_epoch put a {type(value).__name__} under '{name}' into the record, which no checkpoint can hold; "
        "put None, bool, int, float or str there, or dicts and lists of them"
    )


def _plain_key(key: Any, where: str) -> Any:
    key = unwrapped(key)
    if type(key) not in (str, int):
        raise TypeError(f"on_epoch put the key {key!r} into {where}, which no checkpoint can hold; use str or int keys")
    return key
