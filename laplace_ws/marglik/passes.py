"""Passes over the training data: all batches or some of them, split into inputs and targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys, ModelInputs, split_batch


@contextmanager
def same_order_after(loader: Any) -> Iterator[None]:
    """Keep an extra pass over a loader from changing the later ones, if the loader can save its state."""
    state = loader.state_dict() if hasattr(loader, "load_state_dict") else None
    try:
        yield
    finally:
        if state is not None:
            loader.load_state_dict(state)


@dataclass(frozen=True)
class Batches:
    """The batches of a loader, each split into inputs and targets, afresh each time they are iterated.

    Attributes:
        loader: what gives the batches.
        keys: of batches that are mappings.
    """

    loader: Iterable[Any]
    keys: BatchKeys = DEFAULT_KEYS

    def __iter__(self) -> Iterator[tuple[ModelInputs, Tensor]]:
        return (split_batch(batch, number, self.keys) for number, batch in enumerate(self.loader))


@dataclass(frozen=True)
class ChosenBatches:
    """Some of the batches of a loader, afresh each time they are iterated; the loader is read no further than to the last of them.

    Attributes:
        loader: what gives all batches.
        chosen: the numbers of those that are passed on.
    """

    loader: Iterable[Any]
    chosen: frozenset[int]

    def __iter__(self) -> Iterator[Any]:
        last = max(self.chosen)
        for i, batch in enumerate(self.loader):
            if i in self.chosen:
                yield batch
            if i == last:
                return
