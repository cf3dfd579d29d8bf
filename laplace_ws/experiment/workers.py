"""Calls in parallel, each in its own process, which stop together."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from laplace_ws.interrupts import end_with, on_interrupt, signals_held_back

Result = TypeVar("Result")
_stop: Event | None = None
_is_calling = False


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
    arguments = (stop, progress, os.getpid())
    executor = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_begin, initargs=arguments)
    try:
        with signals_held_back():  # a worker that starts cannot yet say so in a line
            futures = [executor.submit(_call_unless_stopped, function, arguments) for arguments in calls]
        for future in futures:
            yield future.result()
    except KeyboardInterrupt:
        stop.set()
        for worker in multiprocessing.active_children():  # a signal may have reached this process alone
            if worker.pid is not None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(worker.pid, signal.SIGINT)
        raise
    except BaseException:
        stop.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


class _NoTerminal(io.TextIOBase):
    """Standard error that no progress bar takes for a terminal: the bars of several processes would overwrite each other."""

    def write(self, text: str, /) -> int:
        return 0 if sys.__stderr__ is None else sys.__stderr__.write(text)


def _begin(stop: Event, progress: bool, parent: int) -> None:
    """Remember, in a worker, the event by which all of them stop, and end with the parent."""
    global _stop
    _stop = stop
    end_with(parent)
    on_interrupt(_interrupt)
    if not progress:
        sys.stderr = _NoTerminal()


def _interrupt() -> None:
    """Stop the call that is under way, once: it may be writing what it has by the time of a second signal."""
    global _is_calling
    assert _stop is not None
    _stop.set()
    if _is_calling:
        _is_calling = False
        raise KeyboardInterrupt


def _call_unless_stopped(function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """A failure or interrupt of one worker keeps the others from what the executor has queued for them."""
    global _is_calling
    assert _stop is not None
    _is_calling = True
    try:
        if _stop.is_set():
            raise KeyboardInterrupt
        return function(*arguments)
    except BaseException:
        _stop.set()
        raise
    finally:
        _is_calling = False
