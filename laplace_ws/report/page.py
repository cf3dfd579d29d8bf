"""The pages: Jinja2 templates filled with values; each page is one HTML file that needs no network access."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The page that a template of `report/templates` makes of values; text is escaped, and a missing value is an error."""
    return _ENVIRONMENT.get_template(template).render(values)


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader expects."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _as_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


_ENVIRONMENT = Environment(
    loader=PackageLoader("laplace_ws.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.filters |= {"base64": _as_base64, "yaml": _as_yaml}
