"""Refuses models and data that are spread over several processes or devices: sums over the data are those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import nn

from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError

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
            f"{where} is run by {wrapper}, but curvature is computed in one process, on one device; {mend}, and all of the data to one "
            "process."
        )


def check_not_shared(loader: object) -> None:
    """Raise `InvalidBatchError` for a loader that gives one process's share of the data, or if there are several processes."""
    for source in _sources(loader):
        n = max((n for name in _N_SHARES if isinstance(n := getattr(source, name, None), int)), default=1)
        if n > 1:
            raise InvalidBatchError(
                f"the loader gives one of {n} processes its share of the data ({type(source).__name__}), but sums over the data, such as "
                "N and the curvature, are those of one process; give a loader of all of the data, in one process."
            )
    check_one_process()


def check_one_process() -> None:
    """Raise `InvalidBatchError` if there are several processes."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise InvalidBatchError(
            f"torch.distributed runs {distributed.get_world_size()} processes, but sums over the data, such as N and the curvature, are "
            "those of one; go on in one process, with all of the data, after torch.distributed.destroy_process_group()."
        )


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
