"""A line for each epoch, where there is no terminal for a progress bar: in logs, and under continuous integration."""

from __future__ import annotations

import sys

from laplace_ws.marglik.result import Record


def has_terminal() -> bool:
    """Whether a terminal shows what is written to stderr, also where a worker has put something in its place."""
    return any(stream is not None and stream.isatty() for stream in (sys.stderr, sys.__stderr__))


def say_epoch(record: Record, n_epochs: int, name: str = "") -> None:
    """Write one line about an epoch to stderr: its number, the loss in nats per example, and the evidence where there was a tuning.

    Args:
        record: of the epoch.
        n_epochs: of the training.
        name: of the network, where there are several.
    """
    parts = [f"epoch {record['epoch']:>{len(str(n_epochs))}}/{n_epochs}"]
    if record["loss"] is not None:
        parts.append(f"loss {record['loss']:.4f}")
    if record["log_marginal_likelihood"] is not None:
        parts.append(f"log marginal likelihood {record['log_marginal_likelihood']:.1f}")
    print(f"{name}: " * bool(name) + ", ".join(parts), file=sys.stderr, flush=True)
