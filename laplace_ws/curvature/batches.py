"""A loader's batches, examined in one place: split into inputs and targets, and checked against the model's device as they arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from laplace_ws.curvature.inputs import (
    DEFAULT_KEYS,
    BatchKeys,
    ModelInputs,
    check_devices,
    split_batch,
    targets_of,
)
from laplace_ws.curvature.processes import Shard, shard_of
from laplace_ws.distributed import ALONE, Processes
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
    arrays: list[object] = [data] if _is_array(data) else list(data) if isinstance(data, (tuple, list)) else []  # pyright: ignore[reportUnknownArgumentType]
    if arrays and all(_is_array(part) for part in arrays):
        what = shown(data) if _is_array(data) else f"a {type(data).__name__} of arrays"  # pyright: ignore[reportUnknownArgumentType]
        raise InvalidBatchError(
            f"the loader must give batches of tensors, but it is {what}; give DataLoader(TensorDataset(torch.from_numpy(x), "
            "torch.from_numpy(y)), batch_size=…)."
        )
    if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):  # pyright: ignore[reportUnknownVariableType]
        raise InvalidBatchError(
            "the loader must give batches, but it is a tuple of tensors; give [(x, y)] for one batch."
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise InvalidBatchError(
            f"the loader must be an iterable of batches, such as a DataLoader or a list, got {shown(data)}."
        )


def _is_array(data: object) -> bool:
    """Whether something is an array or a table of another library, such as numpy's and pandas'."""
    return not isinstance(data, Tensor) and hasattr(data, "__array__") and hasattr(data, "shape")


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
        shard: the share of the data that the loader gives, where several processes divide them; examples that a sampler repeats, so
            that all have the same number, are left out.
        on_empty: called in place of a batch of which nothing is left then.
    """

    loader: Data
    device: torch.device
    keys: BatchKeys = DEFAULT_KEYS
    chosen: frozenset[int] | None = None
    progress: str | None = None
    on_first: Callable[[ModelInputs], None] | None = None
    on_each: Callable[[ModelInputs, Tensor], None] | None = None
    shard: Shard | None = None
    on_empty: Callable[[], None] | None = None

    @classmethod
    def of(
        cls, data: Data, model: nn.Module, keys: BatchKeys = DEFAULT_KEYS, *, progress: str | None = None
    ) -> Batches:
        """The batches of a user's data for a model; `Batches` as they are.

        Raises:
            InvalidBatchError: they cannot be iterated over, or are a share of the data that is not that of this process.
        """
        if isinstance(data, Batches):
            return data
        check_iterable(data)
        shard = shard_of(data)
        if shard is not None and not shard.processes.is_first:
            progress = None
        return cls(data, next(model.parameters()).device, keys, progress=progress, shard=shard)

    @property
    def processes(self) -> Processes:
        """Those among which the data are divided."""
        return ALONE if self.shard is None else self.shard.processes

    @property
    def n_in_data_set(self) -> int | None:
        """Number of examples of the data set of all processes; None where the loader does not say."""
        dataset = getattr(self.loader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) else None

    def __iter__(self) -> Iterator[tuple[ModelInputs, Tensor]]:
        """Raises `InvalidBatchError` for a batch of an unknown form or on another device."""
        hidden = self.progress is None or not sys.stderr.isatty()
        bar = tqdm(self.loader, desc=self.progress, unit="batch", disable=hidden)
        last = None if self.chosen is None else max(self.chosen)
        on_next = self.on_first
        n_before = 0
        for number, batch in enumerate(bar):
            n_given, n_kept = self._sizes(batch, n_before)
            n_before += n_given
            is_chosen = self.chosen is None or number in self.chosen
            if is_chosen and self.shard is not None and not n_kept:
                if self.on_empty is not None:
                    self.on_empty()
            elif is_chosen:
                x, y = split_batch(batch, number, self.keys)
                if n_kept < n_given:
                    x, y = x[:n_kept], y[:n_kept]
                check_devices(self.device, x, y)
                if on_next is not None:
                    on_next(x)
                    on_next = None
                if self.on_each is not None:
                    self.on_each(x, y)
                yield x, y
            if number == last:
                return

    def _sizes(self, batch: Any, n_before: int) -> tuple[int, int]:
        """How many examples a batch of a shard holds, and how many of them no other process reads."""
        if self.shard is None:
            return 1, 1
        y = targets_of(batch, self.keys)
        if not isinstance(y, Tensor) or not y.ndim:  # `split_batch` says what is wrong with it
            return 1, 1
        return len(y), self.shard.n_kept(n_before, len(y))

    @property
    def is_one_pass(self) -> bool:
        """Whether the loader is an iterator, which may be used up after one pass."""
        return isinstance(self.loader, Iterator)
