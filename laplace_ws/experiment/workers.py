"""Calls in parallel, each in its own process, which stop together."""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

Result = TypeVar("Result")
_stop: Event | None = None


def side_by_side(
    function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], n_workers: int, *, progress: bool = False
) -> Iterator[Result]:
    """The results of a function in the order of its calls; with one worker in this process, each when it is asked for.

    Args:
        function: Importable by name, as the workers look it up.
        calls: The arguments of each call.
        n_workers: Processes.
        progress: Whether the workers may show progress bars, as when at most one of them has one.

    Raises:
        BaseException: what a call raised, an interrupt included; calls that have not started are then skipped.
        BrokenProcessPool: a worker was killed.
    """
    n_workers = min(n_workers, len(calls))
    if n_workers <= 1:
        yield from (function(*arguments) for arguments in calls)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_begin, initargs=(stop, progress))
    try:
        futures = [executor.submit(_call_unless_stopped, function, arguments) for arguments in calls]
        for future in futures:
            yield future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


class _NoTerminal(io.TextIOBase):
    """Standard error that no progress bar takes for a terminal: the bars of several processes would overwrite each other."""

    def write(self, text: str, /) -> int:
        return 0 if sys.__stderr__ is None else sys.__stderr__.write(text)


def _begin(stop: Event, progress: bool) -> None:
    """Remember, in a worker, the event by which all of them stop."""
    global _stop
    _stop = stop
    if not progress:
        sys.stderr = _NoTerminal()


def _call_unless_stopped(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """A failure or interrupt of one worker keeps the others from what the executor has queued for them."""
    assert _stop is not None
    if _stop.is_set():
        raise KeyboardInterrupt
    try:
        return function(*arguments)
    except BaseException:
        _stop.set()
        raise
