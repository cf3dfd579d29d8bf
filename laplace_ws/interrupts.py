"""Signals that end a program: said in one line, with time to keep what there is; and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130
LOOKS_EVERY = 0.1
"""Seconds between two looks of a process at whether its parent is still there."""
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM or by the end of its terminal.

    Attributes:
        status: the exit status that says so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status: int = 128 + number


@contextmanager
def asked_to_end() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Terminated`, so that they end a program as Ctrl-C does; those that are ignored stay so."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)


@contextmanager
def quiet_imports(name: str) -> Iterator[None]:
    """Within it an interrupt ends the process at once with one line: nothing has been done yet, and imports do not bear exceptions well.

    Args:
        name: of the command.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, f"\n{name}: interrupted; nothing was written\n".encode())
        os._exit(INTERRUPTED)

    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if default:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Within it interrupts wait; a process that starts meanwhile holds them back too, until `on_interrupt`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, *_ENDING])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def on_interrupt(handler: Callable[[], None]) -> None:
    """Call `handler` at each interrupt of this process, those included that were held back."""
    for number in [signal.SIGINT, *_ENDING]:
        signal.signal(number, lambda *_: handler())
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, *_ENDING])


def end_with(parent: int) -> None:
    """End this process, whatever it does, soon after its parent has ended; also where the parent was killed.

    Args:
        parent: the parent's process id.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS_EVERY)
        os._exit(1)

    if sys.platform != "win32":  # where a process does not learn that its parent has ended
        threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
