"""The error for a name that is not among the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """Error that says which kind of thing was named, the nearest known name, and all of them."""
    known = list(known)
    if not known:
        return ValueError(f"unknown {kind} '{name}'; there is none to choose")
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    return ValueError(f"unknown {kind} '{name}'; did you mean '{near}'? Known: {', '.join(known)}")
