"""A trained network and its images, rebuilt from the folder of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.data import ImageData, balanced_indices
from laplace_ws.experiment.config import RunConfig, read_config
from laplace_ws.experiment.folder import CONFIG, ExperimentError, Json, Task, check_whole
from laplace_ws.experiment.kept import kept_by_training
from laplace_ws.experiment.run import load_data
from laplace_ws.matrices import by_parameter


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A network as its training run left it.

    Attributes:
        path: of the checkpoint.
        stored: the run's own configuration, as it wrote it.
        config: of the run, with data and device of the calibration.
        model: with the weights that training kept.
        epoch: of these weights.
        data: the run's training images, and the test images.
        x_validation: training images that the network was not trained on, normalised; empty where there are none.
        y_validation: their classes.
        prior_precision: the prior precision that it was trained under, by parameter: a number, or one per weight.
        temperature: of the likelihood that it was trained under.
        train_seconds: wall time of the training, curvature included.
    """

    path: Path
    stored: Json
    config: RunConfig
    model: nn.Module
    epoch: int
    data: ImageData
    x_validation: Float[Tensor, "V C H W"]
    y_validation: Int[Tensor, " V"]
    prior_precision: Mapping[str, Tensor]
    temperature: float
    train_seconds: float

    def prior_of(self, names: Sequence[str]) -> Tensor:
        """The prior precision that some parameters were trained under: one number each, or one per weight."""
        by_name = [self.prior_precision[name] for name in names]
        return torch.stack(by_name) if by_name[0].ndim == 0 else torch.cat(by_name)


def load_trained(config: CalibrateConfig) -> TrainedRun:
    """Rebuild network and data of a training run. No code from its files is run; where it was trained with a factory, the function that
    its configuration names is imported and called, as it was by the training.

    Raises:
        ExperimentError: there is no checkpoint or configuration, or they do not fit together.
        CheckpointError: the checkpoint is damaged.
        DatasetNotFoundError: the data are not there.
        ValueError: a subset is larger than its data set.
    """
    path = checkpoint_path(config.checkpoint)
    check_whole(path.parent)
    run = read_config(path.with_name(CONFIG))
    stored = run.settings()
    d = config.data
    # What the run tested on may have been held-out training images; here these are for validation alone.
    n_test = run.data.n_test if d.n_test is None else d.n_test
    data_config = replace(
        run.data,
        root=d.root or run.data.root,
        download=d.download,
        n_test=n_test,
        held_out=False,
    )
    run = replace(run, device=config.device, data=data_config)
    data = load_data(run)
    kept = kept_by_training(path, run, data)
    shapes = {name: p.shape for name, p in kept.model.named_parameters() if p.requires_grad}
    x_validation, y_validation = _validation_images(run, data, d.n_validation)
    return TrainedRun(
        path=path,
        stored=stored,
        config=run,
        model=kept.model,
        epoch=kept.epoch,
        data=data,
        x_validation=x_validation,
        y_validation=y_validation,
        prior_precision=by_parameter(kept.prior_precision, shapes),
        temperature=kept.temperature,
        train_seconds=kept.train_seconds,
    )


def checkpoint_path(given: str) -> Path:
    """The checkpoint: the file itself, or that of the tuned network in a run folder.

    Raises:
        ExperimentError: there is none.
    """
    path = Path(given)
    if path.is_dir():
        path = path / Task("tuned").checkpoint
    if not path.is_file():
        raise ExperimentError(
            f"there is no checkpoint at '{path}'; give a run folder of laplace-ws train, or a checkpoint*.pt in it"
        )
    return path


def _validation_images(run: RunConfig, data: ImageData, n_validation: int | None) -> tuple[Tensor, Tensor]:
    """The training images that the run left out, as the run itself would have held them out, or a part of them."""
    if run.data.n_train is None:
        return data.x_train[:0], data.y_train[:0]
    held_out = load_data(replace(run, data=replace(run.data, n_test=None, held_out=True)))
    if n_validation is None:
        return held_out.x_test, held_out.y_test
    if not 1 <= n_validation <= len(held_out.y_test):
        raise ValueError(
            f"data.n_validation={n_validation} must be from 1 to {len(held_out.y_test)}, the number of training images that the network "
            "was not trained on"
        )
    chosen = balanced_indices(held_out.y_test, n_validation, seed=run.data_seed).to(held_out.y_test.device)
    return held_out.x_test[chosen], held_out.y_test[chosen]
