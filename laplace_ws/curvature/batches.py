"""A loader's batches, examined in one place: split into inputs and targets, and checked against the model's device as they arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys, ModelInputs, check_devices, split_batch
from laplace_ws.curvature.processes import check_not_shared
from laplace_ws.errors import InvalidBatchError
from laplace_ws.values import shown

Data = Iterable[Any]
"""What users give: batches of one of the forms that `inputs.split_batch` knows, or `Batches`."""


def check_iterable(data: Any) -> None:
    """Raise unless data can be iterated over and are no single batch or data set.

    Raises:
        InvalidBatchError: says what to give in place of them.
    """
    if isinstance(data, (Tensor, Dataset)) and not isinstance(data, IterableDataset):
        kind = type(data).__name__  # pyright: ignore[reportUnknownArgumentType]
        what = "a tensor" if isinstance(data, Tensor) else f"a data set, {kind},"
        mend = "[(x, y)] for one batch" if isinstance(data, Tensor) else "DataLoader(dataset, batch_size=…)"
        raise InvalidBatchError(
            f"the loader must give batches, but it is {what} that holds single examples; give {mend}."
        )
    if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):  # pyright: ignore[reportUnknownVariableType]
        raise InvalidBatchError(
            "the loader must give batches, but it is a tuple of tensors; give [(x, y)] for one batch."
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise InvalidBatchError(
            f"the loader must be an iterable of batches, such as a DataLoader or a list, got {shown(data)}."
        )


@dataclass(frozen=True)
class Batches:
    """Inputs and targets of the batches of a loader, anew each time they are iterated over.

    All passes over data go through this class, and what is already of this class is not split again.

    Attributes:
        loader: what yields the batches.
        device: where they must be.
        keys: keys of batches that are mappings.
        chosen: numbers of the batches to yield; iteration stops after the last of them; None for all.
        progress: title of a bar that is shown on a terminal; None for none.
        on_first: called with the inputs of the first batch of each pass, before they are yielded.
        on_each: called with the inputs and targets of every batch, before they are yielded.
    """

    loader: Data
    device: torch.device
    keys: BatchKeys = DEFAULT_KEYS
    chosen: frozenset[int] | None = None
    progress: str | None = None
    on_first: Callable[[ModelInputs], None] | None = None
    on_each: Callable[[ModelInputs, Tensor], None] | None = None

    @classmethod
    def of(
        cls, data: Data, model: nn.Module, keys: BatchKeys = DEFAULT_KEYS, *, progress: str | None = None
    ) -> Batches:
        """The batches of a user's data for a model; `Batches` as they are.

        Raises:
            InvalidBatchError: the data are the share of one of several processes.
        """
        if isinstance(data, Batches):
            return data
        check_not_shared(data)
        check_iterable(data)
        return cls(data, next(model.parameters()).device, keys, progress=progress)

    def __iter__(self) -> Iterator[tuple[ModelInputs, Tensor]]:
        """Raises `InvalidBatchError` for a batch of an unknown form or on another device."""
        hidden = self.progress is None or not sys.stderr.isatty()
        bar = tqdm(self.loader, desc=self.progress, unit="batch", disable=hidden)
        last = None if self.chosen is None else max(self.chosen)
        on_next = self.on_first
        for number, batch in enumerate(bar):
            if self.chosen is None or number in self.chosen:
                x, y = split_batch(batch, number, self.keys)
                check_devices(self.device, x, y)
                if on_next is not None:
                    on_next(x)
                    on_next = None
                if self.on_each is not None:
                    self.on_each(x, y)
                yield x, y
            if number == last:
                return

    @property
    def is_one_pass(self) -> bool:
        """Whether the loader is an iterator, which may be used up after one pass."""
        return isinstance(self.loader, Iterator)
