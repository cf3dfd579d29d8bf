"""`laplace-ws calibrate`: a trained network and its predictives, scored side by side."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, divided
from laplace_ws.calibration.result import FORMAT_VERSION, CalibrationResult, MethodResult
from laplace_ws.calibration.rows import check_rows, make_methods
from laplace_ws.calibration.score import ScoredImages, load_scored_images, score
from laplace_ws.calibration.trained import TrainedRun, checkpoint_path, load_trained
from laplace_ws.data.corruptions import PARAMETERS
from laplace_ws.distributed import ProcessError, Processes, group_of_torchrun
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.experiment.environment import environment_record
from laplace_ws.experiment.folder import check_free, check_page, make_writable, write_whole
from laplace_ws.experiment.run import chosen_device, explained, torch_settings
from laplace_ws.marglik.checkpoint import CheckpointError
from laplace_ws.records import read_record

RESULT, PAGE = "calibration.json", "calibration.html"
_ANEW = "score the network again to write it"


def run_calibration(config: CalibrateConfig) -> CalibrationResult:
    """Score everything that `config` asks for; writes nothing.

    Data, checkpoint and methods are checked before the work starts.

    Raises:
        ExperimentError: something does not allow the run; says what to do.
    """
    start = time.perf_counter()
    user_errors = (ValueError, OSError, CheckpointError, UnsupportedParameterError, InvalidBatchError, ProcessError)
    with (
        explained(*user_errors),
        group_of_torchrun(chosen_device(config.device)) as group,
        group.together("the calibration"),
    ):
        check_config(config)
        trained = load_trained(config)
        check_rows(config, trained)
        images = load_scored_images(config, trained)
        with torch_settings(config.threads, config.seed):
            methods = [_scored(method, images, config, group, start) for method in make_methods(config, trained)]
    return CalibrationResult(
        config=asdict(config),
        environment=environment_record(threads=config.threads, device=trained.data.x_test.device),
        trained={
            "checkpoint": str(trained.path),
            "epoch": trained.epoch,
            "config": trained.stored,
        },
        data=_describe(config, trained, images),
        methods=tuple(_with_costs(method, methods[0]) for method in methods),
        total_seconds=time.perf_counter() - start,
    )


def _scored(
    method: Method, images: ScoredImages, config: CalibrateConfig, group: Processes, start: float
) -> MethodResult:
    """The scores of a method; reports on stderr when it is done, as all of them together take minutes."""
    result = score(replace(method, predict=divided(method.predict, group)), images, config)
    if group.is_first:
        print(f"{time.perf_counter() - start:6.0f} s  {method.label}", file=sys.stderr, flush=True)
    return result


def _with_costs(method: MethodResult, network: MethodResult) -> MethodResult:
    """A method with its times in units of those of the network as it is."""
    return replace(
        method,
        training_runs=method.needed_seconds / network.needed_seconds,
        predict_cost=method.predict_seconds / network.predict_seconds,
    )


def check_config(config: CalibrateConfig) -> None:
    """Reject invalid values before anything is done."""
    for name, value in (
        ("threads", config.threads),
        ("n_bins", config.n_bins),
        ("data.batch_size", config.data.batch_size),
        ("methods.n_samples", config.methods.n_samples),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    m = config.methods
    lists = {
        "methods.ensemble": m.ensemble,
        "methods.laplace": m.laplace,
        "methods.priors": m.priors,
        "data.corruptions": config.data.corruptions,
    }
    for name, values in lists.items():
        if len(set(values)) < len(values):
            raise ValueError(f"{name} names one twice: {', '.join(values)}")
    if m.laplace and not m.priors:
        raise ValueError(
            "methods.priors is empty, so that no Laplace posterior would be scored; name one, or set methods.laplace to []"
        )
    if m.pred_type == "nn" and m.link_approx != "probit":
        raise ValueError(f"methods.link_approx={m.link_approx} is for methods.pred_type=glm; leave it out with nn")
    if m.pred_type == "nn" and m.laplace and "scaled" in m.priors:
        raise ValueError(
            "methods.priors=scaled is for methods.pred_type=glm, whose network chooses the covariance scale; leave it out with nn"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; use device=auto or device=cpu")


def output_folder(config: CalibrateConfig, *, overwrite: bool = False) -> Path:
    """Make the folder of the results, see `make_writable`, and see that nothing is lost in it.

    Raises:
        ExperimentError: it cannot be written, there is no checkpoint whose folder it would be, or results are there already.
    """
    folder = Path(config.out) if config.out else checkpoint_path(config.checkpoint).parent
    check_free(folder / RESULT, "a calibration", overwrite)
    check_page(folder / PAGE)
    make_writable(folder, "--out")
    return folder


def write_result(result: CalibrationResult, folder: Path) -> Path:
    """Write calibration.json into a folder; returns its path."""
    path = folder / RESULT
    write_whole(path, json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")
    return path


def read_result(folder: Path) -> CalibrationResult:
    """What a calibration found, from its folder.

    Raises:
        RecordError: naming the file, what is wrong and how to mend it.
    """
    return read_record(CalibrationResult, folder / RESULT, version=FORMAT_VERSION, absent=_ANEW, broken=_ANEW)


def _describe(config: CalibrateConfig, trained: TrainedRun, images: ScoredImages) -> dict[str, object]:
    corruptions = {c.value: list(parameters) for c, parameters in PARAMETERS.items() if c in config.data.corruptions}
    return {
        "name": trained.data.name,
        "n_train": len(trained.data.y_train),
        "n_validation": len(trained.y_validation),
        "n_test": len(trained.data.y_test),
        "ood": config.data.ood,
        "n_ood": 0 if images.x_ood is None else len(images.x_ood),
        "n_corrupted": len(images.y_damaged) if corruptions else 0,
        "corruptions": corruptions,
    }
