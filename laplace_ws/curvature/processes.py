"""Which share of the data a process reads, and models that are spread over several processes or devices, which are refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from laplace_ws._version import __version__
from laplace_ws.distributed import Processes, processes
from laplace_ws.errors import DataWarning, InvalidBatchError, UnsupportedParameterError

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel", "DeepSpeedEngine")
"""Classes, by name as some are slow to import, whose forward pass is not that of one model in one process."""
_N_SHARES = ("num_replicas", "num_processes")
"""What samplers call the number of processes among which they divide the data."""


@lru_cache(maxsize=1024)
def _wrapper(kind: type[nn.Module]) -> str | None:
    """The name of the wrapper that a class of modules is, or None."""
    names = {base.__name__ for base in kind.__mro__}
    return next((wrapper for wrapper in _WRAPPERS if wrapper in names), None)


def check_not_wrapped(model: nn.Module) -> None:
    """Raise `UnsupportedParameterError` for a model that is run by several processes, threads or devices."""
    for name, module in model.named_modules():
        wrapper = _wrapper(type(module))
        if wrapper is None:
            continue
        where = repr(name) if name else "the model"
        mend = "shard no module of it" if wrapper == "FSDPModule" else "give the network that it wraps (model.module)"
        raise UnsupportedParameterError(
            f"{where} is run by {wrapper}, but curvature needs the whole network on one device; {mend}, and each process its share of the "
            "data by a DistributedSampler."
        )


def check_alike(group: Processes, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Raise `ValueError` in all processes where one has another network, other versions or other facts; says which.

    Args:
        group: the processes.
        model: whose weights and buffers must be the same.
        facts: what else must be, as plain values by name.
    """
    if group.size == 1:
        return
    group.check_same({"version of torch": torch.__version__, "version of laplace_ws": __version__, **facts})
    tensors = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    sums = {f"sum of {name!r}": t.double().nan_to_num(0.0, 0.0, 0.0).sum().item() for name, t in tensors.items()}
    group.check_same(sums)  # of what is finite, as masks may hold infinities


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within a `DistributedDataParallel`; any other model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@dataclass(frozen=True)
class Shard:
    """The share of a data set that one of several processes reads: of each batch of all of them together, every size-th example.

    Attributes:
        processes: all of them.
        n_real: number of examples of the whole data set; samplers repeat some where it cannot be divided evenly. None where they do not.
    """

    processes: Processes
    n_real: int | None = None

    def n_kept(self, n_before: int, n: int) -> int:
        """How many of the next n examples, after `n_before`, are none that another process reads already."""
        if self.n_real is None:
            return n
        n_own = max(0, -(-(self.n_real - self.processes.rank) // self.processes.size))
        return max(0, min(n, n_own - n_before))

    def n_examples(self, loader: object, n_seen: int) -> int:
        """Number of examples N of all processes, with those that a loader leaves out by `drop_last`; `n_seen` were read."""
        drops = getattr(getattr(loader, "batch_sampler", None), "drop_last", False)
        n_real = self.n_real if drops else None
        return n_seen if n_real is None else n_real

    def interleaved(self, rows: Sequence[Tensor]) -> Tensor:
        """The rows of a batch of all processes together, from those of each."""
        places = [torch.arange(len(part)) * self.processes.size + rank for rank, part in enumerate(rows)]
        return torch.cat(list(rows))[torch.cat(places).argsort()]

    def own(self, n: int) -> slice:
        """Where the rows of this process lie among n of all."""
        return slice(self.processes.rank, n, self.processes.size)


def shard_of(loader: object) -> Shard | None:
    """The share of the data that a loader gives; None for all of it.

    Raises:
        InvalidBatchError: it is divided among another number of processes than there are, or in a way that is not known.

    Warns:
        DataWarning: the processes do not divide the data, or the loader divides it among processes that do not exist.
    """
    group = processes()
    for source in _sources(loader):
        n = max((n for name in _N_SHARES if isinstance(n := getattr(source, name, None), int)), default=1)
        if n <= 1:
            continue
        name = type(source).__name__
        if group.size == 1:
            warnings.warn(
                f"the loader gives one of {n} processes its share of the data ({name}), but torch.distributed is not initialised: N, sums "
                "and scores are those of the share alone.",
                DataWarning,
                stacklevel=3,
            )
            return None
        rank = getattr(source, "rank", None)
        if n != group.size or rank != group.rank:
            raise InvalidBatchError(
                f"the {name} divides the data among {n} processes, for number {rank}, but this is process {group.rank} of {group.size}; "
                "make it without num_replicas and rank, after torch.distributed.init_process_group()."
            )
        if isinstance(source, DistributedSampler):
            return Shard(group, source.total_size if source.drop_last else len(source.dataset))  # type: ignore[arg-type]
        if getattr(source, "is_interleaved", False):
            return Shard(group)
        raise InvalidBatchError(
            f"it is not known which examples the {name} gives to which process; use torch's DistributedSampler."
        )
    if group.size > 1:
        warnings.warn(
            f"torch.distributed runs {group.size} processes, but no DistributedSampler divides the data among them: each process counts "
            "all that its own loader gives, and nothing is summed.",
            DataWarning,
            stacklevel=3,
        )
    return None


def _sources(loader: object) -> Iterator[object]:
    """A loader and the parts that choose what it gives."""
    yield loader
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(loader, name, None)
        if part is not None:
            yield part
            inner = getattr(part, "sampler", None)
            if inner is not None:
                yield inner
