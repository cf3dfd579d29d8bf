"""Further networks beside the one that is calibrated, which must have seen the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.trained import TrainedRun, checkpoint_path
from laplace_ws.experiment.config import ModelConfig, RunConfig, read_config
from laplace_ws.experiment.folder import CONFIG, ExperimentError, check_whole
from laplace_ws.experiment.kept import kept_by_training


@dataclass(frozen=True, eq=False)
class OtherRun:
    """Another network, trained on the images of the first.

    Attributes:
        config: of its run.
        model: with the weights that training kept.
        train_seconds: wall time of the training.
    """

    config: RunConfig
    model: nn.Module
    train_seconds: float

    def check_model(self, wanted: ModelConfig, given: str, option: str) -> None:
        """Reject another architecture.

        Args:
            wanted: the architecture that it should have.
            given: how the run was given, for the message.
            option: by which it was given.

        Raises:
            ExperimentError: says what differs.
        """
        _check_same(vars(self.config.model), vars(wanted), "model", f"{option}: '{given}' has another architecture")


def load_other(config: CalibrateConfig, trained: TrainedRun, given: str, option: str) -> OtherRun:
    """The network of a further run on the same images.

    Args:
        config: of the calibration.
        trained: the first network.
        given: run folder or checkpoint of the other.
        option: by which it was given, for messages.

    Raises:
        ExperimentError: there is none, or it was trained on other images.
        CheckpointError: the checkpoint is damaged.
    """
    path = checkpoint_path(given)
    check_whole(path.parent)
    run = read_config(path.with_name(CONFIG))
    images, wanted = _images_of(run, config), _images_of(trained.config, config)
    _check_same(images, wanted, "data", f"{option}: '{given}' was trained on other images")
    kept = kept_by_training(path, replace(run, device=config.device), trained.data)
    return OtherRun(run, kept.model, kept.train_seconds)


def _images_of(run: RunConfig, config: CalibrateConfig) -> dict[str, Any]:
    """What says which images a run was trained on; folders of images are told apart by their place, unless another one is given now."""
    d = run.data
    has_place = (d.name == "image-folder" or d.factory is not None) and config.data.root is None
    return {
        "name": None if d.factory else d.name,
        "factory": d.factory,
        "root": Path(d.root).absolute().as_posix() if has_place else None,
        "n_train": d.n_train,
        "seed": None if d.n_train is None else run.data_seed,
    }


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], section: str, problem: str) -> None:
    for key, value in wanted.items():
        if found[key] != value:
            there, here = ("null" if v is None else v for v in (found[key], value))
            raise ExperimentError(f"{problem}, {section}.{key}={there}; give a run with --{section}.{key} {here}")
