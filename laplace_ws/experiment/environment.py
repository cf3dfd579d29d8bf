"""What a result was obtained with: the environment that every file of results records."""

from __future__ import annotations

import platform
from typing import Any

import torch

from laplace_ws._version import __version__


def environment_record(*, threads: int, device: torch.device | str, **more: Any) -> dict[str, Any]:
    """Versions of Python, torch and this package, number of threads and device, as plain values for JSON.

    Args:
        threads: of torch in each process.
        device: where the work ran.
        **more: further entries, such as the number of workers.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "laplace_ws": __version__,
        "threads": threads,
        "device": str(device),
        **more,
    }
