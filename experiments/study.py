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


def write_result(config: Any, name: str, found: Any) -> Path:
    """Write configuration and findings to `name.json` in the folder `config.out`; says where."""
    path = Path(config.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(config), "torch": torch.__version__, "rows": found}, indent=2) + "\n")
    print(f"written: {path}")
    return path
