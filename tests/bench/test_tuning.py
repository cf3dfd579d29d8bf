"""The parts of one tuning: what they compute, and what is said where memory is short."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_curvature.cases import training_and_setting
from bench_curvature.config import BenchConfig, NetworkConfig
from bench_curvature.measure import measure
from bench_curvature.setting import DoesNotFit
from bench_curvature.tuning import TUNERS, memory_limit, ours, tuning_by

from laplace_ws import Laplace
from laplace_ws.curvature.checks import LinearisationCheck
from laplace_ws.marglik import Hyperparameters
from laplace_ws.posterior import prior_groups

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook")  # of stock ASDL

CPU = torch.device("cpu")
TINY = BenchConfig(n_repeats=2, network=NetworkConfig(depth=10, width=1, n_classes=3, image_size=8))
ITEM = {"kfac_approx": "expand", "curvature": "ef", "batch_size": 4, "n_hypersteps": 2, "memory_gb": None}


@pytest.mark.many(3)
@pytest.mark.parametrize("contestant", TUNERS)
def test_every_part_is_timed_and_has_its_peak(contestant):
    pytest.importorskip("curvlinops")
    item = {**ITEM, "contestant": contestant}
    times, memory = (measure(TINY, {**item, "kind": kind}) for kind in ("tuning", "tuning_memory"))
    parts = ["fit", "decomposition", *(["hyper-steps"] if contestant == "ours" else [])]
    assert list(times["seconds"]) == parts
    assert all(len(s) == 2 and min(s) > 0 for s in [*times["seconds"].values(), times["training_seconds"]])
    factors = 4 * sum(
        i**2 for i in (9 * 3, *[9 * 16] * 3, *[9 * 32] * 2, 9 * 64, 16, 32, 64)
    )  # input factors in float32
    assert memory["peak_bytes"] > factors
    assert memory["training_peak_bytes"] > 0


def test_the_parts_are_a_tuning():
    _, setting = training_and_setting(TINY, TINY.network, CPU, 4, "reduce", "ef")
    data = [(setting.x, setting.y)]
    expected, la = (Laplace(setting.model, "classification", curvature="ef", kfac_approx="reduce") for _ in range(2))
    expected.fit(data)
    hyper, alike = (Hyperparameters(prior_groups(la.shapes, "layerwise")) for _ in range(2))
    alike.ascend(expected, 5)
    tuning = tuning_by(la, data, hyper, 5)
    tuning.fit()
    assert not any("factor_eigenvalues" in vars(block) for block in la.H.values())
    tuning.decompose()
    assert all("factor_eigenvalues" in vars(block) for block in la.H.values())
    assert tuning.ascend is not None
    tuning.ascend()
    torch.testing.assert_close(hyper.prior_precision(), alike.prior_precision())


def test_the_check_of_the_model_is_not_in_a_tuning(monkeypatch):
    _, setting = training_and_setting(TINY, TINY.network, CPU, 4, "reduce", "ef")
    tuning = ours(setting, 1)
    monkeypatch.setattr(LinearisationCheck, "run", None)
    tuning.fit()


def test_other_libraries_decompose_the_factors_of_a_fit():
    pytest.importorskip("curvlinops")
    _, setting = training_and_setting(TINY, TINY.network, CPU, 4, "expand", "ef")
    tuning = TUNERS["curvlinops"](setting, 0)
    tuning.fit()
    tuning.fit()  # from nothing
    eigenvalues = [pair.eigenvalues for pair in tuning.decompose()]
    trace = sum(e.sum().item() for e in eigenvalues if len(e) == 3)  # of the classifier's outputs
    la = Laplace(setting.model, "classification", curvature="ef", kfac_approx="expand")
    la.fit([(setting.x, setting.y)])
    assert math.isclose(trace, la.H["classifier.weight"].B.trace().item(), rel_tol=1e-4)


def test_what_does_not_fit_is_a_line():
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of memory")
    item = {**ITEM, "contestant": "ours", "kind": "tuning", "batch_size": 2048, "memory_gb": data_gigabytes() + 0.3}
    large = replace(TINY, network=NetworkConfig(depth=10, width=2))
    limit = f"{item['memory_gb']:g} GB"
    assert measure(large, item)["error"].startswith(f"does not fit: {limit} of memory of the cpu are too little (")
    assert "error" not in measure(TINY, {**item, "batch_size": 4})  # the limit is gone


def data_gigabytes() -> float:
    """What this process has allocated."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) / 2**20


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^no such kernel$"), memory_limit(1000.0, CPU):
        raise RuntimeError("no such kernel")
    with (
        pytest.raises(DoesNotFit, match=r"^all of memory of the cpu are too little \(MemoryError: \)$"),
        memory_limit(None, CPU),
    ):
        raise MemoryError
