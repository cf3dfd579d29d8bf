"""Passes over the training data that are not an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def same_order_after(loader: Any) -> Iterator[None]:
    """Let an extra pass over a loader that can save its state change nothing in the passes after it."""
    state = loader.state_dict() if hasattr(loader, "load_state_dict") else None
    try:
        yield
    finally:
        if state is not None:
            loader.load_state_dict(state)


def pick(loader: Iterable[tuple[Any, Tensor]], chosen: set[int]) -> Iterator[tuple[Any, Tensor]]:
    """The batches with these numbers, and no further than to the last of them."""
    last = max(chosen)
    for i, batch in enumerate(loader):
        if i in chosen:
            yield batch
        if i == last:
            return
