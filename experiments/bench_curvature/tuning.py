"""One tuning of the hyperparameters part by part, fit, decomposition and steps: ours, and what other libraries have of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bench_curvature import peers
from bench_curvature.cases import SMALL, training_and_setting
from bench_curvature.config import BenchConfig
from bench_curvature.meter import peak_bytes, seconds_of
from bench_curvature.setting import DoesNotFit, Setting, Work
from laplace_ws import Laplace
from laplace_ws.curvature.batches import Data
from laplace_ws.curvature.forward import N_PROBED
from laplace_ws.marglik import Hyperparameters
from laplace_ws.matrices import Kron
from laplace_ws.posterior import prior_groups

_NO_MEMORY = re.compile(
    "can't allocate memory|bad_alloc|out of memory|could not create a (memory|primitive)", re.IGNORECASE
)
"""What torch, C++, CUDA and oneDNN say."""


@dataclass(frozen=True)
class Tuning:
    """The parts of one tuning, to be called in this order, again and again.

    Attributes:
        fit: the curvature of the data at the present weights, from nothing.
        decompose: what a log determinant needs of its factors.
        ascend: the steps on the hyperparameters; None where a library has none.
    """

    fit: Work
    decompose: Work
    ascend: Work | None = None

    def parts(self) -> dict[str, Work]:
        """Those that there are, by name."""
        parts = {"fit": self.fit, "decomposition": self.decompose}
        return parts if self.ascend is None else parts | {"hyper-steps": self.ascend}


def tuning_by(la: Laplace, data: Data, hyper: Hyperparameters, n_hypersteps: int) -> Tuning:
    """A tuning as `marglik_training` has it, on these data."""
    return Tuning(
        fit=lambda: la.fit(data, recheck=False),
        decompose=lambda: [block.factor_eigenvalues for block in cast(Kron, la.H).values()],
        ascend=lambda: hyper.ascend(la, n_hypersteps),
    )


def seconds_by_part(tuning: Tuning, device: torch.device) -> dict[str, float]:
    """Seconds of each part, as `seconds_of` measures them."""
    return {name: seconds_of(part, device) for name, part in tuning.parts().items()}


def ours(setting: Setting, n_hypersteps: int) -> Tuning:
    """Layerwise prior precisions by steps of Adam; the check of the model, which a training does once, is done before."""

    def posterior() -> Laplace:
        return Laplace(setting.model, "classification", curvature=setting.curvature, kfac_approx=setting.kfac_approx)

    checked, la = posterior(), posterior()
    checked.fit([(setting.x[:N_PROBED], setting.y[:N_PROBED])])
    la.network = checked.network  # with what is known of it
    hyper = Hyperparameters(prior_groups(la.shapes, "layerwise"), device=setting.x.device)
    return tuning_by(la, [(setting.x, setting.y)], hyper, n_hypersteps)


def peer(prepare: Callable[[Setting], Work]) -> Callable[[Setting, int], Tuning]:
    """What another library has of a tuning: the factors, and eigenvalues and -vectors of each of them by `torch.linalg.eigh`."""

    def make(setting: Setting, n_hypersteps: int) -> Tuning:
        factors: list[Tensor] = []

        def fit() -> None:
            factors.clear()
            factors.extend(prepare(setting)())  # type: ignore[arg-type]

        return Tuning(fit, lambda: [torch.linalg.eigh(factor) for factor in factors])

    return make


TUNERS: dict[str, Callable[[Setting, int], Tuning]] = {
    "ours": ours,
    "curvlinops": peer(peers.curvlinops),
    "asdl": peer(peers.asdl),
}
"""Who tunes: of a setting and a number of steps, the parts."""


def measure_tuning(config: BenchConfig, item: dict[str, Any]) -> dict[str, Any]:
    """Seconds of training steps and of each part of a tuning on the same batch, in turns."""
    device = torch.device(config.device)
    with memory_limit(item["memory_gb"], device):
        _, small = training_and_setting(config, SMALL, device, 2, item["kfac_approx"], item["curvature"])
        seconds_by_part(TUNERS[item["contestant"]](small, 1), device)
        step, tuning = _of(config, item, device)
        training, rounds = [], []
        for _ in range(config.n_repeats):
            training.append(seconds_of(step, device))
            step.forget()
            rounds.append(seconds_by_part(tuning, device))
    return {"training_seconds": training, "seconds": {name: [r[name] for r in rounds] for name in rounds[0]}}


def measure_tuning_memory(config: BenchConfig, item: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of a training step, and of fit and decomposition."""
    device = torch.device(config.device)
    with memory_limit(item["memory_gb"], device):
        step, tuning = _of(config, item, device)
        step()
        step.forget()
        (training_peak,) = peak_bytes([step], device)
        step.forget()
        (peak,) = peak_bytes([_in_order([tuning.fit, tuning.decompose])], device)
    return {"training_peak_bytes": training_peak, "peak_bytes": peak}


@contextmanager
def memory_limit(gigabytes: float | None, device: torch.device) -> Iterator[None]:
    """Let this process have no more memory of its own on a CPU, and say so where that is too little; a GPU has the memory that it has.

    Raises:
        DoesNotFit: an allocation failed.
    """
    limit, reset = (
        (f"{gigabytes:g} GB", _limit_data(gigabytes)) if gigabytes and device.type == "cpu" else ("all", None)
    )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise DoesNotFit(
            f"{limit} of memory of the {device.type} are too little ({type(error).__name__}: {error})"
        ) from error
    finally:
        if reset is not None:
            reset()


def _limit_data(gigabytes: float) -> Callable[[], None]:
    """Limit the data segments of this process, which hold all that is allocated; returns what undoes it."""
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30), before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, before)


def _of(config: BenchConfig, item: dict[str, Any], device: torch.device) -> tuple[Any, Tuning]:
    step, setting = training_and_setting(
        config, config.network, device, item["batch_size"], item["kfac_approx"], item["curvature"]
    )
    return step, TUNERS[item["contestant"]](setting, item["n_hypersteps"])


def _in_order(works: Sequence[Work]) -> Work:
    def run() -> None:
        for work in works:
            work()

    return run
