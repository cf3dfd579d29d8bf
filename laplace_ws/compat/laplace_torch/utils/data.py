"""Batches as programs for laplace-torch give them, on the device of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from laplace_ws.errors import InvalidBatchError


class MissingEntryError(InvalidBatchError, KeyError):
    """A batch that is a mapping has no entry of this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class OnDevice:
    """A loader whose batches are moved to a device as they come; in all else it is the loader.

    Args:
        loader: gives pairs (x, y), or mappings.
        device: where to.
        key_y: the entry with the targets, of batches that are mappings.
    """

    def __init__(self, loader: Any, device: torch.device, key_y: str) -> None:
        self._loader, self._device, self._key_y = loader, device, key_y

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, Mapping) and self._key_y not in batch:
                raise MissingEntryError(
                    f"a batch has no entry {self._key_y!r}; name that of the targets by dict_key_y."
                )
            yield moved(batch, self._device)

    def pairs(self) -> Iterator[tuple[Any, Tensor]]:
        """Inputs, which for a mapping are all of it, and targets."""
        for batch in self:
            yield (batch, batch[self._key_y]) if isinstance(batch, Mapping) else (batch[0], batch[1])

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def on_device(loader: Any, device: torch.device, key_y: str) -> OnDevice:
    """See `OnDevice`."""
    return OnDevice(loader, device, key_y)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch, or a part of one, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, MutableMapping) and any(isinstance(v, Tensor) and v.device != device for v in batch.values()):
        if hasattr(batch, "to"):  # as Hugging Face's have
            return batch.to(device)  # pyright: ignore[reportAttributeAccessIssue]
        return type(batch)({key: moved(value, device) for key, value in batch.items()})  # pyright: ignore
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(part, device) for part in batch)
    return batch
