"""What every study does: read its configuration, and write what it found."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError

from laplace_ws.errors import InputError
from laplace_ws.options import Options

Config = TypeVar("Config")


def read_config(kind: type[Config], description: str | None) -> Config:
    """The configuration of a study from the command line: `--config file.yaml`, and options that override it."""
    try:
        return Options(kind).read(sys.argv[1:], description=description)
    except (InputError, ArgumentError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


class KeptLines:
    """What a study has measured so far: a file with one line of JSON for each measurement, which is written at once.

    A last line that was cut off is removed, and its measurement made again.

    Attributes:
        path: of the file, which need not exist.
        known: what its lines say, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        self.known: list[dict[str, Any]] = [json.loads(line) for line in whole]

    def add(self, measured: dict[str, Any]) -> None:
        """Write one measurement."""
        self.known.append(measured)
        with self.path.open("a") as file:
            file.write(json.dumps(measured) + "\n")


def write_result(config: Any, name: str, found: Any) -> Path:
    """Write configuration and findings to `name.json` in the folder `config.out`; says where."""
    path = Path(config.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(config), "torch": torch.__version__, "rows": found}, indent=2) + "\n")
    print(f"written: {path}")
    return path
