"""What a posterior of one network costs: time, memory and file, measured in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from real_networks import REAL_NETWORKS, Batch, inputs_of, labels_of, make_network, outputs_of
from torch import nn

from laplace_ws import Laplace, load_posterior
from laplace_ws.interrupts import end_with

Record = dict[str, Any]
STRUCTURES: dict[str, dict[str, str]] = {
    "kron": {"subset_of_weights": "all", "hessian_structure": "kron"},
    "diag": {"subset_of_weights": "all", "hessian_structure": "diag"},
    "last_layer": {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
}
"""By name, the options of `Laplace`."""
LARGEST_DIFFERENCE = 1e-5
"""Between a posterior and the same one from its file: of probabilities, and of the covariance, relative to its largest entry."""
_MIB = 2**20
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory of this process since a moment, above what it had then, in MiB.

    On Linux the system's record of the highest is begun anew; elsewhere it is that of the whole process, so that a peak below an earlier
    one counts as zero.
    """

    def __init__(self) -> None:
        gc.collect()
        self._can_reset = _RESET.exists()
        if self._can_reset:
            _RESET.write_text("5")
        self._before = self._kib("VmRSS")

    def since(self, other: PeakMemory) -> float:
        """The peak since this moment, above what there was at another."""
        return max(self._kib("VmHWM") - other._before, 0) / 1024

    @property
    def mib(self) -> float:
        """The peak since this moment, above what there was then."""
        return self.since(self)

    def _kib(self, entry: str) -> int:
        if not self._can_reset:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
        return int(line.split()[1])


class TimedLoader:
    """Batches, with the CPU time at which each was asked for, and at which there was none left."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.asked_at: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.asked_at.append(time.process_time())
            yield batch
        self.asked_at.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """CPU time for each batch of the first pass."""
        marks = self.asked_at[: len(self.batches) + 1]
        return [after - before for before, after in pairwise(marks)]


def timed(work: Callable[[], Any]) -> float:
    """CPU time in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def training_costs(name: str, batch: Batch, n_repeats: int, seed: int) -> Record:
    """Median seconds and peak memory of one step of SGD, after a first one, on a network that is thrown away."""
    model = make_network(name, seed).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        f, y = outputs_of(model, batch), labels_of(batch)
        nn.functional.cross_entropy(f.flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    memory = PeakMemory()
    step()
    seconds = [timed(step) for _ in range(n_repeats)]
    return {"training_seconds": statistics.median(seconds), "training_mib": memory.mib}


def costs(name: str, structure: str, *, n_batches: int, n_repeats: int, seed: int) -> Iterator[Record]:
    """Fit, decompose, predict, save and load; yields what each part cost, as soon as it is known.

    Raises:
        RuntimeError: the posterior from the file predicts otherwise.
    """
    network = REAL_NETWORKS[name]
    batches = network.batches(n_batches, seed)
    x = inputs_of(batches[0])
    yield training_costs(name, batches[0], n_repeats, seed)

    model = make_network(name, seed)
    n_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = {
        **STRUCTURES[structure],
        **network.options,
        **(network.options_of_factors if structure == "kron" else {}),
    }
    la = Laplace(model, "classification", **options)
    yield {"n_weights": n_weights, "n_covered": la.n_params}

    loader, memory = TimedLoader(batches), PeakMemory()
    la.fit(loader)
    first, *later = loader.seconds
    yield {
        "first_batch_seconds": first,
        "batch_seconds": statistics.median(later) if later else None,
        "fit_mib": memory.mib,
    }
    yield {"decomposition_seconds": timed(la.log_marginal_likelihood)}

    def predict(posterior: Laplace) -> torch.Tensor:
        return posterior.predict_proba(x, **network.prediction, generator=torch.Generator().manual_seed(seed))

    here = PeakMemory()
    start = time.process_time()
    predicted = predict(la)
    yield {"first_prediction_seconds": time.process_time() - start, "prediction_mib": here.since(memory)}
    yield {"prediction_seconds": statistics.median(timed(lambda: predict(la)) for _ in range(n_repeats))}

    spread = spread_of(la, x, network.prediction, seed)
    with tempfile.TemporaryDirectory(prefix="laplace-ws-network-") as folder:
        path = Path(folder) / "posterior.pt"
        la.save(path)
        yield {"file_mib": path.stat().st_size / _MIB}
        del la
        loaded = load_posterior(path, make_network(name, seed))
    of_spread = (spread_of(loaded, x, network.prediction, seed) - spread).abs().max() / spread.abs().max()
    difference = max(float((predict(loaded) - predicted).abs().max()), float(of_spread))
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"the posterior from the file predicts otherwise, by up to {difference:.1e}")
    yield {"difference": difference}


def spread_of(la: Laplace, x: Any, prediction: Mapping[str, Any], seed: int) -> torch.Tensor:
    """What only a right covariance gives: variances of the first example's outputs, or a draw of the weights where weights are sampled.

    Probabilities do not tell it where the outputs of all classes are nearly equal, as those of a network with random weights may be.
    """
    if prediction.get("pred_type") == "nn":
        return la.sample(1, torch.Generator().manual_seed(seed))[0] - la.mean
    one = {key: value[:1] for key, value in x.items()} if isinstance(x, Mapping) else x[:1]
    return la.functional_moments(one, diagonal_output=True)[1]


def in_own_process(item: Record, *, threads: int, memory_gb: float | None, timeout_s: float) -> Record:
    """The item with what its process measured; where it failed, with an error too, beside what had been measured by then."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, item, threads, memory_gb, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    found, deadline = dict(item), time.monotonic() + timeout_s
    try:
        while ours.poll(max(deadline - time.monotonic(), 0)):
            found |= ours.recv()
        return found | {"error": f"it takes longer than {timeout_s:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            found["error"] = f"its process ended with status {process.exitcode}"
        return found
    finally:
        process.kill()
        process.join()


def _measure(answers: Connection, item: Record, threads: int, memory_gb: float | None, parent: int) -> None:
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    torch.set_num_threads(threads)
    if memory_gb is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 2**30), resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        for part in costs(
            item["network"],
            item["structure"],
            n_batches=item["n_batches"],
            n_repeats=item["n_repeats"],
            seed=item["seed"],
        ):
            answers.send(part)
    except Exception as error:
        answers.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
