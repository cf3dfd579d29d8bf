"""Runs a function on several processes of a gloo group."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LONGEST = 60
"""Seconds after which a process that has not ended hangs."""


class Failed(Exception):
    """A process raised; the message is its traceback."""


def run_on(n: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """What `body(*args)` returns on each of n processes, in order; where one raises, what it raised in place of it.

    Raises:
        TimeoutError: a process hangs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["laplace_ws.posterior", "laplace_ws.marglik", "torch.distributed", "groups"])
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=_work, args=(rank, n, folder, body, args), daemon=True) for rank in range(n)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join(LONGEST)
                if worker.is_alive():
                    raise TimeoutError(f"a process hangs after {LONGEST} s")
        finally:
            for worker in workers:
                worker.kill()
        return [_read(Path(folder) / f"result{rank}") for rank in range(n)]


def _read(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.exists() else Failed("the process ended without a result")


def _work(rank: int, n: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=timedelta(seconds=LONGEST / 2)
    )
    try:
        found = body(*args)
    except Exception as error:
        error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
        found = error
    Path(folder, f"part{rank}").write_bytes(pickle.dumps(found))
    Path(folder, f"part{rank}").rename(Path(folder, f"result{rank}"))
    dist.destroy_process_group()
