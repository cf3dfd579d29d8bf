"""One writer to a folder at a time."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from laplace_ws.errors import InputError
from laplace_ws.interrupts import LOOKS_EVERY

LOCK = ".lock"


class FolderInUseError(InputError):
    """Another process writes into the folder."""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which must exist.

    The operating system holds the lock, and drops it when the process ends in whatever way; the file beside it says who holds it. It
    works between machines where the file system's locks do.

    Raises:
        FolderInUseError: another process is writing there; says which.
    """
    path = folder / LOCK
    lock = FileLock(path, thread_local=False)
    before = _owner(path)  # read here, as some releases of filelock empty the file for whoever gets the lock
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUseError(
            f"{_said(_owner(path))} is writing into '{folder}'; wait for it to end, or choose another folder"
        ) from None
    try:
        if before:
            print(f"{_said(before)} ended before it was done; '{folder}' is free again", file=sys.stderr)
            time.sleep(5 * LOOKS_EVERY)  # its workers notice and end
        path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}) + "\n", encoding="utf-8")
        try:
            yield
        finally:
            with suppress(OSError):  # where an open file cannot be removed, it stays
                path.unlink()  # while it is held: whoever opens it afterwards makes a new one
    finally:
        lock.release()


def _owner(path: Path) -> dict[str, Any]:
    """Who wrote into a lock's file; empty where nobody did."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _said(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"
