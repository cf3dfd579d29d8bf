"""How much memory is free, and the error for what would take more."""

from __future__ import annotations

from pathlib import Path

import torch

from laplace_ws.errors import NotEnoughMemoryError

_CGROUP = Path("/sys/fs/cgroup")
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, swap space and caches included; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024
    except (OSError, KeyError, ValueError):
        return None
    limit = _free_in_group()
    return free if limit is None else min(free, limit)


def _free_in_group() -> int | None:
    """What a container's limit leaves; None without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return None if limit == "max" else max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


def check_memory(n_bytes: int, device: torch.device, what: str, instead: str) -> None:
    """Raise `NotEnoughMemoryError` for what takes more memory than is free.

    Args:
        n_bytes: that it takes.
        device: where.
        what: it is, as the subject of "… takes 3 GiB".
        instead: what takes less, as in "choose …".
    """
    free = free_memory(device)
    if free is not None and n_bytes > free:
        raise NotEnoughMemoryError(
            f"{what} takes {in_words(n_bytes)} of memory, and {in_words(free)} are free on {device}; {instead}."
        )


def in_words(n_bytes: int) -> str:
    """A number of bytes in a unit that suits it."""
    unit, name = next(((unit, name) for unit, name in _UNITS if n_bytes >= unit), _UNITS[-1])
    return f"{n_bytes / unit:,.{0 if n_bytes >= 10 * unit else 1}f} {name}"
