"""Passes over the training data that are not epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def same_order_after(loader: Any) -> Iterator[None]:
    """Keep an extra pass over a loader from affecting later ones, if the loader can save its state."""
    state = loader.state_dict() if hasattr(loader, "load_state_dict") else None
    try:
        yield
    finally:
        if state is not None:
            loader.load_state_dict(state)
