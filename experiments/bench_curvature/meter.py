"""Time and peak memory of a piece of work, on CPU and GPU."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench_curvature.setting import Work

_WINDOW = "bench_curvature.step"
_CPU = 0


def seconds_of(work: Work, device: torch.device) -> float:
    """CPU time of all threads together on the CPU, time between synchronisations on a GPU.

    Garbage of earlier work is collected before, so that nobody pays for another's.
    """
    gc.collect()
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(steps: Sequence[Work], device: torch.device) -> list[int]:
    """For each step, run one after the other, the most memory of tensors during it above what was held when it began.

    On the CPU: every allocation and release of torch in order, temporaries inside operations too, as its profiler records them. What
    was allocated before the first step must not be released in a step, as the profiler does not see that. On a GPU: torch's own count.
    """
    gc.collect()
    return _peaks_of_cpu(steps) if device.type == "cpu" else [_peak_of_gpu(step, device) for step in steps]


def _peak_of_gpu(step: Work, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peaks_of_cpu(steps: Sequence[Work]) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for step in steps:
            with record_function(_WINDOW):
                step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    windows = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == _WINDOW and e["ph"] == "X")
    changes = [
        (e["ts"], e["args"]["Bytes"])
        for e in events
        if e.get("name") == "[memory]" and e["args"]["Device Type"] == _CPU
    ]
    changes.sort(key=lambda change: change[0])  # stable: what shares a time stamp keeps its order
    return [peak_of_changes([change for ts, change in changes if start <= ts <= end]) for start, end in windows]


def peak_of_changes(changes: Sequence[int]) -> int:
    """The highest that a running sum of allocations (positive) and releases (negative) gets above its start."""
    level = peak = 0
    for change in changes:
        level += change
        peak = max(peak, level)
    return peak
