"""Passes over the training data that are not an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys, ModelInputs, split_batch


@contextmanager
def same_order_after(loader: Any) -> Iterator[None]:
    """Let an extra pass over a loader that can save its state change nothing in the passes after it."""
    state = loader.state_dict() if hasattr(loader, "load_state_dict") else None
    try:
        yield
    finally:
        if state is not None:
            loader.load_state_dict(state)


@dataclass(frozen=True)
class Batches:
    """The batches of a loader, each split into inputs and targets, anew each time it is iterated.

    Attributes:
        loader: what gives the batches.
        keys: of those that are mappings.
    """

    loader: Iterable[Any]
    keys: BatchKeys = DEFAULT_KEYS

    def __iter__(self) -> Iterator[tuple[ModelInputs, Tensor]]:
        return (split_batch(batch, number, self.keys) for number, batch in enumerate(self.loader))


@dataclass(frozen=True)
class ChosenBatches:
    """Some of the batches, and no further than to the last of them, anew each time they are iterated.

    Attributes:
        batches: all of them.
        chosen: the numbers of those that are given.
    """

    batches: Batches
    chosen: frozenset[int]

    def __iter__(self) -> Iterator[tuple[ModelInputs, Tensor]]:
        last = max(self.chosen)
        for i, batch in enumerate(self.batches):
            if i in self.chosen:
                yield batch
            if i == last:
                return
