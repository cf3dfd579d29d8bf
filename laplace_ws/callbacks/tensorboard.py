"""The records of `marglik_training` as curves of TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from laplace_ws.distributed import processes
from laplace_ws.marglik.result import Record
from laplace_ws.values import shown

__all__ = ["ScalarWriter", "TensorBoardLogger"]


@runtime_checkable
class ScalarWriter(Protocol):
    """What TensorBoard's `SummaryWriter` and its like have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Add a point to a curve.

        Args:
            tag: name of the curve.
            scalar_value: its value.
            global_step: where.
        """


class TensorBoardLogger:
    """Writes each epoch of a training, `marglik_training(…, on_epoch=TensorBoardLogger(SummaryWriter()))`.

    Each number of the record is a curve over the epochs: losses, accuracy, the log marginal likelihood where there was a tuning, noise,
    temperature and times; numbers by name, as the prior precisions, are one curve each, "prior_precision/0.weight".

    Args:
        writer: what has TensorBoard's `add_scalar(tag, value, step)`, such as `torch.utils.tensorboard.SummaryWriter`.
        prefix: before each tag, as in "run1/".
        on_epoch: another function of the record, called first; what it adds to the record is written too.

    Raises:
        TypeError: the writer is something else.
    """

    def __init__(self, writer: ScalarWriter, prefix: str = "", on_epoch: Any = None) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"writer must have add_scalar(tag, value, step), as torch.utils.tensorboard.SummaryWriter() has, got {shown(writer)}."
            )
        self.writer = writer
        self.prefix = prefix
        self.on_epoch = on_epoch

    def __call__(self, record: Record) -> None:
        """Write an epoch; in several processes, the first does."""
        if self.on_epoch is not None:
            self.on_epoch(record)
        if not processes().is_first:
            return
        for name, value in record.items():
            values = value.items() if isinstance(value, Mapping) else [(None, value)]
            for part, number in values:  # pyright: ignore[reportUnknownVariableType]
                if isinstance(number, (int, float)) and not isinstance(number, bool) and name != "epoch":
                    tag = f"{self.prefix}{name}" if part is None else f"{self.prefix}{name}/{part}"
                    self.writer.add_scalar(tag, number, record["epoch"])
