"""Several processes that compute together, as `torchrun` starts them; every collective of the package is called here.

What a process learns from the others goes through three calls: `gather`, `sum_` and `broadcast_`. Each begins with an exchange in which
a process may say that it has failed instead; then all of them raise. So no process waits for one that has given up, if what they do
together lies within `together`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")

_ANNOUNCED = "_announced_to_other_processes"
BUCKET_BYTES = 2**26
"""Memory in which tensors are put side by side, to be sent at once."""


class ProcessError(RuntimeError):
    """Another process has failed, or does not answer."""


class Processes(ABC):
    """The processes that compute together.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows bars."""
        return self.rank == 0

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks.

        Raises:
            ProcessError: another process has failed.
        """

    @abstractmethod
    def sum_(self, tensors: Sequence[Tensor], symmetric: Sequence[Float[Tensor, "*G D D"]] = ()) -> None:
        """Replace tensors, which may be views, by their sums over all processes; every process gets the same bits.

        Args:
            tensors: of any shape.
            symmetric: symmetric matrices, of which only a triangle is sent.

        Raises:
            ProcessError: another process has failed, or has tensors of other shapes.
        """

    @abstractmethod
    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Replace tensors by those of one process."""

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Fail in all processes where one of them fails; see the module.

        Args:
            what: is being done, for messages.
        """
        yield

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise `ValueError` in all processes where one of them differs from the first, with its number and what differs.

        Args:
            facts: plain values by name.
        """
        of_each = self.gather(dict(facts))
        for rank, other in enumerate(of_each):
            for name, value in of_each[0].items():
                if other.get(name) != value:
                    raise ValueError(
                        f"{name} is {other.get(name)!r} in process {rank} and {value!r} in process 0; start all processes alike."
                    )


class Alone(Processes):
    """One process."""

    def gather(self, value: T) -> list[T]:
        """See `Processes.gather`."""
        return [value]

    def sum_(self, tensors: Sequence[Tensor], symmetric: Sequence[Tensor] = ()) -> None:
        """See `Processes.sum_`."""

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """See `Processes.broadcast_`."""


ALONE = Alone()


@dataclass(frozen=True)
class _Failure:
    """What a process that has failed sends in place of a value."""

    rank: int
    what: str
    reason: str


class Group(Processes):
    """The processes of torch's default group.

    Attributes:
        n_bytes: bytes of the tensors that sums and broadcasts were of.
    """

    def __init__(self) -> None:
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()
        self.n_bytes: int = 0

    def gather(self, value: T) -> list[T]:
        """See `Processes.gather`."""
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise ProcessError(
                f"one of the {self.size} processes has ended or does not answer ({_first_line(error)}); look at what it printed."
            ) from error
        failure = next((v for v in found if isinstance(v, _Failure) and v.rank != self.rank), None)
        if failure is not None and not isinstance(value, _Failure):
            raise ProcessError(f"process {failure.rank} failed in {failure.what}: {failure.reason}")
        return found

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """See `Processes.together`."""
        try:
            yield
        except ProcessError:  # the others have raised, too
            raise
        except Exception as error:
            if not getattr(error, _ANNOUNCED, False):
                setattr(error, _ANNOUNCED, True)  # so that a context around this one does not do it again
                self.gather(_Failure(self.rank, what, f"{type(error).__name__}: {_first_line(error)}"))
            raise
        else:
            self.gather(None)

    def sum_(self, tensors: Sequence[Tensor], symmetric: Sequence[Tensor] = ()) -> None:
        """See `Processes.sum_`."""
        self._check_same([*tensors, *symmetric])
        for bucket in _buckets(tensors):
            self._sum_bucket(bucket)
        for matrices in _buckets(symmetric):
            triangles = [pack_triangle(matrix) for matrix in matrices]
            self._sum_bucket(triangles)
            for matrix, triangle in zip(matrices, triangles, strict=True):
                matrix.copy_(unpack_triangle(triangle, matrix.shape[-1]))

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat)
        self._share_out(flat, bucket)

    def _share_out(self, flat: Tensor, bucket: Sequence[Tensor]) -> None:
        self.n_bytes += flat.nbytes
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """See `Processes.broadcast_`."""
        self._check_same(tensors)
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.broadcast(flat, source)
            self._share_out(flat, bucket)

    def _check_same(self, tensors: Sequence[Tensor]) -> None:
        forms = self.gather([(tuple(t.shape), str(t.dtype)) for t in tensors])
        for rank, form in enumerate(forms):
            if form != forms[0]:
                raise ProcessError(
                    f"process {rank} has tensors of other shapes than process 0; give all processes the same model."
                )


def processes() -> Processes:
    """All processes of an initialised `torch.distributed`, or this one alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return ALONE


def n_started() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the first of the processes that `torchrun` has started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def group_of_torchrun(device: torch.device) -> Iterator[Processes]:
    """Join the processes that `torchrun` has started, if it has, and part from them at the end.

    Args:
        device: where each computes; of a machine's GPUs, each process takes the one with its local number.
    """
    if n_started() == 1 or dist.is_initialized():
        yield processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield processes()
    finally:
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type on one device, together no larger than a bucket, or alone."""
    bucket: list[Tensor] = []
    n_bytes = 0
    for tensor in sorted(tensors, key=lambda t: (str(t.dtype), str(t.device))):
        is_other = bool(bucket) and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (is_other or n_bytes + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, n_bytes = [], 0
        bucket.append(tensor)
        n_bytes += tensor.nbytes
    if bucket:
        yield bucket


# ------------------------------------------------------------------ triangles


def pack_triangle(matrix: Float[Tensor, "*G D D"]) -> Float[Tensor, "*G H W"]:
    """The upper triangle of each symmetric matrix as a rectangle: with W = ⌈D/2⌉ columns, the right half of the matrix, below whose
    diagonal there is room for the triangle of the left half.
    """
    D = matrix.shape[-1]
    W = (D + 1) // 2
    left = D - W  # columns of the left half: W, or one less
    out = matrix.new_zeros(*matrix.shape[:-2], D + 1, W)
    out[..., :D, :] = matrix[..., left:].triu(-left)
    out[..., left + 1 : left + 1 + left, :left] += matrix[..., :left, :left].tril()
    return out


def unpack_triangle(packed: Float[Tensor, "*G H W"], D: int) -> Float[Tensor, "*G D D"]:
    """The symmetric matrices that `pack_triangle` packed."""
    W = packed.shape[-1]
    left = D - W
    out = packed.new_zeros(*packed.shape[:-2], D, D)
    out[..., left:] = packed[..., :D, :].triu(-left)
    out[..., :left, :left] = packed[..., left + 1 : left + 1 + left, :left].tril().mT
    upper = out.triu()
    return upper + upper.triu(1).mT
