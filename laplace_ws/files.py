"""Files of tensors and plain values: written whole, read without running code from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch


class FileFormatError(RuntimeError):
    """A file is damaged, or is not of the requested kind."""


def save_tensors(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that `path` is at every moment the old file or the new one."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_tensors(path: str | Path, kind: str, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_tensors` wrote.

    Args:
        path: the file.
        kind: what it should hold, as in "a posterior", for messages.
        map_location: where its tensors are put.

    Raises:
        FileFormatError: it cannot be read, or holds something other than a dictionary.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the bytes of another kind of file make the reader raise
        raise FileFormatError(f"'{path}' cannot be read as {kind}: it is damaged, or another kind of file.") from error
    if not isinstance(state, dict):
        raise FileFormatError(f"'{path}' holds a {type(state).__name__} and not {kind}.")
    return cast(dict[str, Any], state)
