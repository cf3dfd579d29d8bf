"""What every study does: read its configuration, and write what it found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import torch

Config = TypeVar("Config")


def read_config(kind: type[Config], description: str | None) -> Config:
    """The configuration of a study from the command line: `--config file.yaml`, and options that override it."""
    parser = jsonargparse.ArgumentParser(description=description)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind)
    arguments = parser.parse_args()
    del arguments["config"]
    return kind(**arguments.as_dict())


def write_result(config: Any, name: str, found: Any) -> Path:
    """Write configuration and findings to `name.json` in the folder `config.out`; says where."""
    path = Path(config.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": asdict(config), "torch": torch.__version__, "rows": found}, indent=2) + "\n")
    print(f"written: {path}")
    return path
