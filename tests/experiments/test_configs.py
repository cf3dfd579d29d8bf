"""Every file in configs/ is read by its command or study, and its trainings are valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import budget_tradeoff
import calibrate
import check_networks
import compare_backends
import factor_precision
import file_precision
import many_classes
import prediction_cost
import pytest
import sampling_variance
import scaling
import select_study
import trust
import tuning_cost
import uci_regression
import update_cost
import wide_layers
from bench_curvature.config import BenchConfig
from bench_curvature.config import check_config as check_bench
from train_kfac.config import TrainKfacConfig
from wrn_tuning.config import StudyConfig, check_study, run_of

from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import tasks_of
from laplace_ws.experiment.training import check_config
from laplace_ws.options import Options

FOLDER = Path(__file__).parents[2] / "configs"


def runs_of_selection(study: select_study.StudyConfig) -> list[RunConfig]:
    return [study.select.run_config(candidate) for candidate in study.select.candidates]


def runs_of_tuning(study: StudyConfig) -> list[RunConfig]:
    return [run_of(study, row, seed, row.weight_decay) for row in check_study(study) for seed in study.seeds]


def runs_of_calibration(study: calibrate.StudyConfig) -> list[RunConfig]:
    calibrate.check_study(study)
    return [calibrate.run_of(study, seed) for seed in study.seeds]


def runs_of_tradeoff(study: budget_tradeoff.TradeoffConfig) -> list[RunConfig]:
    return [study.run_of(row, seed) for row in study.row_names for seed in study.seeds]


def no_runs(study: Any) -> list[RunConfig]:
    return []


def benchmark(config: BenchConfig) -> list[RunConfig]:
    check_bench(config)
    return []


KINDS: dict[str, tuple[type, Callable[[Any], Iterable[RunConfig]]]] = {
    "bench_curvature": (BenchConfig, benchmark),
    "bench_curvature_cuda": (BenchConfig, benchmark),
    "bench_curvature_tiny": (BenchConfig, benchmark),
    "budget_tradeoff": (budget_tradeoff.TradeoffConfig, runs_of_tradeoff),
    "calibrate": (calibrate.StudyConfig, runs_of_calibration),
    "calibrate_tuned": (calibrate.StudyConfig, runs_of_calibration),
    "check_networks": (check_networks.NetworksConfig, lambda study: check_networks.check_config(study) or []),
    "compare_backends": (compare_backends.CompareConfig, no_runs),
    "factor_precision": (factor_precision.PrecisionConfig, no_runs),
    "file_precision": (file_precision.FilesConfig, no_runs),
    "kfac_gnn": (TrainKfacConfig, no_runs),
    "kfac_gnn_full": (TrainKfacConfig, no_runs),
    "kfac_ingredients": (TrainKfacConfig, no_runs),
    "kfac_vit": (TrainKfacConfig, no_runs),
    "kfac_vit_cuda": (TrainKfacConfig, no_runs),
    "kfac_vit_full": (TrainKfacConfig, no_runs),
    "kfac_wrn_cuda": (TrainKfacConfig, no_runs),
    "paper_wrn_16_4": (RunConfig, lambda run: [run]),
    "paper_wrn_28_10": (RunConfig, lambda run: [run]),
    "many_classes": (many_classes.ClassesConfig, no_runs),
    "prediction_cost": (prediction_cost.CostConfig, no_runs),
    "prior_sweep": (RunConfig, lambda run: [run]),
    "sampling_variance": (sampling_variance.VarianceConfig, no_runs),
    "scaling": (scaling.ScalingConfig, no_runs),
    "select_study": (select_study.StudyConfig, runs_of_selection),
    "trust": (trust.TrustConfig, no_runs),
    "trust_wrn": (calibrate.StudyConfig, runs_of_calibration),
    "tuning_cost": (tuning_cost.TuningConfig, no_runs),
    "uci_regression": (uci_regression.UciConfig, no_runs),
    "update_cost": (update_cost.UpdateCostConfig, lambda study: update_cost.check_config(study) or []),
    "update_cost_cuda": (update_cost.UpdateCostConfig, lambda study: update_cost.check_config(study) or []),
    "wide_layers": (wide_layers.WideConfig, no_runs),
    "wrn_tuning": (StudyConfig, runs_of_tuning),
}
"""By name of the file, what it is read into, and the trainings that it asks for."""

REQUIRED = {"uci_regression": ["--folder", "tables"]}
"""Options that have no default and are no part of the file."""


def test_every_file_has_its_reader():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_read_and_its_trainings_are_valid(name):
    kind, runs_of = KINDS[name]
    arguments = ["--config", str(FOLDER / f"{name}.yaml"), *REQUIRED.get(name, [])]
    for run in runs_of(Options(kind).read(arguments)):
        check_config(run, tasks_of(run.baselines.fixed_prior_precisions))


@pytest.mark.parametrize(("name", "depth", "width"), [("paper_wrn_16_4", 16, 4), ("paper_wrn_28_10", 28, 10)])
def test_the_papers_trainings(name, depth, width):
    run = Options(RunConfig).read(["--config", str(FOLDER / f"{name}.yaml")])
    m = run.marglik
    assert (run.model.depth, run.model.width, run.model.norm, run.data.batch_size) == (depth, width, "fixup", 128)
    assert (m.n_epochs, m.n_epochs_burnin, m.marglik_frequency, m.n_hypersteps, m.lr_hyp) == (100, 20, 5, 100, 0.1)
    assert (m.optimizer, m.lr, m.lr_min, m.momentum) == ("sgd", 0.1, 1e-6, 0.9)
    assert m.prior_prec_init == pytest.approx(5e-4 * 50_000)
    assert (m.prior_structure, m.kfac_approx) == ("layerwise", "reduce")
    for other in ({"kfac_approx": "expand"}, {"n_hypersteps": 0}):
        check_config(replace(run, marglik=replace(m, **other)), tasks_of([]))
