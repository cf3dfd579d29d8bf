"""Batches of tensors that already live on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import TensorDataset

from laplace_ws.values import flag, shown, tensor, whole_number

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(inputs of a batch, generator) -> inputs of the same batch, changed at random."""


class TensorLoader:
    """Iterates over `(x, y)` batches without workers, copies between devices, or the global random state.

    Each epoch draws one number from the loader's own generator and seeds the order and the augmentation of that epoch with it.
    So an epoch that is left early changes nothing in later ones, and restoring `state_dict()` between two epochs
    repeats what followed. Without shuffling or augmentation batches are views of `x` and `y`.

    Args:
        x: Inputs.
        y: Targets, on the device of `x`.
        batch_size: Examples per batch; the last batch may be smaller.
        shuffle: Whether every epoch has a new random order.
        drop_last: Whether to leave out a smaller last batch.
        augment: Called as `augment(x_batch, generator)` on every batch, for instance `random_crop_flip`.
        seed: Seed of the loader's generator, which lives on the CPU, so that the order is the same on every device.
        num_replicas: Number of processes that share each batch, as torch's `DistributedSampler` names it.
        rank: Number of this one, which gets every `num_replicas`-th example of a batch.

    Attributes:
        dataset: The pairs as a map-style data set, with `len()`.

    Raises:
        ValueError: no data, lengths or devices that differ, a batch size below one, or `drop_last` leaving no batch.
    """

    def __init__(
        self,
        x: Shaped[Tensor, "N ..."],
        y: Shaped[Tensor, "N ..."],
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        for name, value in (("x", x), ("y", y)):
            if tensor(name, value, "with one row per example").ndim == 0:
                raise TypeError(f"{name} must be a tensor with one row per example, got a single number.")
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} examples and y {len(y)}; give one target an input")
        if len(x) == 0:
            raise ValueError("x and y are empty; give at least one example")
        if x.device != y.device:
            raise ValueError(f"x is on {x.device} and y on {y.device}; move both to one device")
        if whole_number("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if drop_last and batch_size > len(x):
            raise ValueError(f"drop_last with batch_size={batch_size} leaves no batch of {len(x)} examples")
        self.dataset: TensorDataset = TensorDataset(x, y)
        if augment is not None and not callable(augment):
            raise TypeError(f"augment must be a function of a batch's inputs and a generator, got {shown(augment)}.")
        self.batch_size: int = whole_number("batch_size", batch_size)
        self.shuffle: bool = flag("shuffle", shuffle)
        self.drop_last: bool = flag("drop_last", drop_last)
        self.augment = augment
        self.num_replicas: int = whole_number("num_replicas", num_replicas, least=1)
        self.rank: int = whole_number("rank", rank, least=0)
        if self.rank >= self.num_replicas:
            raise ValueError(f"rank={rank} must be below num_replicas={num_replicas}")
        self._generator = torch.Generator().manual_seed(whole_number("seed", seed))

    is_interleaved = True
    """Whether each process gets every `num_replicas`-th example of a batch, and none twice."""

    @property
    def n_data(self) -> int:
        """Number of examples N of all processes, including those that `drop_last` leaves out of an epoch."""
        return len(self.dataset)

    def __len__(self) -> int:
        """Number of batches per epoch."""
        full, rest = divmod(self.n_data, self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = int(torch.randint(2**63 - 1, (), generator=self._generator))
        return self._epoch(torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, which decides all epochs not yet begun."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the epochs that would have followed when `state` was taken.

        Raises:
            TypeError: it is no state of a loader.
        """
        if not isinstance(state, dict) or not isinstance(state.get("generator"), Tensor):  # pyright: ignore
            raise TypeError(f"the state of a TensorLoader is what its state_dict() gives, got {shown(state)}.")
        self._generator.set_state(state["generator"].cpu())

    def _epoch(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.dataset.tensors
        order = torch.randperm(len(x), generator=generator).to(x.device) if self.shuffle else None
        for batch in range(len(self)):
            part = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            index = part if order is None else order[part]
            x_batch, y_batch = x[index], y[index]
            if self.augment is not None:  # the whole batch, so that its random numbers are those of one process
                x_batch = self._augmented(x_batch, generator)
            yield x_batch[self.rank :: self.num_replicas], y_batch[self.rank :: self.num_replicas]

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        assert self.augment is not None
        changed = self.augment(x, generator)
        if not isinstance(changed, Tensor) or changed.shape[:1] != x.shape[:1]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"augment must return a tensor with the {len(x)} examples that it gets, but it returned {shown(changed)}"
            )
        return changed
